"""The HTTP server in front of the router, with the APIs of OpenAI and Anthropic."""
