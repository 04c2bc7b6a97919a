"""A worker: one engine, linked to every frontend."""
