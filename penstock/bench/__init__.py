"""A load generator for any server with OpenAI's HTTP API."""
