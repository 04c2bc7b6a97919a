"""Requests, to workers: by what core/ decides."""
