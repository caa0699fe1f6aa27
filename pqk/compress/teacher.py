"""`pqk train teacher`: DUSt3R's supervised training on rendered pairs, and the folder that is shipped."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.compress.losses import confidence_loss
from pqk.compress.train import Progress, Schedule, Trainer, world
from pqk.data.seeds import split_seed
from pqk.data.stream import PairBatch, training_pairs
from pqk.data.synthetic import texture_bank
from pqk.errors import PqkError, nearest
from pqk.files import sha256_file, sha256_json, write_json
from pqk.models import build_model
from pqk.models.configs import NAMED
from pqk.spec.training import TrainSpec


class SymmetricPairs(nn.Module):
    """Both orders of each pair from one encoding per image: images (B,2,3,H,W) -> outputs for 2B samples."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = images.shape[-2:]
        tokens = self.model.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        a, b = tokens[:, 0], tokens[:, 1]
        return self.model.decode(torch.cat([a, b]), torch.cat([b, a]), (height, width), (height, width))


def depth_scores(pred_z: torch.Tensor, gt_z: torch.Tensor, valid: torch.Tensor) -> dict[str, float]:
    """Mean AbsRel and delta1 over samples (B,H,W) after median scaling per sample (Eigen 2014, Zhou 2017)."""
    absrel, delta = [], []
    for pred, gt, mask in zip(pred_z.float(), gt_z.float(), valid, strict=True):
        if not bool(mask.any()):
            continue
        p, g = pred[mask], gt[mask]
        p = (p * (g.median() / p.median())).clamp(min=1e-6)
        absrel.append(((p - g).abs() / g).mean())
        delta.append((torch.maximum(p / g, g / p) < 1.25).float().mean())
    if not absrel:
        raise PqkError("no validation pair has a valid pixel; lower min_covisible")
    return {"absrel": float(torch.stack(absrel).mean()), "delta1": float(torch.stack(delta).mean())}


def validation_scores(model: nn.Module, spec: TrainSpec, device: torch.device, autocast: bool) -> dict[str, float]:
    """AbsRel and delta1 of view 1 on the held-out pairs, both orders, and of a constant depth on the same pixels."""
    bank = texture_bank().to(device)
    symmetric = SymmetricPairs(model).eval()
    wanted, size, totals, count = spec.validation.pairs, spec.validation.size, {}, 0
    while count < wanted:
        n = min(8, wanted - count)
        pairs = training_pairs(n, size, split_seed("validation", spec.seed, count), bank, **_scene_options(spec))
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            out = symmetric(pairs.images)
        gt1, _, valid1, _ = pairs.ordered()
        scores = depth_scores(out["pts3d_1"][..., 2], gt1[..., 2], valid1)
        flat = depth_scores(torch.ones_like(gt1[..., 2]), gt1[..., 2], valid1)
        for key, value in {**scores, **{f"constant_{k}": v for k, v in flat.items()}}.items():
            totals[key] = totals.get(key, 0.0) + value * n
        count += n
    means = {k: v / count for k, v in totals.items()}
    return {"score": means["absrel"], **means}


def _scene_options(spec: TrainSpec) -> dict[str, Any]:
    return {"spread": spec.spread_deg, "fov": spec.fov_deg, "min_covisible": spec.min_covisible}


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one. Raises PqkError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PqkError("device 'cuda' was asked for, but torch sees no CUDA device; use --device cpu")
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(name)


