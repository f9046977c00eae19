"""Training of bases, adapters, corrections and FLix features, in one loop."""
