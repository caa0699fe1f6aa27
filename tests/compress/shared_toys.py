"""Trains toys with several methods, in one process or as one of several: `python shared_toys.py FOLDER NAME ...`.

The first process keeps the weights, the losses of all steps and the history of each in FOLDER/NAME.pt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pqk.compress.distill import distill
from pqk.compress.finetune import finetune
from pqk.compress.qat import qat
from pqk.compress.train.data import TrainingData
from pqk.compress.train.fit import Fitted
from pqk.compress.train.loop import world
from pqk.errors import PqkError
from pqk.families.registry import family
from pqk.families.vectors import Case
from pqk.models import build_model
from pqk.settings.distill import load_distill
from pqk.settings.prune import load_prune
from pqk.settings.training import Rounded

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "families"))
from diffusiondet_toys import TINY
from test_detr import TINY as DETR

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
POINTS = {
    "head_type": "linear",
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "dec_embed_dim": 32,
    "dec_depth": 2,
    "dec_num_heads": 2,
}
NARROW = {**POINTS, "enc_embed_dim": 16, "dec_embed_dim": 16, "dec_depth": 1}
LAST_ALONE = {"loss.beta_start": 0.0, "loss.beta_end": 0.0, "loss.gamma": 0.0}
TRAIN = {
    "stages": [{"size": 32, "batch": 3, "until": 0.5}, {"size": 48, "batch": 2, "until": 1.0}],
    "epochs": 2,
    "steps_per_epoch": 3,
    "learning_rate": 2e-3,
    "ema": 0.9,
    "min_covisible": 0.0,
    "validation": {"size": 32, "pairs": 2},
}


def points(seed: int, config: dict[str, Any]) -> Any:
    # other weights in every process: those of the first one count
    return build_model("dust3r", config, generator=torch.Generator().manual_seed(seed)).eval()


def pruned(scratch: Path, report: Any) -> Fitted:
    """Fine-tunes; the batch of 3 pairs is shared unequally."""
    spec = load_prune(CONFIGS / "prune.yaml", {"train": TRAIN})
    mine, data = points(1 + world()[0], POINTS), TrainingData(family("dust3r"))
    return finetune(mine, points(0, POINTS), spec, data, seed=0, scratch=scratch, device="cpu", report=report)


def distilled(scratch: Path, report: Any, batch: int = 3) -> Fitted:
    """Distils, with features through bridges."""
    train = {**TRAIN, "stages": [{"size": 32, "batch": batch, "until": 1.0}]}
    spec = load_distill(CONFIGS / "distill.yaml", {"train": train, "loss.gamma": 0.1})
    mine, data = points(1 + world()[0], NARROW), TrainingData(family("dust3r"))
    return distill(points(0, POINTS), mine, spec, data, seed=0, scratch=scratch, device="cpu", report=report)


def too_small(scratch: Path, report: Any) -> Fitted:
    """Cannot share its batch."""
    return distilled(scratch, report, 1)


def quantized(scratch: Path, report: Any) -> Fitted:
    """Trains both graphs with quantizers, for two steps.

    Rounding makes steps of int8 out of the last bit of a sum: in one process, six steps from weights that were changed
    by their last bit ended with losses that differed by 4 %.
    """
    from test_qat import prepared

    teacher = points(0, POINTS)
    with torch.no_grad():  # depths around e - 1, as of a trained model
        for head in (teacher.downstream_head1, teacher.downstream_head2):
            head.proj.bias[2 * 256 : 3 * 256] = 1.0
    scratch.mkdir(parents=True, exist_ok=True)
    graphs = scratch / f"graphs{world()[0]}"
    graphs.mkdir()
    spec = Rounded.model_validate({**TRAIN, "learning_rate": 1e-3, "task_weight": 0.1, "steps_per_epoch": 1})
    data = TrainingData(family("dust3r"))
    return qat(prepared("nncf", teacher, graphs), teacher, spec, data, seed=0, scratch=scratch, report=report)


def of_family(name: str, config: dict[str, Any], scratch: Path, report: Any, **asked: Any) -> Fitted:
    """Distils a model of a family, on what its generated samples are padded to; asked: of distill.yaml."""
    train = {**TRAIN, "epochs": 1, "stages": [{"size": 64, "batch": 3, "until": 1.0}]}
    train |= {"validation": {"size": 64, "pairs": 2}, **asked.pop("train", {})}
    spec = load_distill(CONFIGS / "distill.yaml", {"train": train, **asked})
    teacher, mine = (
        build_model(name, config, generator=torch.Generator().manual_seed(seed)).eval() for seed in (0, 1 + world()[0])
    )
    data = TrainingData(family(name))
    return distill(teacher, mine, spec, data, seed=0, scratch=scratch, device="cpu", report=report)


def detector(scratch: Path, report: Any) -> Fitted:
    """Distils a detector, with features, on images that are padded to the largest of the batch."""
    return of_family("diffusiondet", TINY, scratch, report, **{"loss.gamma": 0.1})


def few_steps(scratch: Path, report: Any) -> Fitted:
    """Teaches a sampler of one step two steps of another; its norms learn the statistics of the whole batch.

    Slowly: such norms of few pixels make much of the last bit of a sum, 0.1 % of a loss in five steps at a usual rate.
    """
    asked: dict[str, Any] = {"sampler": {"teacher_steps": 2, "best": 5}, "train": {"learning_rate": 1e-4}}
    return of_family("diffusiondet", {**TINY, "norm": "batch"}, scratch, report, **LAST_ALONE, **asked)


def consistent(scratch: Path, report: Any) -> Fitted:
    """Teaches a detector to find the same from two times of a sampler."""
    sampler = {"kind": "consistency", "teacher_steps": 4, "best": 5}
    return of_family("diffusiondet", TINY, scratch, report, **LAST_ALONE, sampler=sampler)


def frames(scratch: Path, report: Any) -> Fitted:
    """Distils a network of frames, with features."""
    config = Case(GOLDEN / "vggt_conv_s2_56x70").need("config")
    train = {"stages": [{"size": 56, "batch": 2, "until": 1.0}], "validation": {"size": 56, "pairs": 2}}
    return of_family("vggt", config, scratch, report, train=train, **{"loss.gamma": 0.1})


def detr(scratch: Path, report: Any) -> Fitted:
    """Distils a detector of the library's, without dropout, which draws other numbers in every process."""
    asked: dict[str, Any] = {"train": {"learning_rate": 1e-4}}  # as in few_steps
    return of_family("detr", {**DETR, "backbone_norm": "batch"}, scratch, report, **asked)


METHODS: dict[str, Callable[[Path, Any], Fitted]] = {
    one.__name__: one
    for one in (pruned, distilled, too_small, quantized, detector, few_steps, consistent, frames, detr)
}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        losses: list[float] = []

        def report(progress: Any, kept: list[float] = losses) -> None:
            if len(kept) < progress.step:
                kept.append(progress.loss)

        try:
            done = METHODS[name](folder / name, report)
        except PqkError as error:
            print(json.dumps({"refused": str(error)}))
            continue
        scores = [entry["score"] for entry in done.history]
        kept = {"last": done.last, "losses": losses, "scores": scores, "rank": world()[0]}
        torch.save(kept, folder / f"{name}-{world()[0]}.pt")


if __name__ == "__main__":
    main()
