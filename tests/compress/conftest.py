"""Makes the helpers in this folder importable: with importlib mode pytest does not put it on the path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "run")]  # of run: preloaded
