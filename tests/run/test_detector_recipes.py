"""Every training file of the detectors: shortened, it trains, goes on, and gives a model that is exported and predicts.

Those of extensions start from the shipped detector, and their networks find at first what it finds.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from run_toys import REPOSITORY, make_project

from backends.base import Precision
from backends.exchange import export
from pqk.cli.app import app
from pqk.compress.train import teacher
from pqk.compress.train.loop import parameter_groups
from pqk.engines.calls import Engines, in_torch
from pqk.errors import PqkError, told
from pqk.families.contract import Family, Sample, completed
from pqk.families.detection.inputs import fit
from pqk.families.detection.learning import evidence
from pqk.families.diffusiondet.settings import Network
from pqk.families.registry import family
from pqk.models import build_model, load_model
from pqk.recipe.experiment import config_file, config_loaders
from pqk.settings.training import TrainSpec, Validation, load_training

pytestmark = pytest.mark.whole

FOLDER = REPOSITORY / "configs" / "models"
SHIPPED = REPOSITORY / "models" / "diffusiondet-tiny"
FROM_NOTHING = ("diffusiondet-tiny-cpu", "detr-tiny-cpu")  # of DETR all but its ResNet
FILES = [*sorted(FOLDER.glob("diffusiondet-tiny-*.yaml")), FOLDER / "detr-tiny-cpu.yaml"]
WARM = [file for file in FILES if file.stem not in FROM_NOTHING]
SMALL = {"input.shape": [1, 3, 96, 128]}

FORGET = {f"network.{key}": value for key, value in Network().model_dump().items() if key != "noise_std"}
"""What the shipped detector is."""

every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
every_warm_start = pytest.mark.parametrize("file", WARM, ids=lambda file: file.stem)
Trained = Callable[[Path], Path]


def pqk(*words: str | Path) -> int:
    """`pqk ...` in this process: its exit code."""
    return told(lambda: app([str(word) for word in words], standalone_mode=False) or 0)


def shortened(file: Path, folder: Path) -> Path:
    """The training file for three steps of two small images; what is special in it stays.

    The rate of the first step is 0, and layers before one that begins with 0 learn a step after it.
    """
    values = yaml.safe_load(file.read_text("utf-8"))
    stages, validation = [{"size": 96, "batch": 2, "until": 1.0}], {"size": 96, "pairs": 2, "every": 3}
    short = folder / file.name
    short.write_text(yaml.safe_dump({**values, "steps": 3, "stages": stages, "validation": validation}))
    return short


def train(file: Path, folder: Path, *words: str) -> int:
    """`pqk train teacher` of a file into folder / 'out', from the shipped detector where the file is for that."""
    start = () if file.stem == "diffusiondet-tiny-cpu" else ("--init", SHIPPED)
    return pqk("train", "teacher", "--config", file, *start, "-o", folder / "out", "--device", "cpu", *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Returns the folder that a shortened file was trained into."""

    @cache
    def of(file: Path) -> Path:
        if file.stem.startswith("detr"):
            pytest.importorskip("transformers", reason="DETR needs the library transformers")
        folder = tmp_path_factory.mktemp(file.stem)
        assert train(shortened(file, folder), folder) == 0
        return folder / "out"

    return of


def workload(of: Family, **changes: Any) -> Any:
    return config_loaders(of)["workload"](config_file(REPOSITORY, of, "workload"), {**SMALL, **changes})


def asked_for(model: torch.nn.Module) -> dict[str, Any]:
    """What a workload must say of the network, by the sentence with which another one is refused."""
    of = family(str(model.family))
    try:
        of.model_part().graphs(model, workload(of))
    except PqkError as error:
        settings = [word for word in shlex.split(str(error)) if word.startswith("workload.")]
        assert settings, error
        pairs = (setting.removeprefix("workload.").split("=", 1) for setting in settings)
        return {key: yaml.safe_load(value) for key, value in pairs}
    return {}


def test_every_file_of_a_detector_is_here() -> None:
    found = {
        file for file in FOLDER.glob("*.yaml") if load_training(file).model.startswith(("diffusiondet-tiny", "detr"))
    }
    assert found == set(FILES) and len(WARM) >= 5


