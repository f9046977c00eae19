"""What is quantized, into which integers, and which layers lose most by it."""
