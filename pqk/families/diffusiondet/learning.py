"""Teaches the detector (a `LearningPart`): images with boxes, with the losses of a set of boxes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.families.contract import Join
from pqk.families.detection.batches import Images, generator
from pqk.families.detection.inputs import padded
from pqk.families.detection.learning import REMEDY as REMEDY
from pqk.families.detection.learning import SOURCE as SOURCE
from pqk.families.detection.learning import UNIT as UNIT
from pqk.families.detection.learning import Scored, check_classes, evidence, taught
from pqk.families.detection.learning import as_exported as as_exported
from pqk.families.detection.learning import batches as batches
from pqk.families.detection.learning import compiled as compiled
from pqk.families.detection.learning import complete as complete
from pqk.families.detection.learning import floor as floor
from pqk.families.detection.learning import samples as samples
from pqk.families.detection.learning import share as share
from pqk.families.diffusiondet.graphs import label_state, parts_of
from pqk.families.diffusiondet.network.boxes import from_signal, giou, to_centres
from pqk.families.diffusiondet.network.configs import DiffusionDetConfig, read_config
from pqk.families.diffusiondet.predict import MOST
from pqk.families.diffusiondet.sampling import labels as states
from pqk.families.diffusiondet.sampling import schedule
from pqk.families.diffusiondet.sampling.noise import DrawnNoise
from pqk.families.diffusiondet.sampling.sampler import HeadCall, Sampling, sample
from pqk.families.diffusiondet.sampling.selection import Detections, rescale, select, suppress
from pqk.families.diffusiondet.training import targets as starts
from pqk.families.diffusiondet.training.distill import (
    End,
    Terms,
    chosen_boxes,
    class_distance,
    consistency_terms,
    distill_terms,
)
from pqk.families.diffusiondet.training.losses import (
    BOX_WEIGHT,
    GIOU_WEIGHT,
    LabelStates,
    LossOptions,
    corner_distance,
    set_losses,
)
from pqk.families.layers import initialize
from pqk.families.losses import feature_loss
from pqk.settings.distill import Watched

SAMPLER = "sampler"
TERMS = ("task", "kl", "features", "imitation", "probe", SAMPLER)

LAST_TIME = schedule.TIMES - 1
TAUGHT = 50
"""Boxes of an image, the Teacher's best ones, that a student is compared on."""


def parts(model: Any) -> dict[str, nn.Module]:
    """Returns the modules of both graphs, which share the model's weights and take any size."""
    return parts_of(model, training=True)


def forward(parts: Mapping[str, Any], batch: Images, watched: Any = None) -> dict[str, Any]:
    """Returns the outputs for B images: logits (S, B, N, K), boxes (S, B, N, 4) of all stages, or of the last one where
    the part gives no other, and what they began with.

    Held-out images, and all where `watched.start` says so, begin with noise alone at the last time, others with the
    truth and the noise of a drawn time. watched: the maps are kept under 'features'; or a `Watched`: of each image is
    kept under 'sampler', which is all that a Teacher returns, what its kind says: the steps of a sampler without fresh
    noise, or the head, to be called on boxes at a time.
    """
    sizes: DiffusionDetConfig = parts["head"].sizes
    check_classes(batch, sizes.stage.classes)
    images, whwh = padded(batch.images(), batch.least)
    maps = parts["backbone"](images)
    kept: dict[str, Any] = {}
    noisy = batch.held or not batch.truthful
    if isinstance(watched, Watched):
        kept, noisy = _watched(watched, parts["head"], maps, batch, whwh), noisy or watched.start == "noise"
        if not torch.is_grad_enabled():
            return {**kept, "whwh": whwh}
    elif watched is not None:
        kept = {"features": {f"p{level + 2}": each for level, each in enumerate(maps)}}
    start = _from_noise if noisy else _from_truth
    boxes, t, given, labels = start(batch, whwh, sizes)
    logits, refined, *rest = staged(parts["head"](*fed(sizes, maps, boxes, t, given, whwh)))
    return {
        "logits": logits,
        "boxes": refined,
        "quality": rest[0] if rest else None,
        "whwh": whwh,
        "sizes": sizes,
        "labels": labels,
        **kept,
    }


