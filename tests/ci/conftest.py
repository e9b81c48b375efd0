from __future__ import annotations

import sys
from pathlib import Path

# ci/ is no package: its files are scripts of the standard library alone.
sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))
