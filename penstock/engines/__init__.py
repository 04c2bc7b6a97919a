"""Engines behind the `Engine` port: they turn attempts into steps."""
