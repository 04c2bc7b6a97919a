"""The reference engine: Qwen3 and Llama in numpy, with every path real."""
