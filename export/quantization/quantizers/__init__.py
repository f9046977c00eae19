"""How the integers of a weight are found: one file a quantizer."""
