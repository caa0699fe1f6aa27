"""Makes the toys of the other folders importable under --import-mode=importlib."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("backends", "run"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
