"""Trains a Teacher on generated samples and writes the folder that is shipped: `train_teacher`, `pqk train teacher`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backends.cpu import cpu_name
from pqk.compress.train.ahead import Ahead
from pqk.compress.train.device import pick_device
from pqk.compress.train.judge import Judge, forward_of
from pqk.compress.train.loop import Progress, Schedule, Trainer, parameter_groups, world
from pqk.cores import allowed_cores
from pqk.errors import PqkError, nearest
from pqk.families.checkpoint import CARD, CONFIG, WEIGHTS
from pqk.families.contract import Family
from pqk.families.registry import families
from pqk.families.sides import check_sides
from pqk.files import clear_write_errors, fsync_folder, sha256_file, sha256_json, write_json
from pqk.locks import lock
from pqk.models import build_model, load_model, save_model
from pqk.settings.training import TrainSpec


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
    init: str | None = None,
    report: Callable[[Progress], None] | None = None,
    command: str = "pqk train teacher",
) -> tuple[str, Progress]:
    """Trains and writes `out`/{config.json, model.safetensors (float16), model_card.json}: the best averaged weights.

    They are written when the training has ended ('done' or 'early'); a paused training does not change these files.
    Resumes from `out`/checkpoint.pt when it belongs to the same spec; otherwise starts from the weights of `init` (a
    model that `load_model` reads, of the same configuration; what the spec's `network` adds keeps fresh weights), or
    from random ones. bf16 autocast is on for CUDA. On a CPU it is off unless requested: whether it pays depends on the
    processor and on the network. Returns the outcome and the last progress.
    Raises PqkError for an unknown model or device, an impossible budget, a batch that the processes cannot share
    equally, a folder that cannot be written or that another process trains in, and a checkpoint that is damaged or of
    another spec.
    """
    with contextlib.ExitStack() as held:
        return _train(held, spec, out, device, minutes, pause_after_s, autocast, compiled, fresh, init, report, command)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the folder, which is made, during the block. Raises PqkError where another process trains in it."""
    with clear_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        if not lock(handle, out, wait=False):
            raise PqkError(f"{out}: another process trains here; wait for it, or give another folder with -o")
        yield
    finally:
        os.close(handle)


def _train(
    held: contextlib.ExitStack,
    spec: TrainSpec,
    out: Path,
    device: str,
    minutes: float | None,
    pause_after_s: float | None,
    autocast: bool | None,
    compiled: bool,
    fresh: bool,
    init: str | None,
    report: Callable[[Progress], None] | None,
    command: str,
) -> tuple[str, Progress]:
    of = family_of_named(spec.model)
    learning = of.learning_part()
    check_sides(of, spec)
    terms = {"task": 1.0} if spec.match is None else {"task": 1.0, "match": spec.match.weight}
    if not set(terms) <= set(learning.TERMS):
        raise PqkError(f"{spec.model} has no loss 'match'; leave match out")
    for name, value in (("minutes", minutes), ("pause_after", pause_after_s)):
        if value is not None and not 0 < value < math.inf:
            raise PqkError(f"{name} must be more than 0, got {value}")
    where = pick_device(device)
    rank, processes = world()
    for stage in spec.stages:
        if stage.batch % processes:
            raise PqkError(f"{processes} processes cannot share a batch of {stage.batch} {learning.UNIT} equally")
    grouped = processes > 1 and not torch.distributed.is_initialized()
    if grouped:
        torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    autocast = where.type == "cuda" if autocast is None else autocast
    config = {**of.settings_part().NAMED[spec.model], **spec.network}
    torch.manual_seed(spec.seed)
    model, start = build_model(of.name, config), None
    _check_rates(model, spec)
    if init is not None:
        _begin_with(model, learning, init, config, spec)
        start = sha256_state(model.state_dict())
    # the inputs of the convolutions in a transformer's heads have this layout anyway
    model = model.to(memory_format=torch.channels_last)
    schedule = Schedule(spec.steps, spec.learning_rate, spec.final_rate, spec.warmup, minutes)
    trainer = Trainer(
        model,
        schedule,
        device=where,
        weight_decay=spec.weight_decay,
        clip_norm=spec.clip_norm,
        ema=spec.ema,
        autocast=autocast,
        factors=spec.rates,
    )
    if rank == 0:
        held.enter_context(_alone(out))
    checkpoint, stamp = out / "checkpoint.pt", out / "spec.json"
    wanted = {"spec": sha256_json(spec.model_dump(mode="json")), "minutes": minutes}
    if start is not None:
        wanted["init"] = start
    if checkpoint.exists() and not fresh:
        if _read_json(stamp) != wanted:
            raise PqkError(f"{checkpoint} is of another spec or budget; use --fresh to start over or another -o")
        trainer.resume(checkpoint)
    elif rank == 0:
        with clear_write_errors(out):
            checkpoint.unlink(missing_ok=True)  # or a run killed before its first save would resume the old one
        write_json(stamp, wanted)
    batches = learning.batches(spec, where, seed=spec.seed, held_seed=spec.seed)
    if where.type == "cpu":
        batches = Ahead(batches, processes)
    watched = None if spec.match is None else "match"
    wrapped = forward_of(learning, learning.parts(trainer.model), watched, compiled)
    judge = Judge(of, batches, lambda: torch.autocast(where.type, dtype=torch.bfloat16, enabled=autocast))

    def loss_of(module: nn.Module, step: int, share: float) -> torch.Tensor:
        stage = spec.stage_at(share)
        with torch.autocast(where.type, enabled=False):
            batch = batches.train(step * processes + rank, stage.batch // processes, stage.size)
        losses = learning.losses(module(batch), batch, None, tuple(terms), {"alpha": spec.alpha})
        return torch.stack([weight * losses[name] for name, weight in terms.items()]).sum()

    def scored(model: nn.Module) -> dict[str, float]:
        scores = {**judge(model.to(where).eval()), **judge.floor()}
        return {name: value for name, value in scores.items() if isinstance(value, float)}  # no lists of single samples

    outcome = trainer.run(
        loss_of,
        wrapped=wrapped,
        # a fresh module, so that validation never touches the one in training
        validate=lambda weights: scored(build_model(of.name, config, weights)),
        every=spec.validation.every,
        patience=spec.validation.patience,
        checkpoint=checkpoint,
        pause_after_s=pause_after_s,
        report=report,
        batch_of=lambda share: spec.stage_at(share).batch,
    )
    if rank == 0 and outcome != "paused":
        best = build_model(of.name, config, trainer.best_averaged())

        def card_of(shipped: nn.Module) -> dict[str, Any]:
            card = model_card(
                spec, learning.SOURCE, trainer.progress, scored(shipped), where, outcome, minutes, command
            )
            if init is not None:
                card["init"] = {"weights": start, "card": _read_json(Path(init) / "model_card.json")}
            return card

        ship(best, out, card_of)
    if grouped:
        torch.distributed.destroy_process_group()
    return outcome, trainer.progress


def _check_rates(model: nn.Module, spec: TrainSpec) -> None:
    """Raises PqkError for a pattern of `rates` that no weight has, and where nothing is left to train."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in spec.rates:
        if not any(re.search(pattern, name) for name in names):
            raise PqkError(f"rates: no weight of {spec.model} has {pattern!r} in its name; the first is {names[0]}")
    groups = parameter_groups(model, spec.weight_decay, spec.rates)
    if not any(group["params"] for group in groups):
        raise PqkError(f"rates: every weight of {spec.model} has the factor 0; there is nothing to train")


def _begin_with(model: Any, learning: Any, init: str, config: Mapping[str, Any], spec: TrainSpec) -> None:
    """Fills a fresh model with the weights of `init`; what `spec.network` adds to it keeps its own.

    Of a network of another family those are taken that `LearningPart.borrowed` gives. Raises PqkError where they are of
    another network.
    """
    first = load_model(init)
    weights, mine = first.state_dict(), model.state_dict()
    merged = {**first.config, **spec.network}
    borrowed = getattr(learning, "borrowed", {}).get(first.family)
    if borrowed is not None:
        weights = borrowed(weights)
    like = borrowed is not None or (first.family == model.family and learning.same_network(merged, config))
    if not like or any(key not in mine or mine[key].shape != value.shape for key, value in weights.items()):
        others = [] if like or first.family != model.family else _other_keys(learning, merged, config)
        lacking = ", ".join(f"{key}: {json.dumps(merged[key])}" for key in others)
        raise PqkError(
            f"{init} has another configuration than {spec.model}; training cannot start from it"
            + (f", unless the training file has network: {{{lacking}}}" if lacking else "")
        )
    model.load_state_dict({**mine, **weights})


def _other_keys(learning: Any, first: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Returns the keys whose values in the first configuration make a network of the second one another network."""

    def same(key: str) -> bool:
        try:
            return bool(learning.same_network({**config, key: first[key]}, config))
        except PqkError:  # of keys that need each other
            return False

    return [key for key in first if not same(key)]


def family_of_named(name: str) -> Family:
    """Returns the family that has a configuration of this name. Raises PqkError when none has."""
    known = {named: of for of in families() for named in of.settings_part().NAMED}
    if name not in known:
        raise PqkError(f"unknown model {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]


def ship(model: nn.Module, out: Path, card_of: Callable[[nn.Module], dict[str, Any]]) -> None:
    """Replaces the model in `out` by this one, in float16, with the card from `card_of` and the weights' sha256.

    `card_of` gets the model as a user will load it. Nothing in `out` changes before it has returned. The old card is
    removed first and the new one is written last: whenever this is killed, no card lies beside the weights of another
    model.
    """
    new = out / ".new"
    with clear_write_errors(out):
        if new.exists():  # of a run that was killed here
            shutil.rmtree(new)
        try:
            save_model(model, new, dtype="float16")
            card = card_of(load_model(new))
            card["sha256"] = sha256_file(new / WEIGHTS)
            write_json(new / CARD, card)
            (out / CARD).unlink(missing_ok=True)
            fsync_folder(out)
            for name in (WEIGHTS, CONFIG, CARD):
                (new / name).replace(out / name)
                fsync_folder(out)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def sha256_state(state: dict[str, torch.Tensor]) -> str:
    """Returns the hex sha256 over names and float32 bytes of the weights, by sorted name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_json(path: Path) -> Any:
    """Returns the value of a JSON file; None when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def model_card(
    spec: TrainSpec,
    source: str,
    progress: Progress,
    scores: dict[str, float],
    device: torch.device,
    outcome: str,
    minutes: float | None,
    command: str,
) -> dict[str, Any]:
    """Returns the model card of shipped weights: data, seed, budget, device, metrics, command."""
    name = f"{cpu_name()}, {allowed_cores()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "name": spec.model,
        "data": source,
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
