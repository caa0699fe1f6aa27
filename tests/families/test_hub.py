"""Names of models in the hub's local cache, for everything that takes a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from pqk.errors import PqkError
from pqk.families.hub import cached
from pqk.families.identify import family_of
from pqk.models import build_model, load_model, save_model
from pqk.recipe.experiment import teacher_path


def test_a_hub_name_is_looked_up_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        PqkError, match=r"download model.safetensors and config.json of https://huggingface.co/some/model"
    ):
        cached("some/model")
    folder = tmp_path / "hub" / "models--some--model" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert cached("some/model") == str(folder / "model.safetensors")
    (folder / "config.json").touch()
    assert cached("some/model") == str(folder)
    (tmp_path / "some").mkdir()
    assert cached("some/model") == "some/model"  # a path that is not there, in a folder that is
    assert cached("random:tiny") == "random:tiny" and cached("../up") == "../up"


def test_every_door_to_a_model_takes_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sizes = {"img_size": 28, "embed_dim": 32, "depth": 4, "num_heads": 2, "dino": {"depth": 1}}
    small = {**sizes, "camera": {"trunk_depth": 1}, "dpt": {"features": 16, "out_channels": [8, 12, 16, 16]}}
    folder = tmp_path / "models--some--model" / "snapshots" / "1"
    save_model(build_model("vggt", small), folder)
    assert family_of("some/model") == "vggt"
    assert teacher_path("some/model", tmp_path) == str(folder)
    assert load_model("some/model").config["embed_dim"] == 32
    with pytest.raises(PqkError, match="no such model: some/other is neither a file nor a folder here"):
        load_model("some/other")
