"""Logging that never blocks a process, and that strangers cannot flood."""
