"""Defines the contracts of the toolchains: graph, source, quantizer, engine, backend and surgery.

A backend must provide: `name`, `sources`, `availability()`, `quantizers()`, `float_precisions()`,
`compile(graph, precision, options)`, `kept_in_int8(engine, keep, kernels)`. What it may leave out is read through
`baselines_of`, `rests_of`, `forms_of`, `surgery_of` and `pieces_of`, which say what its absence means.
A quantizer must provide: `name`, `quantize(source, spec, calibration)`.
An engine must provide: `_infer(feeds)`, `kernels()`, `close()`; everything else is inherited. One that runs on a device
with memory of its own may set `on_device`, `last_device_ms` and override `infer_on_device`.
Everything here imports without any vendor package.
"""

from __future__ import annotations

import difflib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

Feeds = dict[str, np.ndarray]


class DeviceArray(ABC):
    """Values in the memory of a device, made by an engine and valid while that engine is open.

    What one engine leaves on the device another one there reads without a copy over the host. `numpy` copies them to
    the host; it raises BackendError when the engine is closed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def numpy(self) -> np.ndarray: ...


Array: TypeAlias = np.ndarray | DeviceArray


class BackendError(Exception):
    """Reports a request to a toolchain that cannot work, in one sentence. Exit code 2."""

    exit_code = 2


class Unavailable(BackendError):
    """Reports that a toolchain is not usable on this machine, with the reason and the remedy. Exit code 3."""

    exit_code = 3


class Precision(StrEnum):
    """The precision asked of an engine. What was executed is read back from `Engine.kernels()`.

    TF32: floats of 32 bits whose products are rounded to 10 bits of mantissa (NVIDIA's tensor cores).
    """

    F32 = "f32"
    TF32 = "tf32"
    BF16 = "bf16"
    F16 = "f16"
    INT8 = "int8"

    @classmethod
    def _missing_(cls, value: object) -> Self:
        """Raises BackendError for an unknown value, with the known ones."""
        raise BackendError(f"unknown precision {value!r}; known are {[str(p) for p in cls]}")


@dataclass(frozen=True)
class TensorInfo:
    """Name, static shape and numpy dtype name of one input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Graph:
    """A file that a backend can read: ONNX, or OpenVINO IR (`.xml` with `.bin` beside it).

    left_float: of a quantized model, a graph of which nothing was quantized; compiled as int8 it runs in the precision
    of an int8 graph's floats.
    """

    path: Path
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    sha256: str
    left_float: bool = False

    @property
    def format(self) -> str:
        """Returns 'onnx' or 'openvino'."""
        return "openvino" if self.path.suffix == ".xml" else "onnx"

    def files(self) -> list[Path]:
        """Returns the graph's file and the data files that belong to it (IR `.bin`, ONNX external data)."""
        data = {self.path.with_suffix(".bin"), self.path.with_name(self.path.name + ".data")}
        return [self.path, *sorted(p for p in data if p.exists())]

    @property
    def size_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.files())


@dataclass
class Source:
    """A torch module with example inputs, and its exported graph: where a quantizer may start."""

    name: str
    module: torch.nn.Module | None
    example: Mapping[str, Any]
    output_names: tuple[str, ...]
    graph: Graph


@dataclass(frozen=True)
class QuantSpec:
    """Settings of a quantization. `keep` holds names of keep-list groups or regular expressions of node names."""

    bits_w: int = 8
    bits_a: int = 8
    weights: str = "per_channel"
    activations: str = "per_tensor"
    symmetric_activations: bool = True
    smooth_quant_alpha: float | None = None
    bias_correction: str = "none"
    weight_range: str = "auto"  # full, half (7 of the 8 bits), or auto: half where this CPU's int8 sums saturate
    keep: tuple[str, ...] = ("LayerNorm", "Softmax", "AttentionScales")
    calibration_samples: int = 512
    output_dir: Path = field(default_factory=Path)


