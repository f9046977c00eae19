"""Latency, memory and bandwidth of artifacts, measured side by side."""
