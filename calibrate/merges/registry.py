"""XXX."""

from __future__ import annotations

from collections.abc import Callable

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.dare import dare
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.linear import linear
from caliport.calibrate.merges.slerp import slerp
from caliport.calibrate.merges.svd import svd
from caliport.calibrate.merges.ties import ties

# The merges that need neither data nor training, all with their defaults.
MERGES: dict[str, Callable[..., LowRankUpdate]] = {
    "linear": linear,
    "exact": exact,
    "svd": svd,
    "ties": ties,
    "dare": dare,
    "slerp": slerp,
}
