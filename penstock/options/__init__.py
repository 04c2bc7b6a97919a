"""What can be set about a process, and text into it."""
