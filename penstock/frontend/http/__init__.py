"""HTTP: connections, requests and their limits."""
