"""ExecuTorch: trace, lower to XNNPACK, repeat layers, write the program."""
