"""Benchmark of ExecuTorch bundles: one method per composition against adapters as inputs."""
