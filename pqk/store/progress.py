"""Tells the parent of a worker process how far its task is.

A module of its own, as everything that a task imports is in the key of what it makes.
"""

from __future__ import annotations

import json
from typing import Any

PREFIX = "pqk-progress "
"""Begins the lines on a worker's stdout that are meant for its parent."""


def tell(news: dict[str, Any]) -> None:
    """Reports the progress of this worker: 'text', and the 'share' done. The parent may ignore it."""
    print(PREFIX + json.dumps(news), flush=True)
