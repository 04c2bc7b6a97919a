"""A graph's services as local processes."""
