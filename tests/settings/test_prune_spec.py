"""configs/prune.yaml: what is shipped, what cards may change, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pqk.errors import PqkError
from pqk.settings.prune import load_prune

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_shipped_file_is_card_c1() -> None:
    spec = load_prune()
    assert spec.rho == 0.1 and spec.measure == "params"
    assert 10 <= spec.train.epochs <= 15
    assert spec.units.heads and spec.units.ffn and spec.units.dpt and not spec.units.blocks
    assert spec.train.stages[-1].size == 512 and spec.sensitivity.enabled
    first = Path("configs/prune.yaml").read_text(encoding="utf-8").split("\n", 1)[0]
    assert first.startswith(f"# v{spec.version}: ")


def test_overrides_change_values_and_the_digest() -> None:
    plain = load_prune()
    changed = load_prune(overrides={"rho": 0.3, "sensitivity": {"enabled": False}, "train.epochs": 12})
    assert (changed.rho, changed.sensitivity.enabled, changed.train.epochs) == (0.3, False, 12)
    assert changed.sensitivity.levels == plain.sensitivity.levels and changed.sha256 != plain.sha256


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rho": 0}, r"prune\.rho is 0 but must be more than 0(\.0)? and less than 0\.9"),
        ({"rho": 0.95}, "less than 0.9"),
        ({"rhoo": 0.1}, "unknown key 'prune.rhoo' .did you mean 'rho'"),
        ({"importance": "l3"}, "must be 'l1', 'l2' or 'taylor'"),
        ({"measure": "size"}, "must be 'params' or 'flops'"),
        ({"units": {"heads": False, "ffn": False, "dpt": False}}, "must allow at least one of heads, ffn, dpt, inn"),
        ({"units.blocks": True, "sensitivity.enabled": False}, "units.blocks needs sensitivity.enabled"),
        ({"sensitivity.levels": [0.5, 0.25]}, "must be rising shares"),
        ({"sensitivity.levels": [0.5, 1.0]}, "less than 1"),
        ({"sensitivity.levels": []}, "must have at least 1 items"),
        ({"round_to": 0}, "must be from 1 to 256"),
        ({"train.epochs": 0}, "must be from 1 to 1000"),
        ({"train.final_rate": 0.1}, "final_rate 0.1 must not be above learning_rate"),
    ],
)
def test_bad_values_are_refused_in_a_sentence(overrides, message) -> None:
    with pytest.raises(PqkError, match=message):
        load_prune(overrides=overrides)
