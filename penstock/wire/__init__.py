"""The link's language: frames and messages. Pure: bytes in, messages out, never awaits."""
