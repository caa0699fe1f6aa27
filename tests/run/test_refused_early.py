"""Mistakes that are refused before anything long runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pqk.data.generate import ScenePlan, make_scenes
from pqk.errors import PqkError
from pqk.run.runner import refuse_partial_truth


def test_a_scene_with_depth_for_some_views(tmp_path: Path) -> None:
    """Depth for all or for none is fine; for some, the first view without is named."""
    folder = make_scenes(tmp_path, [ScenePlan("test", 0, 0, 3, 64)], jobs=1)[0]
    refuse_partial_truth(folder)
    depths = sorted((folder / "ground_truth_depth").rglob("*.jpg"))
    assert len(depths) == 3
    depths[1].unlink()
    with pytest.raises(PqkError, match=rf"view '{depths[1].name}' has no depth \(1 of the 3 views") as refused:
        refuse_partial_truth(folder)
    assert folder.name in str(refused.value) and "\n" not in str(refused.value)
    depths[0].unlink()
    depths[2].unlink()
    refuse_partial_truth(folder)
