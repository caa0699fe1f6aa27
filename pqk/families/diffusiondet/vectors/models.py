"""Runners of the cases of whole networks: small ones, the released architecture, official files, lists of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pqk.families.build import build_model, empty_model
from pqk.families.checkpoint import load_model
from pqk.families.detection.inputs import padded
from pqk.families.diffusiondet.checkpoint import averaged, read_backbone
from pqk.families.diffusiondet.model import DiffusionDet
from pqk.families.diffusiondet.network.configs import NAMED
from pqk.families.diffusiondet.network.head import MAPS
from pqk.families.diffusiondet.sampling.noise import PARTS, given_noise
from pqk.families.diffusiondet.sampling.sampler import Sampling, Step, detect, sample
from pqk.families.diffusiondet.sampling.schedule import time_pairs
from pqk.families.diffusiondet.sampling.selection import Detections
from pqk.families.diffusiondet.vectors.common import NETWORK_MARK, drawn_weights, network_of, tensor
from pqk.families.diffusiondet.vectors.parts import detections
from pqk.families.official import read_pickle
from pqk.families.tape import Tape
from pqk.families.vectors import Case, Compared, NotHandled, compare, compare_keys, compare_probes

CORNER_NAME = "mid_p2_corner"
OUTLIERS = 0.01
"""Share of boxes of the full-size case that may differ: of a few, the level or the order is a matter of rounding."""
PLAIN, TRAINING, BACKBONE = "model_only.pth", "model_final.pth", "R-50-tiny.pkl"


def keys(case: Case) -> Iterator[Compared]:
    """Names and shapes of the weights of the released COCO model."""
    yield from compare_keys(case, empty_model("diffusiondet", NAMED["diffusiondet-r50"]).state_dict(keep_vars=True))


def model(case: Case) -> Iterator[Compared]:
    """Whole inference of a small network whose weights are given: every step, and the detections."""
    net = network_of(case).eval()
    yield compare("n_params", sum(weight.numel() for weight in net.parameters()), case.need("n_params"))
    images = [tensor(case, name) for name in sorted(case.names("in_image"))]
    noise = {part: tensor(case, f"in_noise_{part}") for part in PARTS if f"in_noise_{part}" in case}
    how = Sampling.of(net.sizes, steps=case.need("sample_step"))
    yield compare("times", [t for t, _ in time_pairs(how.steps)] + [-1], case.need("times"))
    with torch.inference_mode():
        maps, runs, tape = _run(net, images, noise, how)
        yield from _maps(case, maps)
        for index in range(how.steps):
            yield from _step(case, index, [run[index] for run in runs], tape.calls("head")[index :: how.steps])
        for image, run in enumerate(runs):
            yield from detections(case, f"out_nms_{{}}{image}", detect(iter(run), how))
    final = net.predict(images, steps=how.steps, noise=noise, output_sizes=[tuple(s) for s in case.need("output_hw")])
    for image, found in enumerate(final):
        for field, value in found.items():
            yield case.check(f"out_final_{field}{image}", value, NETWORK_MARK)
    kept = [int(run.keep.sum()) for run in runs[0]]
    yield compare("kept_per_step", kept, case.need("kept_per_step"))


def full(case: Case) -> Iterator[Compared]:
    """The released architecture with weights from the seed rule: 0.5 GB of weights."""
    config = case.need("config")
    if config.get("official") != "res50 COCO":
        raise NotHandled(f"the configuration {config}")
    rest = {key: value for key, value in config.items() if key != "official"}
    net = empty_model("diffusiondet", {**NAMED["diffusiondet-r50"], **rest})
    yield compare("n_params", sum(weight.numel() for weight in net.parameters()), case.need("n_params"))
    weights = drawn_weights(case, net.state_dict())
    yield from compare_probes(case, weights)
    assert isinstance(net, DiffusionDet)
    net.load_state_dict(weights, strict=False, assign=True)
    how = Sampling.of(net.eval().sizes)
    with torch.inference_mode():
        maps, (run,), tape = _run(net, [tensor(case, "in_image")], {"init": tensor(case, "in_noise_init")}, how)
        yield from _maps(case, maps)
        step = run[0]
        yield _most(case, "out_step0.logits", step.logits[None])
        yield _most(case, "out_step0.boxes", step.boxes[None])
        yield _most(case, "mid_step0.stage_boxes", tape.calls("head")[0][1][:-1])
        yield from _most_detections(case, detect(iter(run), how))


def checkpoint(case: Case) -> Iterator[Compared]:
    """A published file, a training file with a moving average, and a backbone to start from."""
    config = case.need("config")
    given = {"nheads": config["nheads"], "num_proposals": config["num_proposals"]}
    plain, training = (load_model(case.path / name, **given) for name in (PLAIN, TRAINING))
    inferred, weights = averaged(read_pickle(case.path / TRAINING))
    average = build_model("diffusiondet", {**inferred, **given}, weights).eval()
    for tag, net in (("model", plain), ("model", training), ("ema", average)):
        wanted = {key: value for key, value in config.items() if key in net.config}
        yield compare("config", [net.config[key] for key in wanted if key != "blocks"], list(wanted.values()))
        yield from _detected(case, net, tag)
    state = plain.state_dict()
    backbone = read_backbone(case.path / BACKBONE)
    expected = {key for key in state if key.startswith("backbone.bottom_up.")}
    yield Compared("names of the backbone", math.inf if expected ^ set(backbone) else 0.0, 0.0)
    for key, value in backbone.items():
        yield compare(key, value, state[key], 0.0)
    plain.load_state_dict(backbone, strict=False)
    with torch.inference_mode():
        batch, _ = padded([tensor(case, "in_image")])
        yield case.check("out_backbone_p5", plain.backbone(batch)[-1], NETWORK_MARK)


def _detected(case: Case, net: DiffusionDet, tag: str) -> Iterator[Compared]:
    how = Sampling.of(net.sizes, steps=case.need("sample_step"))
    with torch.inference_mode():
        _, (run,), _ = _run(net, [tensor(case, "in_image")], {"init": tensor(case, "in_noise_init")}, how)
        yield case.check(f"out_logits@{tag}", run[-1].logits[None], NETWORK_MARK)
        yield case.check(f"out_boxes@{tag}", run[-1].boxes[None], NETWORK_MARK)
        yield from detections(case, f"out_nms_{{}}@{tag}", detect(iter(run), how))


def _run(
    net: DiffusionDet, images: list[Tensor], noise: Mapping[str, Tensor], how: Sampling
) -> tuple[list[Tensor], list[list[Step]], Tape]:
    """Returns the maps, the steps of each image, and what the head gave for each image and step."""
    batch, whwh = padded(images)
    maps = net.backbone(batch)
    runs = []
    with Tape(net) as tape:
        for index, source in enumerate(given_noise(noise, len(images), how.proposals)):
            call = net.head_call([map_[index : index + 1] for map_ in maps], whwh[index])
            runs.append(list(sample(call, whwh[index], source, how)))
    return maps, runs, tape


def _maps(case: Case, maps: list[Tensor]) -> Iterator[Compared]:
    for name, map_ in zip(MAPS, maps, strict=True):
        if f"mid_{name}" in case:
            yield case.check(f"mid_{name}", map_, NETWORK_MARK)
    if CORNER_NAME in case:
        height, width = case[CORNER_NAME].shape[-2:]
        yield case.check(CORNER_NAME, maps[0][..., :height, :width], NETWORK_MARK)


def _step(case: Case, index: int, steps: list[Step], stages: list[tuple[Tensor, ...]]) -> Iterator[Compared]:
    """Compares one pair of times; steps, stages: of each image."""
    found: dict[str, list[Any]] = {
        f"out_step{index}.logits": [step.logits for step in steps],
        f"out_step{index}.boxes": [step.boxes for step in steps],
        f"out_step{index}.x_start": [step.x0 for step in steps],
        f"out_step{index}.pred_noise": [step.noise for step in steps],
        f"out_step{index}.img_next": [step.x_next for step in steps],
    }
    for name, values in found.items():
        if name in case:
            yield case.check(name, torch.stack(values), NETWORK_MARK)
    yield case.check(f"mid_step{index}.keep", steps[0].keep)  # that of the first image
    for place, what in enumerate(("logits", "boxes")):
        name = f"mid_step{index}.stage_{what}"
        if name in case:
            before = torch.cat([of_image[place][:-1] for of_image in stages], dim=1)
            yield case.check(name, before, NETWORK_MARK)


def _most(case: Case, name: str, found: Tensor) -> Compared:
    """Compares all rows, a value or the values of a box each, but the share of OUTLIERS that differ the most."""
    got, want = found.numpy(), case[name]
    if got.shape != want.shape:
        return compare(name, got, want, NETWORK_MARK)
    apart = np.abs(got.astype(np.float64) - want) / np.abs(want).max()
    rows = apart if apart.ndim == 1 else apart.max(axis=-1)
    mark = 0.0 if want.dtype.kind == "i" else NETWORK_MARK
    return Compared(f"{name} (99 %)", float(np.quantile(rows, 1 - OUTLIERS, method="lower")), mark)


def _most_detections(case: Case, found: Detections) -> Iterator[Compared]:
    """Compares each detection with the nearest found one of its label, but the share of OUTLIERS that differ the most.

    Two of almost one score may stand in either order, which the number of threads decides.
    """
    boxes, scores, labels = (case[f"out_nms_{field}"] for field in found._fields)
    yield compare("number of detections", len(found.scores), len(scores))
    apart = np.abs(found.boxes.numpy().astype(np.float64)[None] - boxes[:, None]).max(axis=-1) / np.abs(boxes).max()
    apart = np.where(found.labels.numpy()[None] == labels[:, None], apart, np.inf)
    nearest = apart.argmin(axis=1)
    off = np.abs(found.scores.numpy().astype(np.float64)[nearest] - scores) / np.abs(scores).max()
    for name, rows in (("boxes and labels", apart.min(axis=1)), ("scores", off)):
        worst = float(np.quantile(rows, 1 - OUTLIERS, method="lower"))
        yield Compared(f"out_nms {name} (99 %)", worst, NETWORK_MARK)


KINDS = {
    "diffusiondet_keys": keys,
    "diffusiondet_model": model,
    "diffusiondet_full": full,
    "diffusiondet_ckpt": checkpoint,
}
