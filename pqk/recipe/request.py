"""Prepares the stages of a run: the requested experiment, the backend, the Teacher, and the machine's description."""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends import registry
from backends.base import Backend, Unavailable, rests_of
from backends.cpu import cpu_name
from backends.quantspec import check_installed, check_settings
from pqk import __version__, paths
from pqk.cores import affinity_cores, cpu_quota
from pqk.errors import PqkError, nearest
from pqk.families.checkpoint import load_model
from pqk.families.identify import model_name
from pqk.families.registry import family
from pqk.files import matching, sha256_file, sha256_json, sweep_temporary
from pqk.recipe import stages
from pqk.recipe.experiment import Experiment, experiment_family, resolve, teacher_path
from pqk.recipe.stages import Context
from pqk.settings.card import load_card
from pqk.settings.recipe import combo_of
from pqk.store.code import code_of
from pqk.store.mirror import mirror
from pqk.store.store import OnEvent, Store

if TYPE_CHECKING:
    import torch

    from pqk.settings.quant import Ptq

_PACKAGE = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "nncf",
    "neural-compressor-pt",
    "nvidia-modelopt",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "torchao",
    "torch-pruning",
    "numpy",
    "scipy",
    "pillow",
)


def new_run_id() -> str:
    """Returns a unique identifier of a run; sorted by name, runs are in the order of their start."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class Request:
    """The arguments of `pqk run`."""

    card: str
    backend: str
    quantizer: str | None = None
    model: str | None = None
    scenes: Path | None = None
    images: Path | None = None
    seed: int | None = None
    fresh: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)  # dotted names below workload, eval and quant
    workload: Path | None = None
    evaluation: Path | None = None
    quant: Path | None = None
    recipe: bool = True  # False: only the float baselines
    role: str = "teacher"  # of the float rows: 'baseline' when the model is not the Teacher
    point: tuple[str, str] | None = None  # (axis, point) of a card with a matrix
    stages: tuple[str, ...] | None = None  # another recipe than the card's
    qat: bool | None = None  # train the quantized model when it drops too much; False: the user asked for no training
    moves: tuple[str, ...] = ()  # one sentence per move of the rollback table, with its reason
    distill: Path | None = None
    prune: Path | None = None
    joint: Path | None = None
    reduce: Path | None = None
    retime: bool = False  # measure only time and memory again
    train_scenes: Path | None = None
    train_images: Path | None = None
    processes: int = field(default=1, compare=False)  # that share a training; the result is the same
    command: str | None = field(default=None, compare=False)  # as it was given, for the records
    run_id: str = field(default_factory=new_run_id, compare=False)  # shared by all records of this request


def asked_experiment(request: Request, root: Path) -> Experiment:
    """Returns the card with its configs, and the command line's settings applied to them. Raises PqkError."""
    card, origin, settings = load_card(request.card, root), "command line", dict(request.settings)
    of = experiment_family(request.model, root)
    if request.point is not None:
        axis, point = request.point
        one, origin = card.at(axis, point, of.name), f"card {card.id}, {axis}: {point}"
        card, settings = one, {**card.matrix[axis].points[point], **settings}
    elif card.matrix:
        raise PqkError(
            f"card {card.id} is a matrix of {len(card.points())} experiments; only `pqk run` runs all of them"
        )
    if request.stages is not None:
        card = card.model_copy(update={"recipe": request.stages, "combo": combo_of(request.stages)})
    if request.seed is not None:
        settings |= {"workload.seeds.train": request.seed, "workload.seeds.eval": request.seed}
    files = {
        "workload": request.workload,
        "eval": request.evaluation,
        "quant": request.quant,
        "distill": request.distill,
        "prune": request.prune,
        "joint": request.joint,
        "reduce": request.reduce,
    }
    return resolve(card, root, of=of, files=files, settings=settings, origin=origin)


def usable_backend(name: str) -> Backend:
    """Returns a backend. Raises Unavailable where it cannot run on this machine."""
    backend = registry.get(name)
    found = backend.availability()
    if not found.available:
        raise Unavailable(f"backend {name!r} cannot run: {found.reason}; {found.remedy}")
    return backend