class Calls(NamedTuple):
    """What a loss needs that calls the head itself: the head of each image, the B images, and their sizes (B, 4).

    join: puts values (B, ...) among those of all images, where other processes have the others.
    """

    heads: list[HeadCall]
    images: Images
    whwh: Tensor
    join: Join | None = None


def joined(out: Mapping[str, Any], join: Join) -> dict[str, Any]:
    """Returns the outputs for the whole batch; see `LearningPart`. A loss calls the head for own images alone."""
    found = {**out, "whwh": join(out["whwh"])}
    for name in ("logits", "boxes", "quality"):
        if out.get(name) is not None:
            found[name] = join(out[name], 1)
    if out.get("labels") is not None:
        found["labels"] = LabelStates(*(join(each) for each in out["labels"]))
    if "features" in out:
        found["features"] = {name: join(each) for name, each in out["features"].items()}
    if isinstance(out.get(SAMPLER), Calls):
        found[SAMPLER] = out[SAMPLER]._replace(join=join)
    elif SAMPLER in out:
        found[SAMPLER] = _joined_steps(out[SAMPLER], join)
    return found


def _joined_steps(images: Sequence[Sequence[End]], join: Join) -> list[list[End]]:
    """Returns the steps of each image of the whole batch from those of some; all have as many."""
    steps = [
        End(*(join(torch.stack(values)) for values in zip(*one, strict=True))) for one in zip(*images, strict=True)
    ]
    return [[End(step.logits[n], step.boxes[n]) for step in steps] for n in range(len(steps[0].logits))]


def _watched(
    watched: Watched, head: Any, maps: Sequence[Tensor], batch: Images, whwh: Tensor
) -> dict[str, Calls | list[list[End]]]:
    """Returns what is kept for a loss of samplers; see `forward`."""
    if not watched.steps:
        return {}
    calls = Calls(_heads(head, maps, whwh), batch, whwh)
    return {SAMPLER: calls if watched.kind == "consistency" else _sampled(calls, head.sizes, watched.steps)}


def _heads(head: Any, maps: Sequence[Tensor], whwh: Tensor) -> list[HeadCall]:
    """Returns the head as a function of each image: boxes, a time and class states -> what its last stage finds."""

    def called(rows: Sequence[Tensor], size: Tensor, boxes: Tensor, t: int, labels: Tensor | None) -> Any:
        at, given = torch.full((1,), t, device=boxes.device), None if labels is None else labels[None]
        found = staged(head(*fed(head.sizes, rows, boxes[None], at, given, size[None])))
        return tuple(each[-1, 0] for each in found)

    rows = ([each[number : number + 1] for each in maps] for number in range(len(whwh)))
    return [partial(called, own, size) for own, size in zip(rows, whwh, strict=True)]


def _sampled(calls: Calls, sizes: DiffusionDetConfig, steps: int) -> list[list[End]]:
    """Returns the steps of a deterministic sampler from each image's noise, without renewal: box n stays box n."""
    how = replace(Sampling.of(sizes, steps), eta=0.0, renewal=None, ensemble=False)
    seeds = (generator(calls.images, number).initial_seed() for number in range(len(calls.whwh)))
    noises = (DrawnNoise(sizes.proposals, 0, seed) for seed in seeds)
    each = zip(calls.heads, calls.whwh, noises, strict=True)
    return [[End(step.logits, step.boxes) for step in sample(*one, how)] for one in each]


