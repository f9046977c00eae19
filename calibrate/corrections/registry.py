"""XXX."""

from __future__ import annotations

from caliport.calibrate.corrections.column_scales import ColumnScales
from caliport.calibrate.corrections.lc import LC
from caliport.calibrate.corrections.lc_plus_plus import LCPlusPlus

CORRECTIONS = {"lc": LC, "lc++": LCPlusPlus, "scales": ColumnScales}
