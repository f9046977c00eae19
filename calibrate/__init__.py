"""Adapters in, one composed adapter out: read, merge, calibrate, train."""

from caliport.calibrate.low_rank import LowRankUpdate

__all__ = ["LowRankUpdate"]
