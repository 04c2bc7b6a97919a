"""Logging: how it is set up, and how it never blocks or floods."""
