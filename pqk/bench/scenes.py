"""Times the scene generator on whole folders, from drawing the seeds to renaming the files."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from pqk.errors import PqkError

VIEWS_PER_SCENE = 8


def bench_scenes(views: int = 512, size: int = 512) -> dict[str, Any]:
    """Renders `views` views of size x size pixels (8 per scene) into a temporary folder with all cores.

    Prints and returns {views, size, seconds, views_per_second}; the temporary files are deleted.
    Raises PqkError when `views` is not a positive multiple of 8, or `size` is not possible.
    """
    from pqk.data.render.generate import ScenePlan, make_scenes

    if views < VIEWS_PER_SCENE or views % VIEWS_PER_SCENE:
        raise PqkError(f"the number of views must be a positive multiple of {VIEWS_PER_SCENE}, got {views}")
    plans = [ScenePlan("train", 0, index, VIEWS_PER_SCENE, size) for index in range(views // VIEWS_PER_SCENE)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        make_scenes(Path(folder), plans)
        seconds = time.perf_counter() - began
    result = {"views": views, "size": size, "seconds": round(seconds, 3), "views_per_second": round(views / seconds, 3)}
    print(json.dumps(result))
    return result
