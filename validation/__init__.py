"""Artifact against reference: parity, task quality, latency, gates, report."""
