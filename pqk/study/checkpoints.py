"""Opens checkpoints with their digest and model card, and keeps checkpoints for `pqk ledger finalize`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backends.base import Graph, sha256_files
from pqk import paths
from pqk.engines.variant import graph_from_json, graph_to_json
from pqk.errors import PqkError
from pqk.families.checkpoint import CARD, CONFIG, load_model
from pqk.families.identify import model_name
from pqk.files import (
    below,
    check_readable,
    clear_write_errors,
    matching,
    sha256_file,
    sha256_json,
    whole_folder,
    write_json,
)
from pqk.recipe.request import commit_of, count_parameters
from pqk.record.deliverable import safe_name

FINALIZED = "finalized"
"""The part of a model card that `finalize` writes."""


GRAPHS = "graphs.json"
FLOAT = "float"
"""Names in the folder of a kept quantized result: the description of its graphs, and its float checkpoint's folder."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    `path` is the argument of `load_model`: a folder, or an official .pth file; for a quantized result its float
    checkpoint.
    """

    path: Path
    name: str
    sha256: str  # of the names and bytes of its files: `hashes.model` of a record; of a result see `Bench`
    card: Mapping[str, Any]  # model_card.json; empty without one
    folder: Path  # the argument of `open_checkpoint`

    @property
    def result(self) -> Mapping[str, Any] | None:
        """Returns backend, quantizer, precision, lowered (PTQ or QAT) and float_sha256 of a kept result; else None."""
        found = self.card.get(FINALIZED, {}).get("result")
        return found if isinstance(found, Mapping) else None

    @property
    def train_seed(self) -> int | None:
        """Returns the train seed in the model card; None when it has none."""
        spec = self.card.get("spec")
        places = (self.card.get(FINALIZED, {}), self.card, {"seed": spec.get("seed")} if isinstance(spec, dict) else {})
        seeds = (part.get(name) for part in places for name in ("train_seed", "seed"))
        return next((seed for seed in seeds if isinstance(seed, int) and not isinstance(seed, bool)), None)

    @property
    def task_card(self) -> str | None:
        """Returns the task card whose training made the checkpoint, from the model card; None when it has none."""
        names = (self.card.get(FINALIZED, {}).get("card"), self.card.get("card"), self.card.get("exp_id"))
        return next((name for name in names if isinstance(name, str)), None)


def folder_of(root: Path) -> Path:
    """Returns the folder of the finalized checkpoints."""
    return root / "outputs" / "checkpoints"


def open_checkpoint(asked: str | Path, root: Path) -> Checkpoint:
    """Returns a checkpoint by its path, or by the name under which it was finalized.

    Raises PqkError when there is none, when its model card is unreadable or describes other weights, and when the bytes
    of a finalized one have changed.
    """
    path = Path(asked)
    if not path.exists() and (folder_of(root) / asked).is_dir():
        path = folder_of(root) / asked
    if not path.exists():
        raise PqkError(f"no checkpoint {str(asked)!r}: neither a file, nor a folder, nor a name in outputs/checkpoints")
    card = _read_card(path / CARD) if (path / CARD).is_file() else {}
    loadable, digest = _read(path)
    finalized = card.get(FINALIZED, {})
    if finalized and finalized.get("checkpoint_sha256") != digest:
        raise PqkError(
            f"{path} was changed after it was finalized: its sha256 is {digest}, but its model card has "
            f"{finalized.get('checkpoint_sha256')}"
        )
    weights = matching(path, "*.safetensors")
    if isinstance(card.get("sha256"), str) and card["sha256"] not in {sha256_file(file) for file in weights}:
        raise PqkError(f"{path / CARD} describes other weights (sha256 {card['sha256']}) than those beside it")
    name = model_name(path) if path.is_dir() else Path(model_name(path)).stem
    return Checkpoint(loadable.resolve(), name, digest, card, path.resolve())


def _read(path: Path) -> tuple[Path, str]:
    """Returns the argument of `load_model`, and the sha256 of the checkpoint or quantized result at `path`."""
    if (path / GRAPHS).is_file():
        return path / FLOAT, sha256_json({name: graph.sha256 for name, graph in _graphs(path).items()})
    loadable, files = _files(path)
    return loadable, sha256_json({file.name: sha256_file(file) for file in files})


def _graphs(folder: Path) -> dict[str, Graph]:
    """Returns the graphs of a kept result with their present digests. Raises PqkError when they are incomplete."""
    check_readable(folder / GRAPHS)
    try:
        described = json.loads((folder / GRAPHS).read_text(encoding="utf-8"))
        found = {name: graph_from_json({**known, "path": folder / known["path"]}) for name, known in described.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PqkError(f"{folder / GRAPHS} does not describe graphs: {str(error)[:120]}") from error
    missing = next((graph.path for graph in found.values() if not graph.path.is_file()), None)
    if missing is not None or not found:
        raise PqkError(f"{folder} is not a quantized result: it lacks {missing.name if missing else 'its graphs'}")
    return {name: replace(graph, sha256=sha256_files(graph.files())) for name, graph in found.items()}


def kept_graphs(checkpoint: Checkpoint) -> dict[str, Graph]:
    """Returns the graphs of a kept quantized result."""
    return _graphs(checkpoint.folder)


def _files(path: Path) -> tuple[Path, list[Path]]:
    """Returns the argument of `load_model`, and the files that decide its result."""
    if path.is_file():
        return path, [path]
    if (path / CONFIG).is_file():
        return path, [path / CONFIG, *matching(path, "*.safetensors")]
    official = [file for pattern in ("*.pth", "*.pt", "*.safetensors") for file in matching(path, pattern)]
    if len(official) != 1:
        raise PqkError(f"{path} is not a checkpoint: it has no {CONFIG}")
    return official[0], official


def _read_card(path: Path) -> dict[str, Any]:
    check_readable(path)
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PqkError(f"{path} is not valid JSON: {str(error)[:120]}") from error
    if not isinstance(card, dict) or not isinstance(card.get(FINALIZED, {}), dict):
        raise PqkError(f"{path} must hold one JSON object")
    return card


def finalize(
    asked: str | Path, root: Path, name: str | None = None, train_seed: int | None = None, task_card: str | None = None
) -> tuple[Checkpoint, bool]:
    """Keeps a checkpoint in outputs/checkpoints/NAME with a model card. Returns it, and whether it is new.

    `name`: default: the checkpoint's own with eight digits of its sha256. `train_seed`, `task_card`: values that the
    model card does not have yet. The weights are loaded once, so that only loadable checkpoints are kept.
    Raises PqkError for a path without a checkpoint, an unsafe name, a name that another checkpoint (or the same one
    with another seed or card) has, and a train seed that contradicts the model card.
    """
    found = open_checkpoint(asked, root)
    if found.result is not None:
        raise PqkError(f"{found.name} is a kept result already")
    seed = agreed_seed(found, train_seed)
    task_card = task_card or found.task_card
    if name is None:
        name = f"{plain_name(found.name).removesuffix(f'-{found.sha256[:8]}')}-{found.sha256[:8]}"
    target = folder_of(root) / safe_name(name, "checkpoint")
    if target.is_dir():
        there = open_checkpoint(target, root)
        for what, old, wanted in (
            ("sha256", there.sha256, found.sha256),
            ("train seed", there.train_seed, seed),
            ("task card", there.task_card, task_card),
        ):
            if old != wanted:
                raise PqkError(
                    f"{paths.shown(target, root)} holds another checkpoint already ({what} {old}, "
                    f"this one has {wanted}); choose another --name"
                )
        return there, False
    params = count_parameters(load_model(found.path))
    _, files = _files(found.path)
    with whole_folder(target) as new, clear_write_errors(target):
        for file in files:
            shutil.copyfile(file, new / file.name)
        copies = {file.name: {"sha256": sha256_file(new / file.name), "bytes": file.stat().st_size} for file in files}
        if sha256_json({file: entry["sha256"] for file, entry in copies.items()}) != found.sha256:
            raise PqkError(f"{found.path} was changed while it was copied; finalize it when its training has ended")
        about = {
            "name": name,
            "checkpoint_sha256": found.sha256,
            "files": copies,
            "params": params,
            "train_seed": seed,
            "card": task_card,
            "source": paths.shown(found.path, root),
            **_stamp(),
        }
        write_json(new / CARD, {**found.card, FINALIZED: about})
    return open_checkpoint(target, root), True


def keep_result(
    root: Path, float_model: Path, float_sha256: str, graphs: Mapping[str, Graph], about: Mapping[str, Any], name: str
) -> tuple[Checkpoint, bool]:
    """Keeps a quantized result in outputs/checkpoints/NAME: its graphs, and in float/ their float checkpoint.

    about: the fields of the model card besides digests: card, train_seed, params, result. Returns the checkpoint, and
    whether it is new. Raises PqkError for a name that another checkpoint has, and for files that change while they are
    copied.
    """
    digest = sha256_json({part: graph.sha256 for part, graph in graphs.items()})
    target = folder_of(root) / safe_name(name, "checkpoint")
    if target.is_dir():
        there = open_checkpoint(target, root)
        if (there.sha256, there.train_seed, there.task_card) != (digest, about["train_seed"], about["card"]):
            raise PqkError(f"{paths.shown(target, root)} holds another checkpoint already; choose another --name")
        return there, False
    with whole_folder(target) as new, clear_write_errors(target):
        described = {}
        for part, graph in graphs.items():
            for file in graph.files():
                shutil.copyfile(file, new / file.name)
            described[part] = {**graph_to_json(graph), "path": graph.path.name}
        write_json(new / GRAPHS, described)
        (new / FLOAT).mkdir()
        _, files = _files(float_model)
        for file in files:
            shutil.copyfile(file, new / FLOAT / file.name)
        if (
            _read(new)[1] != digest
            or sha256_json({f.name: sha256_file(new / FLOAT / f.name) for f in files}) != float_sha256
        ):
            raise PqkError(f"{float_model} or its graphs were changed while they were copied; run the card again")
        copies = {
            path.relative_to(new).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            for path in below(new)
            if path.is_file()
        }
        told_of = {"name": name, "checkpoint_sha256": digest, "files": copies, **about, **_stamp()}
        write_json(new / CARD, {FINALIZED: told_of})
    return open_checkpoint(target, root), True


def _stamp() -> dict[str, Any]:
    return {"commit": commit_of(), "datetime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}


def plain_name(name: str) -> str:
    """Returns a file name for any text: letters, digits, '.', '_' and '-', at most 60 of them."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:60] or "checkpoint"


def agreed_seed(checkpoint: Checkpoint, asked: int | None) -> int:
    """Returns the train seed of the model card, or `asked`. Raises PqkError without either, or when they differ."""
    known = checkpoint.train_seed
    if known is None and asked is None:
        raise PqkError(f"the model card of {checkpoint.name} has no train seed; give it with --train-seed")
    if known is not None and asked is not None and known != asked:
        raise PqkError(f"--train-seed {asked}: the model card of {checkpoint.name} has train seed {known}")
    return int(asked if known is None else known)  # type: ignore[arg-type]


def here(root: Path) -> dict[str, Path]:
    """Returns the folders of the finalized checkpoints and of those in models/, by the sha256 of their bytes now."""
    found: dict[str, Path] = {}
    for folder in (folder_of(root), root / "models"):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_dir() and not path.name.startswith("."):
                try:
                    _, digest = _read(path)
                except PqkError:  # not a checkpoint
                    continue
                found.setdefault(digest, path)
    return found
