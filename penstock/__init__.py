"""Penstock serves large language models across machines: disaggregated, KV-routed, without a broker."""

__version__ = "0.1.0"
