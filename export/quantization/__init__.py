"""Quantization: schemes, integers and scales, and each layer's sensitivity."""
