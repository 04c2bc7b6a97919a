"""Listening and connecting: addresses, ports, TLS, small HTTP servers, files that are renewed."""