@dataclass(frozen=True)
class Kernel:
    """One executed node: its type, the implementation and precision that ran, its time and its work.

    `precision` is 'int8', 'bf16', 'f16', 'tf32', 'f32', another numpy-like name, or 'unknown'. `flops` counts two per
    multiply-add of matmuls and convolutions. `originals` are the names of the graph's nodes that it executes. `matched`
    says how its FLOPs were found: by 'name', or by 'size' when only equal FLOPs tell which nodes it executes.
    """

    name: str
    type: str
    implementation: str
    precision: str
    time_us: float
    flops: float = 0.0
    originals: tuple[str, ...] = ()
    matched: str = "name"


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here: devices and versions, or the reason why not and the command that helps.

    `emulated`: it can, but another runtime computes in place of its engines, so nothing is timed.
    """

    available: bool
    devices: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    remedy: str = ""
    emulated: bool = False


class Engine(ABC):
    """A compiled graph: arrays in, arrays out. A context manager that frees its device memory on exit.

    `measured` is 'engine', or 'emulated' when another runtime computes in its place: then its time means nothing.
    `on_device`: it reads device arrays where they are, and `infer_on_device` leaves its outputs there.
    `last_device_ms`: milliseconds of the last run on the device, between two marks on its queue, without copies; None
    where the engine does not measure it, as on a CPU, whose host time is its time.
    """

    measured: str = "engine"
    on_device: bool = False
    last_device_ms: float | None = None
    graph: Graph
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def infer(self, feeds: Mapping[str, Array]) -> Feeds:
        """Runs once and returns host arrays. Raises BackendError when a name, shape or dtype is not the graph's."""
        return self._infer(self._checked(feeds))

    def infer_on_device(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs once like `infer`; outputs stay on the device where the engine has one of its own (`on_device`)."""
        return dict(self.infer(feeds))

    def _checked(self, feeds: Mapping[str, Array]) -> Any:
        """Returns `feeds` as `_infer` takes them: device arrays only where the engine reads them."""
        known = {t.name: t for t in self.inputs}
        if set(feeds) != set(known):
            raise BackendError(f"inputs must be {sorted(known)}, got {sorted(feeds)}")
        for name, array in feeds.items():
            want = known[name]
            if tuple(array.shape) != want.shape or array.dtype.name != want.dtype:
                raise BackendError(
                    f"input {name!r} must be {want.dtype}{list(want.shape)}, got {array.dtype.name}{list(array.shape)}"
                )
        return {k: v.numpy() if isinstance(v, DeviceArray) and not self.on_device else v for k, v in feeds.items()}

    @abstractmethod
    def _infer(self, feeds: Feeds) -> Feeds: ...

    @abstractmethod
    def kernels(self) -> list[Kernel]: ...

    @property
    def size_bytes(self) -> int:
        """Returns the bytes of the files that ship: those of the graph, unless the toolchain ships another file."""
        return self.graph.size_bytes

    def planned_flops(self) -> float | None:
        """Returns the FLOPs of matmuls and convolutions that the graph's rounding asks int8 or fp8 for.

        None: the engine does not tell.
        """
        return None

    def write_form(self, path: Path) -> Graph | None:
        """Writes the graph as it runs, where that is another form than its file has, and returns it; else None."""
        return None

    def close(self) -> None:  # noqa: B027  (an engine without resources needs none)
        """Frees what the engine holds; it cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Quantizer(Protocol):
    """Lowers the precision of a graph.

    `starts_from` is 'graph' or 'module': what of the `Source` it reads. `sources` names the Python modules whose code
    decides its result, for caches. More attributes are optional: `number_format` of its 8 bits ('int8' when absent),
    `bits`, the pairs of (weight, activation) bits that it lowers to (only (8, 8) when absent), and those of
    `backends.quantspec` that say what else it cannot do, so that this is refused early. One that can train has two
    methods more, see `can_train`.
    """

    name: str
    starts_from: str
    sources: tuple[str, ...]

    def quantize(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> Graph: ...

    def notes(self) -> Sequence[str]:
        """Returns notes on the last `quantize` for its results; empty when there are none."""
        ...


class Backend(Protocol):
    """A toolchain: quantizes, compiles and runs graphs. Knows nothing of models, cards or logs.

    `sources` names the Python modules whose code decides what its engines compute and report, for caches. Optional
    members: see `baselines_of`, `rests_of`, `forms_of`, `counting_of`, `surgery_of` and `pieces_of`.
    """

    name: str
    sources: tuple[str, ...]

    def availability(self) -> Availability: ...

    def quantizers(self) -> Mapping[str, Quantizer]: ...

    def float_precisions(self) -> Sequence[Precision]: ...

    def compile(self, graph: Graph, precision: Precision, options: Mapping[str, Any] | None = None) -> Engine: ...

    def kept_in_int8(self, engine: Engine, keep: Sequence[str], kernels: Sequence[Kernel]) -> list[Kernel]:
        """Returns the kernels of `engine` that ran a node of the keep-list in int8; empty if none did."""
        ...


class Surgery(Protocol):
    """Puts single nodes of a quantized graph back to float: what the ranking of nodes and mixed precision need.

    Made of the quantized graph and of the float graph that it was quantized from. `nodes`: names of the nodes that
    compute with quantized values, in topological order, as patterns of a keep-list find them. `sources`: as of
    `Backend`. Raises BackendError for a name that is none of these, and for graphs that do not belong together.
    """

    sources: ClassVar[tuple[str, ...]]
    nodes: tuple[str, ...]

    def __init__(self, quantized: Graph, plain: Graph) -> None: ...

    def infer_plain(self, feeds: Sequence[Feeds]) -> list[Feeds]:
        """Returns the outputs of the float graph for each item, in f32."""
        ...

    def infer(self, floats: Iterable[str], feeds: Sequence[Feeds]) -> list[Feeds]:
        """Returns the outputs of the quantized graph with the nodes `floats` in float; the float part computes in f32.

        Holds no activations but the outputs when it returns.
        """
        ...

    def write(self, floats: Iterable[str], target: Path) -> Graph:
        """Writes that graph to `target`, given without a suffix, and returns it."""
        ...


class Piece(Protocol):
    """A part of a graph that can be timed alone."""

    @property
    def key(self) -> str:
        """Returns a text that is equal for parts of equal work."""
        ...

    @property
    def words(self) -> str:
        """Returns what the part does, for a reader."""
        ...

    def write(self, path: Path) -> Graph:
        """Writes the part as a graph of its own."""
        ...


class Pieces(Protocol):
    """Cuts graphs into parts and times them: what the prediction of a speed needs. `sources`: as of `Backend`."""

    sources: ClassVar[tuple[str, ...]]

    def cut(self, graph: Graph, precision: Precision, keep: Sequence[str]) -> Mapping[str, Sequence[tuple[int, Piece]]]:
        """Returns the parts of a float graph as it would run at a precision, and how often each occurs, for each form
        that it may have (see `forms_of`). keep: what stays in float where the precision is lower."""
        ...

    def yardstick(self, path: Path) -> Graph:
        """Writes a graph of fixed work to `path`: its time is the unit of those that are timed in turns with it."""
        ...

    def opened(self, graph: Path, rest: Precision) -> Callable[[], float]:
        """Compiles a part that was written to a file; each call runs it and returns the milliseconds it took.

        rest: its float precision.
        """
        ...


def baselines_of(backend: Backend) -> list[Precision]:
    """Returns the float precisions that deserve a row of results: the backend's `baselines()`, or all of them."""
    return [Precision(p) for p in getattr(backend, "baselines", backend.float_precisions)()]


def rests_of(backend: Backend) -> list[Precision]:
    """Returns the precisions that quantized graphs may have for the rest: the backend's `rests`, or all of them."""
    return [Precision(p) for p in getattr(backend, "rests", None) or backend.float_precisions()]


def forms_of(backend: Backend, graph: Graph) -> Mapping[str, Mapping[str, Any]]:
    """Returns other forms of a quantized graph that compute the same: what is changed, in words -> engine options.

    They are the backend's `forms(graph)`, of which a measurement chooses; none where it has no such member.
    """
    found: Mapping[str, Mapping[str, Any]] = getattr(backend, "forms", lambda graph: {})(graph)
    return found


def counting_of(backend: Backend) -> Mapping[str, Any]:
    """Returns the options of an engine that counts its kernels while it runs: the backend's `counting`, or none.

    `kernels()` of such an engine gives the mean times of the runs so far, instead of running once more for it.
    """
    found: Mapping[str, Any] = getattr(backend, "counting", {})
    return found


def surgery_of(backend: Backend) -> type[Surgery] | None:
    """Returns the class that puts nodes of quantized graphs back to float (the backend's `surgery()`), or None."""
    found: type[Surgery] | None = getattr(backend, "surgery", lambda: None)()
    return found


def pieces_of(backend: Backend) -> Pieces | None:
    """Returns what predicts the speed of graphs from that of their parts (the backend's `pieces()`), or None."""
    found: Pieces | None = getattr(backend, "pieces", lambda: None)()
    return found


def can_train(quantizer: Quantizer) -> bool:
    """Returns whether it offers quantization-aware training: `prepare(source, spec, calibration)` gives a trainable
    copy of `source.module` that rounds as its engine will, and `finish(module, source, spec)` makes a graph of it."""
    return hasattr(quantizer, "prepare") and hasattr(quantizer, "finish")


def lowered_to(quantizer: Quantizer, bits_w: int, bits_a: int) -> str:
    """Returns the precision that a quantizer makes: 'int4' when only weights get 4 bits, else its number format.

    Raises BackendError when it does not lower to these bits.
    """
    known = getattr(quantizer, "bits", ((8, 8),))
    if (bits_w, bits_a) not in known:
        able = " or ".join(f"W{w}A{a}" for w, a in known)
        raise BackendError(f"the quantizer {quantizer.name!r} lowers to {able}, not W{bits_w}A{bits_a}")
    return f"int{bits_w}" if bits_a > bits_w else str(getattr(quantizer, "number_format", "int8"))


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Returns ' (did you mean X?)' for the closest allowed word, or '' when none is close."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def known_options(options: Mapping[str, Any] | None, defaults: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """Returns `defaults` overlaid with `options`. Raises BackendError for a name that the backend does not have."""
    for name in options or {}:
        if name not in defaults:
            raise BackendError(
                f"backend {backend!r} has no option {name!r}{nearest(name, defaults)}; it has {sorted(defaults)}"
            )
    return {**defaults, **(options or {})}


def check_threads(threads: Any) -> None:
    """Raises BackendError unless `threads` is None (all cores) or a positive whole number."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise BackendError(f"option 'threads' must be a whole number from 1, or null for all cores, got {threads!r}")


def sha256_files(paths: Iterable[Path]) -> str:
    """Returns one sha256 over the bytes of several files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def executed_precision(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Returns the share of matmul and convolution FLOPs per executed precision; empty when no kernel carries FLOPs."""
    total: dict[str, float] = {}
    for kernel in kernels:
        if kernel.flops > 0:
            total[kernel.precision] = total.get(kernel.precision, 0.0) + kernel.flops
    everything = sum(total.values())
    return {name: value / everything for name, value in sorted(total.items())} if everything else {}


def matched_by_size(kernels: Iterable[Kernel]) -> float | None:
    """Returns the share of the FLOPs that were given to kernels by equal size alone; None when no kernel carries FLOPs.

    Two layers of one size may have been exchanged there, so `executed_precision` is uncertain by at most this share.
    """
    found = [kernel for kernel in kernels if kernel.flops > 0]
    everything = sum(kernel.flops for kernel in found)
    return sum(k.flops for k in found if k.matched == "size") / everything if everything else None
