"""Letter T in a whole command: a chain of all letters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_toys import TINY, pqk, written

from pqk.models import build_model, load_model, save_model

CARD = """---
id: X1
title: All letters
combo: P→K→T→Q
recipe: [P, K, T, Q]
goal: Every pair of letters runs.
overrides: {reduce: {tail: quarter, tokens: 0.4}}
budget: {gpu_hours: 5}
status: planned
---
# X1
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with DPT heads, whose points lie in front of the camera."""
    import torch

    sizes = {"head_type": "dpt", "dec_depth": 3}
    dpt = {"feature_dim": 32, "last_dim": 16, "layer_dims": [16, 32, 32, 32]}
    net = build_model("dust3r", {**TINY, **sizes, "dpt": dpt}, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for head in (net.downstream_head1, net.downstream_head2):
            head.dpt.head["4"].bias[2] += 1.5
    return save_model(net, tmp_path_factory.mktemp("models") / "dpt")


def test_all_letters_in_one_recipe(tmp_path: Path, begun: Callable[[Path], Path], model: Path) -> None:
    root = begun(tmp_path / "project")
    (root / "schedule" / "TaskCards" / "X1.md").write_text(CARD)
    outcome = pqk(root, "run", "X1", "--backend", "openvino", "--model", model, "--json", "--no-rollback")
    assert outcome.code in (0, 1, 4), outcome.err
    record = outcome.record
    assert (record["combo"], record["model"], record["precision"]) == ("P→K→T→Q", "dpt+P+K+T", "int8")
    assert "T: tail on a quarter of the grid, at most 40 % of the tokens merged" in record["notes"]
    assert "K: 6 steps" in record["notes"] and record["hashes"]["reduce"]
    teacher, own = (
        next(r for r in written(root) if r["role"] == role and r["precision"] == "f32")
        for role in ("teacher", "baseline")
    )
    assert own["model"] == record["model"] and own["flops_G"] < 0.8 * teacher["flops_G"]
    # the student learned with its tokens merged, T folded the tail, and Q left the resize of the points alone
    (student,) = (root / "outputs" / "store" / "distilled").glob("*/model/config.json")
    assert json.loads(student.read_text())["reduce"] == {"tail": "full", "tokens": 0.4}
    (reduced,) = (root / "outputs" / "store" / "reduced").glob("*/model")
    assert load_model(reduced).config["reduce"] == {"tail": "quarter", "tokens": 0.4}
    assert record["keep_list"][-1].endswith(r"/dpt/Resize(_\d+)?$")
    for name in ("chamfer", "delta1", "reproj_px"):
        assert any(f"guard metric: {name} " in reason for reason in record["verdict_reasons"])

    exported = pqk(root, "export", "X1", "--backend", "openvino", "--model", model, "--no-rollback", "-o", "out")
    assert exported.code == 0, exported.err
    assert "… " not in exported.err.split("✓")[0]  # everything is in the store