def chosen_quantizer(backend: Backend, asked: str | None, ptq: Ptq) -> str:
    """Returns the requested quantizer, or the backend's first one.

    Raises PqkError for an unknown one, BackendError for settings of `ptq` that it does not support, and Unavailable
    when it is not installed.
    """
    tools = backend.quantizers()
    known = list(tools)
    if not known:
        raise PqkError(f"backend {backend.name!r} has no quantizer, so it cannot run stage Q")
    name = known[0] if asked is None else asked
    if name not in known:
        raise PqkError(
            f"unknown quantizer {name!r}{nearest(name, known)}; backend {backend.name} has {', '.join(known)}"
        )
    check_settings(tools[name], ptq, tools.values(), "quant.ptq.")
    check_installed(tools[name])
    return name


def check_float_rest(asked: str, backend: Backend) -> None:
    """Raises PqkError for a quant.float_rest that the backend's quantized graphs do not support on this machine."""
    allowed = ["auto", *map(str, rests_of(backend))]
    if asked not in allowed:
        raise PqkError(f"quant.float_rest is {asked}; backend {backend.name} supports here {', '.join(allowed)}")


def engine_options(experiment: Experiment, backend: str) -> dict[str, Any]:
    """Returns the engine options of a backend in quant.yaml; empty for a backend without a section there."""
    return experiment.quant.trt.model_dump(mode="json") if backend == "trt" else {}


def count_parameters(model: torch.nn.Module) -> int:
    """Returns the number of weights of a model; a tensor with two names counts once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


@dataclass(frozen=True)
class Model:
    """A float model of a run: its path for `load_model`, its name in records, and the sha256 of its files."""

    path: str
    name: str
    sha256: str

    @property
    def random(self) -> bool:
        """Returns whether its weights are random: it predicts nothing, and only its agreement with itself counts."""
        return self.name.startswith("random:")


def load_teacher(asked: str | None, root: Path) -> tuple[Model, Any]:
    """Loads the Teacher. Returns its description and the module."""
    asked = teacher_path(asked, root)
    model = load_model(asked)
    if asked.startswith("random:"):
        code = code_of(*stages.LOADER_CODE, *stages.parts_code(family(model.family), "model"))
        return Model(asked, asked, sha256_json({"random": asked, "code": code})), model
    return describe(Path(asked), model_name(asked)), model


def describe(path: Path, name: str) -> Model:
    """Returns the description of a model in a file or folder. name: in records. The sha256 leaves its card out."""
    files = [path / "config.json", *matching(path, "*.safetensors")] if path.is_dir() else [path]
    return Model(str(path.resolve()), name, sha256_json({p.name: sha256_file(p) for p in files}))


def context(request: Request, backend: Backend, root: Path, on_event: OnEvent) -> Context:
    """Returns the store and the machine's description, which is part of the key of every measurement.

    The description has the device that computes, instruction sets, cores, CPU quota and tool versions; where a GPU
    computes, also the CPU's name, the driver, the CUDA version and the GPU's clock settings.
    """
    sweep_temporary()
    details = backend.availability().details
    machine = {
        "device": _device(details),
        "versions": _versions(),
        "isa": details.get("isa"),
        "cores": affinity_cores(),
        "cpu_quota": cpu_quota(),
        **_gpu(details),
    }
    store = Store(paths.store(root), request.fresh, commit_of(), mirror())
    return Context(store, on_event, machine, request.retime, request.processes)


def _device(details: Mapping[str, str]) -> str:
    """Returns the name of the GPU where one runs the engines, else of the CPU."""
    return str(details.get("device") or details.get("cpu") or cpu_name())


def _gpu(details: Mapping[str, str]) -> dict[str, str]:
    if "device" not in details:
        return {}
    return {"cpu": cpu_name(), **{name: details[name] for name in ("driver", "cuda", "clocks") if name in details}}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "pqk": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit_of(package: Path = _PACKAGE) -> str | None:
    """Returns the git commit of the checkout that holds the running code, with '-dirty' when files differ from it.

    None outside a repository, and where the repository around the package does not track it, such as when it is
    installed inside another project. The caller's GIT_* variables are removed: they could name another repository.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        env = {**own, "GIT_OPTIONAL_LOCKS": "0"}  # the query writes nothing
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changed else "")
