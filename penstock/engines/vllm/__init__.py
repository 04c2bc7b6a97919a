"""vLLM as an engine: its core process behind the Engine port, KV moved by NIXL."""