def network(spec: TrainSpec) -> Any:
    """The network that a file trains; the model that it ends with may have its norms folded."""
    of = teacher.family_of_named(spec.model)
    return build_model(of.name, {**of.settings_part().NAMED[spec.model], **spec.network})


def with_gradient(spec: TrainSpec, out: Path) -> set[str]:
    """The names of the weights that a training had a gradient for."""
    model = network(spec)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.0, spec.rates)
    order = [names[id(parameter)] for group in groups for parameter in group["params"]]
    kept = torch.load(out / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    return {order[number] for number, state in kept.items() if state["exp_avg"].any()}


@every_file
def test_a_file_trains(file: Path, trained: Trained) -> None:
    """What a file adds to the network learns; what it holds still has not moved."""
    out, spec = trained(file), load_training(file)
    model = load_model(out)
    assert spec.network.items() <= model.config.items()
    start = load_model(SHIPPED).state_dict() if file in WARM else {}
    learned = with_gradient(spec, out)
    if file in WARM:
        new = {name for name, _ in model.named_parameters()} - set(start)
        assert new <= learned
        assert bool(new) == any(key in spec.network for key in ("label_state", "quality_head", "geo_feat", "geo_bias"))
    else:
        held = [rate for rate, factor in spec.rates.items() if not factor]
        free = {name for name, _ in network(spec).named_parameters() if not any(re.search(rate, name) for rate in held)}
        assert learned <= free and len(learned) > 0.9 * len(free)
    now = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    still = [name for name in start if any(re.search(rate, name) for rate, factor in spec.rates.items() if not factor)]
    assert not set(still) & learned and all(torch.equal(now[name], start[name].to(now[name])) for name in still)
    assert bool(still) == (file in WARM and 0 in spec.rates.values())


def test_a_training_goes_on_where_it_was(tmp_path: Path, trained: Trained) -> None:
    """Paused after its first step and started again: the same bytes as in one go."""
    (file,) = (file for file in WARM if "d3pm" in file.stem)
    short = shortened(file, tmp_path)
    assert train(short, tmp_path, "--pause-after", "0.000001") == 0
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert train(short, tmp_path) == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", trained(file))]
    assert weights[0] == weights[1]


def test_a_file_trains_in_bf16_and_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced is run as it is: torch's compiler takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    (file,) = (file for file in WARM if "geo-bias" in file.stem)
    assert train(shortened(file, tmp_path), tmp_path, "--autocast", "--compile") == 0
    torch._dynamo.reset()
    assert load_model(tmp_path / "out").config["geo_bias_topk"] == 50


# What a network finds


def pictures(of: Family, spec: TrainSpec) -> Any:
    """Held-out images with their truth."""
    cpu = torch.device("cpu")
    return next(iter(of.learning_part().batches(spec, cpu, seed=0, held_seed=0).held_out()))


def found_by(model: torch.nn.Module, asked: Any, batch: Any, call: Any = None) -> list[Mapping[str, np.ndarray]]:
    """What the glue over the graphs finds in each image: those in torch, unless others are given."""
    of = family(str(model.family))
    call = call or in_torch(of.model_part().graphs(model, asked))
    found = []
    for number, one in enumerate(batch.pictures):
        fed = fit(one.image, asked.input.height, asked.input.width, number)
        found.append(of.predict_part().predict(call, Sample(number, str(number), fed), asked, 0))
    return found


def ap_of(found: list[Mapping[str, np.ndarray]], batch: Any) -> float:
    of = family("diffusiondet").scoring_part()
    return float(of.summarise(completed(of, [row for rows in evidence(found, batch) for row in rows]))["ap"])


@every_warm_start
def test_a_warm_start_finds_what_the_shipped_detector_finds(file: Path) -> None:
    """New layers begin without a change, in every step; a file that limits the neighbours does that from the start."""
    spec, of, shipped = load_training(file), family("diffusiondet"), load_model(SHIPPED)
    config = {**shipped.config, **spec.network}
    model = build_model("diffusiondet", config, generator=torch.Generator().manual_seed(0)).eval()
    teacher._begin_with(model, of.learning_part(), str(SHIPPED), config, spec)
    batch = pictures(of, spec.model_copy(update={"validation": Validation(size=192, pairs=4)}))
    size = {"input.shape": [1, 3, 160, 192], "sampler.steps": 4, **asked_for(model)}
    limit = {"network.neighbours": spec.network["geo_bias_topk"]} if "geo_bias_topk" in spec.network else {}
    wanted = found_by(shipped, workload(of, **{**size, **FORGET, **limit}), batch)
    assert ap_of(wanted, batch) > 20
    found = found_by(model, workload(of, **size), batch)
    for one, other in zip(found, wanted, strict=True):
        for name in ("boxes", "scores", "labels", "logits", "refined"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)
    if size.get("network.quality_head"):  # which says 0.5 of every box: the order stays
        found = found_by(model, workload(of, **size, **{"sampler.scores": "quality"}), batch)
        assert ap_of(found, batch) == ap_of(wanted, batch)
        guided = workload(of, **size, **{"sampler.quality_guidance": 1.0})
        assert len(found_by(model, guided, batch)) == len(batch.pictures)


@every_file
def test_a_trained_model_is_exported_and_predicts(file: Path, trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from backends.openvino.engine import OpenVINOEngine

    model = load_model(trained(file))
    of = family(str(model.family))
    steps = {"sampler.steps": 3} if of.name == "diffusiondet" else {}
    asked = workload(of, **steps, **asked_for(model))
    specs = of.model_part().graphs(model, asked)
    files = {
        name: export(spec.module, spec.inputs, spec.output_names, tmp_path / f"{name}.onnx", more=spec.more)
        for name, spec in specs.items()
    }
    batch = pictures(of, load_training(shortened(file, tmp_path)))
    wanted = found_by(model, asked, batch, in_torch(specs))
    with Engines({name: partial(OpenVINOEngine, graph, Precision.F32) for name, graph in files.items()}) as engines:
        found = found_by(model, asked, batch, engines)
    for one, other in zip(found, wanted, strict=True):
        assert len(one["boxes"]) == len(other["boxes"]) > 0
        for name in (
            "logits",
            "refined",
        ):  # a box may take another neighbour where two are equally near, but for the noise
            assert np.abs(one[name] - other[name]).mean() < 1e-3 * np.abs(other[name]).mean(), name


@pytest.mark.usefixtures("forked_workers")
def test_a_refusal_says_what_to_set(
    tmp_path: Path, trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger refuses a trained network, and takes it with the settings that it asked for, under every sampler."""
    pytest.importorskip("openvino")
    (file,) = (file for file in WARM if "d3pm" in file.stem)
    out = trained(file)
    monkeypatch.chdir(make_project(tmp_path / "project"))
    small = ("workload.sets.test.images=3", "workload.input.shape=[1, 3, 96, 128]", "workload.sampler.boxes=20")

    def evaluated(*settings: str) -> tuple[int, str, list[dict[str, Any]]]:
        capsys.readouterr()
        words = [word for setting in (*small, *settings) for word in ("--set", setting)]
        name = f"{len(list(Path().glob('*.tsv')))}.tsv"
        code = pqk("ledger", "eval", "detector", "--eval-seeds", "0..1", "--backend", "openvino", "--no-timing",
                   "--json", "-o", name, *words)  # fmt: skip
        said = capsys.readouterr()
        return code, said.err, json.loads(said.out.splitlines()[-1]) if code == 0 else []

    assert pqk("ledger", "finalize", out, "--name", "detector", "--card", "S1") == 0
    code, said, _ = evaluated()
    asked = [word for word in shlex.split(said.splitlines()[-1]) if word.startswith("workload.")]
    assert code == 2 and len(asked) == 3, said
    quality = ("workload.sampler.scores=quality", "workload.sampler.quality_guidance=1.0")
    code, said, rows = evaluated(*asked, *quality, "workload.sampler.steps=4", "workload.network.neighbours=10")
    assert code == 0, said
    assert [row["eval_seed"] for row in rows] == [0, 1] and all(row["pairs"] == 3 for row in rows)


@every_warm_start
def test_the_guide_says_what_an_evaluation_must_set(file: Path, trained: Trained) -> None:
    """As does the file itself."""
    page = (REPOSITORY / "docs" / "howto-detection.md").read_text("utf-8")
    assert f"configs/models/{file.name}" in page
    for key, value in asked_for(load_model(trained(file))).items():
        setting = f"--set workload.{key}={str(value).lower()}"
        assert setting in page and setting in file.read_text("utf-8"), setting
