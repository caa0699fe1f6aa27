"""Counts the words of families outside their folders: what pqk knows of a family is behind its contract."""

from __future__ import annotations

import re
from pathlib import Path

from pqk.families.registry import BUILT_IN

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = re.compile(
    r"encoder|decoder|tokens_\d|pts3d|\bconf_\d|absrel|abs_rel|chamfer|delta1|reproj|\bause\b|covisib|dust3r"
    r"|lowest_confidence|confidence_loss|symmetricpairs|training_pairs|timed_pair|pairgraph|scene_pairs|symmetrize"
    r"|vggt|aggregator|pose_enc|depth_conf|world_points|camera_token|register_token|pose_miss|\bauc\d|\br[rt]a_?\d"
    r"|diffusiondet|roi_?align|proposal|renewal|giou|bboxes|class_logits"
    r"|\bdetr|object_quer|num_queries|pred_boxes|eos_coef|\bap_?(50|75|small|medium|large)\b",
    re.IGNORECASE,
)
"""Names of the families' graphs, tensors and metrics, and of what is done with them. `t_pair_*` and `pairs` are not
among them: columns of the lab's log, whose pair is the sample of any family."""

ALLOWED: dict[str, int] = {}  # none
"""File -> lines that still hold such a word. It may only shrink."""

SHARED = ("pqk/data/", "pqk/settings/scenery.py")
"""What families of scenes share, which may speak of views that see the same."""


def found() -> dict[str, int]:
    files = (path for path in (REPOSITORY / "pqk").rglob("*.py") if "families" not in path.parts)
    lines = {
        path.relative_to(REPOSITORY).as_posix(): sum(
            bool(WORDS.search(line)) for line in path.read_text("utf-8").splitlines()
        )
        for path in files
    }
    return {name: count for name, count in lines.items() if count and not name.startswith(SHARED)}


def test_no_family_is_named_elsewhere() -> None:
    """Also where views and overlap may be spoken of."""
    names = re.compile("|".join(map(re.escape, BUILT_IN)), re.IGNORECASE)
    files = (path for path in (REPOSITORY / "pqk").rglob("*.py") if "families" not in path.parts)
    assert not [str(path) for path in files if names.search(path.read_text("utf-8"))]


def test_the_walk_sees_something() -> None:
    families = REPOSITORY / "pqk" / "families"
    for path in ("dust3r/predict.py", "diffusiondet/model.py", "detr/model.py", "detection/scoring.py"):
        assert WORDS.search((families / path).read_text("utf-8"))


def test_family_words_only_shrink() -> None:
    now = found()
    grown = {name: count for name, count in now.items() if count > ALLOWED.get(name, 0)}
    assert not grown, f"these files name a family's graphs, tensors or metrics; say it through the contract: {grown}"
    gone = {name: count for name, count in ALLOWED.items() if now.get(name, 0) < count}
    assert not gone, f"shrunk: lower ALLOWED to {dict(sorted(now.items()))}"
