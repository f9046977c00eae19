"""Benchmark of caliport's exporters against other tools, on a Llama of the 1B shape."""