def train_teacher(
    spec: TrainSpec,
    out: Path,
    *,
    device: str = "auto",
    minutes: float | None = None,
    pause_after_s: float | None = None,
    autocast: bool | None = None,
    compiled: bool = False,
    fresh: bool = False,
    report: Callable[[Progress], None] | None = None,
    command: str = "pqk train teacher",
) -> tuple[str, Progress]:
    """Train and write `out`/{config.json, model.safetensors (float16, averaged weights), model_card.json}.

    Resumes from `out`/checkpoint.pt when it belongs to the same spec. bf16 autocast is on for CUDA and off for a CPU,
    where torch's bf16 backward is several times slower than float32. Returns the outcome and the last progress.
    """
    where = pick_device(device)
    rank, processes = world()
    if processes > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    autocast = where.type == "cuda" if autocast is None else autocast
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    if spec.model not in NAMED:
        raise PqkError(f"unknown model {spec.model!r}{nearest(spec.model, NAMED)}; known: {', '.join(NAMED)}")
    config = NAMED[spec.model]
    torch.manual_seed(spec.seed)
    model = build_model("dust3r", config)
    schedule = Schedule(spec.steps, spec.learning_rate, spec.final_rate, spec.warmup, minutes)
    trainer = Trainer(
        model,
        schedule,
        device=where,
        weight_decay=spec.weight_decay,
        clip_norm=spec.clip_norm,
        ema=spec.ema,
        autocast=autocast,
    )
    checkpoint, stamp = out / "checkpoint.pt", out / "spec.json"
    wanted = {"spec": sha256_json(spec.model_dump(mode="json")), "minutes": minutes}
    if checkpoint.exists() and not fresh:
        if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
            raise PqkError(f"{checkpoint} was made from another spec or budget; use --fresh to start over or another -o")
        trainer.resume(checkpoint)
    elif rank == 0:
        write_json(stamp, wanted)
    bank = texture_bank().to(where)
    symmetric: nn.Module = SymmetricPairs(trainer.model)
    if compiled:
        symmetric = torch.compile(symmetric, dynamic=False)  # type: ignore[assignment]
    band = 32 if where.type == "cpu" else None

    def stage_of(share: float) -> Any:
        return next((s for s in spec.stages if share < s.until), spec.stages[-1])

    def loss_of(module: nn.Module, step: int, share: float) -> torch.Tensor:
        stage = stage_of(share)
        seed = split_seed("train", spec.seed, (step * processes + rank) % 2**24)
        with torch.autocast(where.type, enabled=False):
            mine = max(1, stage.batch // processes)
            pairs: PairBatch = training_pairs(mine, stage.size, seed, bank, band=band, **_scene_options(spec))
            gt1, gt2, valid1, valid2 = pairs.ordered()
        prediction = module(pairs.images)
        with torch.autocast(where.type, enabled=False):
            return confidence_loss(prediction, gt1, gt2, valid1, valid2, spec.alpha)[0]

    def scored(weights: dict[str, torch.Tensor]) -> dict[str, float]:
        # a fresh module, so that validation never touches the one in training
        frozen = build_model("dust3r", model.config, weights).to(where).eval()
        return validation_scores(frozen, spec, where, autocast)

    outcome = trainer.run(
        loss_of,
        wrapped=symmetric,
        validate=scored,
        every=spec.validation.every,
        patience=spec.validation.patience,
        checkpoint=checkpoint,
        pause_after_s=pause_after_s,
        report=report,
        batch_of=lambda share: stage_of(share).batch,
    )
    if rank == 0:
        weights = trainer.averaged()
        shipped = build_model("dust3r", model.config, weights).to(where).eval()
        scores = validation_scores(shipped, spec, where, autocast)
        card = model_card(spec, trainer.progress, scores, where, outcome, minutes, command)
        from pqk.models import save_model

        save_model(shipped, out, dtype="float16", card=None)
        card["sha256"] = sha256_file(out / "model.safetensors")
        write_json(out / "model_card.json", card)
    return outcome, trainer.progress


def model_card(
    spec: TrainSpec,
    progress: Progress,
    scores: dict[str, float],
    device: torch.device,
    outcome: str,
    minutes: float | None,
    command: str,
) -> dict[str, Any]:
    """What a reader must know of shipped weights: data, seed, budget, device, metrics, command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "name": spec.model,
        "data": "pairs of procedural rooms rendered on the fly (pqk.data.synthetic), split 'train'",
        "seed": spec.seed,
        "steps": progress.step,
        "hours": round(progress.seconds / 3600, 4),
        "budget_minutes": minutes,
        "outcome": outcome,
        "device": name,
        "torch": torch.__version__,
        "dtype": "float16",
        "validation": {"split": "validation", "size": spec.validation.size, "pairs": spec.validation.pairs, **scores},
        "spec": spec.model_dump(mode="json"),
        "spec_sha256": sha256_json(spec.model_dump(mode="json")),
        "command": command,
        "history": progress.history,
    }
