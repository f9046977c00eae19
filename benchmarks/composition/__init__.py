"""Which way of composing adapters is best, on several data sets."""
