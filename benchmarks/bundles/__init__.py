"""The two ways of an ExecuTorch bundle, measured: a method each, and adapters as inputs."""
