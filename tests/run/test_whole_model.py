"""No part of the model can be destroyed unseen: head 2, the last block of decoder 2, and either confidence map."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from run_toys import REPOSITORY

from pqk.data.render.stream import PairBatch, training_pairs
from pqk.data.render.synthetic import texture_bank
from pqk.families.dust3r.scoring import PairTruth, quality_drop_pct, score_pair, summarise
from pqk.families.dust3r.settings import load_evaluation
from pqk.models import load_model
from pqk.settings.seeds import split_seed

SIZE = 128  # the shipped Teacher's confidence tells nothing at 64
Maps = Mapping[str, np.ndarray]
EVALUATION = load_evaluation(REPOSITORY / "configs" / "eval.yaml")


@pytest.fixture(scope="module")
def pairs() -> PairBatch:
    """Three held-out pairs, to be fed in both orders."""
    return training_pairs(3, SIZE, split_seed("validation", 3, 0), texture_bank())


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_model(str(REPOSITORY / "models" / "dust3r-tiny")).eval()


def predicted(model: Any, encoder: Any, pairs: PairBatch) -> list[Maps]:
    with torch.inference_mode():
        tokens = encoder.encode(pairs.images.flatten(0, 1)).unflatten(0, pairs.images.shape[:2])
        a, b = tokens[:, 0], tokens[:, 1]
        out = model.decode(torch.cat([a, b]), torch.cat([b, a]), (SIZE, SIZE), (SIZE, SIZE))
    maps = {name: values.float().numpy() for name, values in out.items()}
    return [{name: values[k] for name, values in maps.items()} for k in range(len(maps["conf_1"]))]


def scores(outputs: list[Maps], pairs: PairBatch) -> dict[str, Any]:
    rows = []
    for output, *truth, pose in zip(outputs, *pairs.ordered(), pairs.first_to_second(), strict=True):
        if truth[2].any():
            gt1, gt2, valid1, valid2 = (part.numpy() for part in truth)
            moved = pose.numpy().astype(np.float64)
            rows.append(score_pair(output, PairTruth(gt1, gt2, valid1, valid2, np.eye(3), np.eye(3), moved)))
    return summarise(rows)


@pytest.fixture(scope="module")
def whole(teacher: Any, pairs: PairBatch) -> tuple[list[Maps], dict[str, Any]]:
    outputs = predicted(teacher, teacher, pairs)
    return outputs, scores(outputs, pairs)


@pytest.mark.parametrize("part", ["downstream_head2", "dec_blocks2.2"])
def test_a_destroyed_part_of_view_2_is_a_drop(
    part: str, teacher: Any, pairs: PairBatch, whole: tuple[list[Maps], dict[str, Any]]
) -> None:
    broken = copy.deepcopy(teacher)
    names = [name for name, _ in broken.named_parameters() if name.startswith(f"{part}.")]
    assert names and not any(name.startswith("dec_blocks2.3.") for name, _ in broken.named_parameters())
    with torch.no_grad():
        for name in names:
            broken.get_parameter(name).zero_()
    outputs, metric = predicted(broken, teacher, pairs), EVALUATION.quality.main_metric
    drop = quality_drop_pct(scores(outputs, pairs)[metric], whole[1][metric])
    assert metric == "absrel" and drop > EVALUATION.stop_loss.drop_stop_p_pct
    # ... which the points of view 1 would never tell
    assert all((a["pts3d_1"] == b["pts3d_1"]).all() for a, b in zip(outputs, whole[0], strict=True))


@pytest.mark.parametrize("key", ["conf_1", "conf_2"])
@pytest.mark.parametrize("how", ["constant", "shuffled"])
def test_a_destroyed_confidence_is_above_the_line(
    key: str, how: str, pairs: PairBatch, whole: tuple[list[Maps], dict[str, Any]]
) -> None:
    random = np.random.default_rng(0)

    def destroy(conf: np.ndarray) -> np.ndarray:
        return np.full_like(conf, 2) if how == "constant" else random.permuted(conf.ravel()).reshape(conf.shape)

    broken = scores([{**output, key: destroy(output[key])} for output in whole[0]], pairs)
    assert broken["absrel"] == whole[1]["absrel"]
    assert broken["ause"] - whole[1]["ause"] > EVALUATION.thresholds.ause_rise


def test_a_rounded_model_stays_below_the_line(
    teacher: Any, pairs: PairBatch, whole: tuple[list[Maps], dict[str, Any]]
) -> None:
    """Weights in 7 bits cost the confidence nothing to speak of."""
    rounded = copy.deepcopy(teacher)
    with torch.no_grad():
        for weight in (p for p in rounded.parameters() if p.ndim >= 2):
            step = weight.abs().flatten(1).amax(1).clamp(min=1e-9).reshape(-1, *[1] * (weight.ndim - 1)) / 63
            weight.copy_((weight / step).round() * step)
    found = scores(predicted(rounded, rounded, pairs), pairs)
    assert abs(found["ause"] - whole[1]["ause"]) < EVALUATION.thresholds.ause_rise / 2
