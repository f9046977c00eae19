"""Adapters in, one composed adapter out: read, merge, correct, train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caliport.calibrate.low_rank import LowRankUpdate
    from caliport.calibrate.peft_files import read_peft, write_peft

__all__ = ["LowRankUpdate", "read_peft", "write_peft"]


def __getattr__(name: str) -> Any:
    """Import torch only when one of these names is used, so that ``caliport --help`` is fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import caliport.calibrate.peft_files as files

    return getattr(files, name)
