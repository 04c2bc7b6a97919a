"""A graph as the objects that a cluster should have: pure."""
