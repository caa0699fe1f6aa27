"""Settings of detectors: shipped files, the sampler's distillation, inputs that no network takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pqk.compress.train.teacher import family_of_named
from pqk.errors import PqkError
from pqk.families.build import empty_model
from pqk.families.registry import families, family
from pqk.recipe.experiment import config_file, config_loaders
from pqk.settings.distill import Distill, Watched, load_distill
from pqk.settings.training import load_training

REPOSITORY = Path(__file__).resolve().parents[2]
DETECTORS = ("diffusiondet", "detr")


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("config", ["workload", "eval", "quant"])
def test_shipped_files_load(name, config):
    of = family(name)
    assert config_loaders(of)[config](config_file(REPOSITORY, of, config), {}).version == "1.0"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "models").glob("d*det*.yaml")), ids=lambda p: p.stem)
def test_every_training_of_a_detector_fits_its_network(path):
    spec = load_training(path)
    of = family_of_named(spec.model)
    if of.name == "detr":
        pytest.importorskip("transformers", reason="DETR needs the library transformers")
    model = empty_model(of.name, {**of.settings_part().NAMED[spec.model], **spec.network})
    from pqk.compress.train.teacher import _check_rates

    _check_rates(model, spec)
    assert all(stage.size % of.settings_part().PATCH == 0 for stage in spec.stages)


@pytest.mark.parametrize("shape", [[1, 3, 250, 320], [1, 1, 256, 320], [3, 256, 320], [1, 3, 4128, 320], [1, 3, 0, 32]])
@pytest.mark.parametrize("name", DETECTORS)
def test_inputs_are_multiples_of_the_coarsest_stride(name, shape):
    of = family(name)
    with pytest.raises(PqkError, match="multiples of 32") as caught:
        config_loaders(of)["workload"](config_file(REPOSITORY, of, "workload"), {"input.shape": shape})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DETECTORS)
def test_an_unknown_metric_gets_the_nearest(name):
    of = family(name)
    with pytest.raises(PqkError, match=r"'ap5'.*did you mean"):
        config_loaders(of)["eval"](config_file(REPOSITORY, of, "eval"), {"quality.main_metric": "ap5"})


SAMPLER = {"teacher_steps": 20, "student_steps": 4}


def distilled(**changes):
    values = yaml.safe_load((REPOSITORY / "configs" / "diffusiondet" / "distill.yaml").read_text("utf-8"))
    return Distill.model_validate({**values, **changes})


def test_a_sampler_of_few_steps_has_a_section_of_its_own():
    loss = {"alpha": 0.1, "beta_start": 0.0, "beta_end": 0.0, "temperature": 1.0, "gamma": 0.0, "task_share": 0.5}
    spec = distilled(loss=loss, sampler=SAMPLER)
    assert (spec.sampler.teacher_steps, spec.sampler.student_steps, spec.sampler.best) == (20, 4, 100)
    assert "sampler" in spec.model_dump(mode="json")
    with pytest.raises(ValueError, match="multiple of student_steps, and has 20 and 3"):
        distilled(loss=loss, sampler={**SAMPLER, "student_steps": 3})
    for name in ("beta_start", "beta_end", "gamma"):
        with pytest.raises(ValueError, match=r"loss.beta_start, loss.beta_end and loss.gamma 0"):
            distilled(loss={**loss, name: 1.0}, sampler=SAMPLER)


def test_consistency_ends_in_one_step():
    loss = {"alpha": 0.1, "beta_start": 0.0, "beta_end": 0.0, "temperature": 1.0, "gamma": 0.0, "task_share": 0.5}
    spec = distilled(loss=loss, sampler={"kind": "consistency", "teacher_steps": 20})
    assert spec.sampler.watched == (Watched("consistency", 20), Watched("consistency", 1))
    assert spec.model_dump(mode="json")["sampler"]["kind"] == "consistency"
    assert "kind" not in distilled(loss=loss, sampler=SAMPLER).model_dump(mode="json")["sampler"]  # its sha256 stays
    for wrong in ({"student_steps": 2}, {"teacher_steps": 1}):
        with pytest.raises(ValueError, match="student_steps 1 and teacher_steps of at least 2"):
            distilled(loss=loss, sampler={"kind": "consistency", "teacher_steps": 20, **wrong})


def test_without_weights_the_teacher_does_not_run():
    loss = {"alpha": 1.0, "beta_start": 0.0, "beta_end": 0.0, "temperature": 1.0, "gamma": 0.0, "task_share": 0.5}
    alone = distilled(loss=loss, sampler={"teacher_steps": 20, "classes": 0.0, "boxes": 0.0, "start": "noise"})
    assert not alone.sampler.guided and alone.sampler.watched[1] == Watched("steps", 0, "noise")


def test_without_a_sampler_nothing_is_written_of_it():
    plain = load_distill(REPOSITORY / "configs" / "distill.yaml", {})
    assert plain.sampler is None and "sampler" not in plain.model_dump(mode="json")


def test_a_sampler_belongs_to_the_engine_and_not_to_the_data():
    load = config_loaders(family("diffusiondet"))["workload"]
    one, many = (
        load(config_file(REPOSITORY, family("diffusiondet"), "workload"), {"sampler.steps": n}) for n in (1, 20)
    )
    assert one.calling != many.calling
    others = [name for name in ("dust3r", "vggt", "detr") if name in {of.name for of in families()}]
    for of in map(family, others):
        assert config_loaders(of)["workload"](config_file(REPOSITORY, of, "workload")).calling == {}
