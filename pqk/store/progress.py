"""Reports the progress of a task from a worker process to its parent: `tell`.

A module of its own, because everything that a task imports is part of the keys of its artifacts.
"""

from __future__ import annotations

import json
import os
from typing import Any

PREFIX = "pqk-progress "
"""Begins the lines on a worker's stdout that are meant for its parent."""


def tell(news: dict[str, Any]) -> None:
    """Reports the progress of this worker: 'text', and the 'share' done. The parent may ignore it.

    Of processes that share a training (`pqk.store.ranks`) only the first one reports.
    """
    if os.environ.get("RANK", "0") == "0":
        print(PREFIX + json.dumps(news), flush=True)