def staged(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the outputs of the head with stages as the first axis, also where there is the last one alone."""
    return tuple(outputs) if outputs[0].ndim == 4 else tuple(each[None] for each in outputs)


def fed(
    sizes: DiffusionDetConfig, maps: Sequence[Tensor], boxes: Tensor, t: Tensor, labels: Tensor | None, whwh: Tensor
) -> list[Tensor]:
    """Returns the inputs of the head's graph in their order. labels: None where all classes are masked."""
    given = [*maps, boxes, t]
    if label_state(sizes) is not None:
        if labels is None:
            labels = torch.full(boxes.shape[:2], sizes.stage.classes, device=boxes.device)
            if sizes.label_state == "dist":
                labels = F.one_hot(labels, sizes.stage.classes + 1)
        given.append(labels.float())
    if sizes.stage.geometry:
        given.append(whwh)
    return given


Starting = tuple[Tensor, Tensor, Tensor | None, LabelStates | None]


def _from_noise(batch: Images, whwh: Tensor, sizes: DiffusionDetConfig) -> Starting:
    """Returns boxes that begin with noise alone, at the last time, with all classes masked."""
    std = whwh.new_tensor(sizes.noise_std)
    rows = [torch.randn(sizes.proposals, 4, generator=generator(batch, n)).to(whwh) * std for n in range(len(whwh))]
    boxes = torch.stack([from_signal(x, size, sizes.scale) for x, size in zip(rows, whwh, strict=True)])
    return boxes.float(), torch.full((len(whwh),), LAST_TIME, device=whwh.device), None, None


def _from_truth(batch: Images, whwh: Tensor, sizes: DiffusionDetConfig) -> Starting:
    """Returns the truth with noise among boxes of nothing (`training.targets`), the times, and the class states."""
    noisy, times, clean, uniform = [], [], [], []
    for number, (target, size) in enumerate(zip(batch.targets(), whwh, strict=True)):
        random = generator(batch, number)
        drawn = starts.draw(sizes.proposals, len(target["labels"]), random)
        noisy.append(starts.noisy_boxes(to_centres(target["boxes"] / size), drawn, sizes.scale, sizes.noise_std))
        times.append(drawn.t.reshape(()))
        mask = target["labels"].new_full((1,), sizes.stage.classes)
        clean.append(torch.cat((target["labels"], mask))[noisy[-1].chosen])
        uniform.append(torch.rand(sizes.proposals, generator=random))
    t = torch.stack(times).to(whwh.device)
    boxes = torch.stack([starts.start_boxes(one, size, sizes.scale) for one, size in zip(noisy, whwh, strict=True)])
    if label_state(sizes) is None:
        return boxes, t, None, None
    y0 = torch.stack(clean)
    at = t[:, None].expand_as(y0)
    if sizes.label_state == "dist":
        return boxes, t, states.corrupted_distribution(y0, at, sizes.stage.classes, sizes.label_schedule), None
    y = states.corrupt(y0, at, torch.stack(uniform).to(y0.device), sizes.stage.classes, sizes.label_schedule)
    return boxes, t, y, LabelStates(y, t)


def losses(
    out: Mapping[str, Any],
    batch: Images,
    teacher: Mapping[str, Any] | None,
    terms: Collection[str],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Returns the losses that are asked for; see `LearningPart`.

    task: the sum of `set_losses`. kl: of all stages, the cross-entropy with the Teacher's classes, softened, of its
    best boxes. imitation: classes and boxes of the last stage.
    """
    found: dict[str, Tensor] = {}
    with torch.autocast(out["logits"].device.type, enabled=False):
        if "task" in terms:
            sized = [{**one, "whwh": size} for one, size in zip(batch.targets(), out["whwh"], strict=True)]
            parts = set_losses(
                out["logits"], out["boxes"], sized, LossOptions.of(out["sizes"]), out["quality"], out["labels"]
            )
            found["task"] = torch.stack(list(parts.values())).sum()
        if "kl" in terms:
            assert teacher is not None
            found["kl"] = softened(out, teacher, options["temperature"])
        if "imitation" in terms:
            assert teacher is not None
            found["imitation"] = torch.stack(apart(out, teacher)).mean()
        if "probe" in terms:
            found["probe"] = probe(out)
        if SAMPLER in terms:
            assert teacher is not None
            asked = options[SAMPLER]
            apart_of = _inconsistent if asked.get("kind") == "consistency" else _few_steps
            found[SAMPLER] = apart_of(out, teacher, asked)
    if "features" in terms:
        assert teacher is not None
        found["features"] = feature_loss(teacher["features"], out["features"], options["bridges"])
    return found


def _few_steps(out: Mapping[str, Any], teacher: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
    """Returns how far the student's steps are from the Teacher's at the same times, mean over images; see `distill`."""
    ends = zip(out[SAMPLER], teacher[SAMPLER], out["whwh"], strict=True)
    return _mean(_values([distill_terms(mine, theirs, whwh, options["best"]) for mine, theirs, whwh in ends]), options)


def _inconsistent(out: Mapping[str, Any], teacher: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
    """Returns how far the student at a time is from itself at the next one of the Teacher's, mean over images.

    Its own values there have no gradient and no average over the training (Song and Dhariwal 2023, section 3.2).
    """
    sizes: DiffusionDetConfig = out["sizes"]
    heads, batch, sides, join = out[SAMPLER]
    pairs = schedule.time_pairs(options["teacher_steps"])[:-1]  # the last one leads to no time
    found = []
    for number, (mine, theirs, whwh) in enumerate(zip(heads, teacher[SAMPLER].heads, sides, strict=True)):
        random = generator(batch, number)
        truths = to_centres(batch.targets()[number]["boxes"] / whwh) if batch.truthful else whwh.new_zeros(0, 4)
        drawn = starts.draw(sizes.proposals, len(truths), random)
        pair = pairs[int(torch.randint(len(pairs), (), generator=random))]
        x0 = starts.noisy_boxes(truths, drawn, sizes.scale).x0
        noise = drawn.noise.to(x0) * x0.new_tensor(sizes.noise_std)
        found.append(consistency_terms(mine, mine, theirs, x0, noise, pair, whwh, sizes.scale, options["best"])[0])
    values = _values(found)
    return _mean(values if join is None else join(values), options)


def _values(found: Sequence[Terms]) -> Tensor:
    """Returns the terms of B images as (B, 2)."""
    return torch.stack([torch.stack((one.classes, one.boxes)) for one in found])


def _mean(values: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Returns the mean over images of the weighted terms (B, 2)."""
    return (options["classes"] * values[:, 0] + options["boxes"] * values[:, 1]).mean()


def softened(out: Mapping[str, Any], teacher: Mapping[str, Any], temperature: float) -> Tensor:
    """Returns KL(Teacher || student) of the classes at a temperature, times its square, summed over classes: a scalar.

    Mean over the Teacher's best boxes of the last stage. Both began with the same noise, so box n of one is box n of
    the other (Hinton et al. 2015, section 2, for independent classes).
    """
    mine, theirs = out["logits"][-1].float(), teacher["logits"][-1].detach().float()
    found = []
    for image in range(len(mine)):
        index = chosen_boxes(theirs[image], teacher["boxes"][-1][image], TAUGHT)
        wanted = (theirs[image][index] / temperature).sigmoid()
        ours = mine[image][index] / temperature
        entropy = F.binary_cross_entropy_with_logits(theirs[image][index] / temperature, wanted, reduction="none")
        crossed = F.binary_cross_entropy_with_logits(ours, wanted, reduction="none")
        found.append((crossed - entropy).sum(dim=1).mean() * temperature**2)
    return torch.stack(found).mean()


def apart(out: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[Tensor]:
    """Returns how far the last stage of each image is from the Teacher's: classes, corners and overlap of its best
    boxes, weighted as in the task.
    """
    found = []
    ends = zip(
        out["logits"][-1].float(), out["boxes"][-1], teacher["logits"][-1].float(), teacher["boxes"][-1], out["whwh"],
        strict=True,
    )  # fmt: skip
    for mine, ours, wanted, theirs, whwh in ends:
        index = chosen_boxes(wanted, theirs, TAUGHT)
        box, aim = ours[index], theirs[index].detach()
        placed = BOX_WEIGHT * corner_distance(box, aim, whwh) + GIOU_WEIGHT * (1 - giou(box, aim))
        found.append(class_distance(mine, wanted, index) + placed.mean())
    return found


def probe(out: Mapping[str, Any]) -> Tensor:
    """Returns scores and relative corners of the last stage, projected on random signs: a scalar.

    The squared gradient of it by a weight is on average how far the weight moves the outputs (Hutchinson 1990). The
    signs are always the same.
    """
    signs = torch.Generator().manual_seed(0)
    total = torch.zeros((), device=out["logits"].device)
    for values in (out["logits"][-1].float().sigmoid(), out["boxes"][-1] / out["whwh"][:, None]):
        drawn = torch.randint(2, values.shape, generator=signs).to(values) * 2 - 1
        total = total + (drawn * values).sum() / values.numel() ** 0.5
    return total


def features(teacher: Any, student: Any, seed: int) -> tuple[Any, Any, nn.ModuleDict]:
    """Returns that the maps are watched in both, and 1x1 convolutions, weights from the seed, where widths differ."""
    bridges = nn.ModuleDict()
    mine, theirs = student.sizes.backbone.out, teacher.sizes.backbone.out
    if mine != theirs:
        for level in range(2, 6):
            bridges[f"p{level}"] = nn.Conv2d(mine, theirs, 1)
    initialize(bridges, torch.Generator().manual_seed(seed))
    return True, True, bridges


def as_truth(batch: Images, out: Mapping[str, Any], config: Mapping[str, Any]) -> Images:
    """Returns the images with the Teacher's sure detections as their truth."""
    return taught(batch, _arrays(out, batch), out["logits"].shape[-1])


def detections(out: Mapping[str, Any], batch: Images) -> list[Detections]:
    """Returns what the last stage finds in each image, in pixels of it: the best `MOST`, the best first."""
    found = []
    for logits, boxes, one in zip(out["logits"][-1].float(), out["boxes"][-1], batch.pictures, strict=True):
        chosen = suppress(select(logits.sigmoid(), boxes.float(), len(boxes)))
        size = (one.image.shape[0], one.image.shape[1])
        found.append(rescale(chosen, size, size).of(slice(MOST)))
    return found


def shift(out: Mapping[str, Any], uncut: Mapping[str, Any], batch: Images) -> float:
    """Returns how far the outputs of a cut network are from those of the uncut one.

    The mean over boxes of the L1 distance of corners, relative to the image, plus that of the scores.
    """
    placed = corner_distance(out["boxes"][-1], uncut["boxes"][-1], out["whwh"][:, None]).mean()
    scored = (out["logits"][-1].float().sigmoid() - uncut["logits"][-1].float().sigmoid()).abs().sum(dim=-1).mean()
    return float(placed + scored)


def distance(out: Mapping[str, Any], teacher: Mapping[str, Any], options: Mapping[str, Any]) -> list[float]:
    """Returns the loss 'imitation' of each image by itself."""
    return [float(value) for value in apart(out, teacher)]


def same_network(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations describe one network, however completely each is written and its norms are trained."""
    first, second = (read_config({**config, "norm": "frozen"}) for config in (one, other))
    return first == second


def score(out: Mapping[str, Any], batch: Images) -> Scored:
    """Returns the evidence of each image; see `complete`."""
    return evidence(_arrays(out, batch), batch)


def _arrays(out: Mapping[str, Any], batch: Images) -> list[dict[str, np.ndarray]]:
    found = (each._asdict() for each in detections(out, batch))
    return [{name: values.detach().cpu().numpy() for name, values in each.items()} for each in found]
