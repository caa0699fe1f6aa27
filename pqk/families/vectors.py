"""Cases with known answers: reading a case, and comparing what was computed with what it expects.

A case is a folder with case.json (kind, config, answers, ...), and where the kind needs them io.npz (`in_*` inputs,
`out_*` expected results, `mid_*` intermediate results) and weights.safetensors (a state dict). A table *_keys.tsv
(or .gz) of a model's weights is a case too, of the kind FAMILY_keys. A runner of a kind takes a Case and yields one
Compared per tensor. What it reads from the case counts as handled; any other `out_*` array or answer is named as not
handled.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pqk.errors import CheckFailed, PqkError

MARK = 1e-5
"""Pass mark of float32 tensors: the largest difference relative to the tensor's largest value."""
FULL_MARK = 1e-4
"""Pass mark of full-size networks."""
INFO, ARRAYS, WEIGHTS, KEYS = "case.json", "io.npz", "weights.safetensors", ("_keys.tsv", "_keys.tsv.gz")


class BadCase(PqkError):
    """A file of a case is missing, damaged, or lacks something that its kind needs. Exit code 2."""


class NotHandled(CheckFailed):
    """A case asks for something that pqk has no code for. Exit code 1."""


@dataclass(frozen=True)
class Compared:
    """One tensor that was compared. The error is infinite where shapes or integers differ; `why` then says how."""

    name: str
    error: float
    mark: float
    why: str = ""

    @property
    def passes(self) -> bool:
        """Whether the error is within the mark."""
        return self.error <= self.mark


Runner = Callable[["Case"], Iterator[Compared]]
"""Runs the cases of one kind."""


class Case:
    """One case, read safely (JSON, npz without pickles, safetensors); it notes which expected results were read.

    Raises BadCase for a file that is missing or damaged, and for an array whose type or shape is not the one that
    case.json lists.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._used: set[Any] = set()
        self.info = read_info(path)
        self.arrays = _read_arrays(path / ARRAYS) if (path / ARRAYS).exists() else {}
        for name, (dtype, shape) in _listed(self.info.get("io"), path).items():
            array = self.arrays.get(name)
            if array is None:
                raise BadCase(f"{path / ARRAYS} has no array {name}, which {INFO} lists")
            if (str(array.dtype), list(array.shape)) != (dtype, shape):
                found = f"{array.dtype} {list(array.shape)}"
                raise BadCase(f"{path / ARRAYS}: {name} is {found}, {INFO} lists {dtype} {shape}")

    @property
    def kind(self) -> str:
        """The kind, as case.json names it."""
        return str(self.need("kind"))

    def need(self, key: str) -> Any:
        """A value of case.json. Raises BadCase when it is not there."""
        if key not in self.info:
            raise BadCase(f"{self.path / INFO} has no {key!r}")
        return self.info[key]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise BadCase(f"{self.path / ARRAYS} has no array {name}, which the kind {self.kind} needs")
        self._used.add(name)
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def names(self, start: str) -> list[str]:
        """The arrays whose names begin so."""
        return [name for name in self.arrays if name.startswith(start)]

    def answer(self, *keys: str | int) -> Any:
        """A value inside `answers` of case.json, by keys and indices. Raises BadCase when it is not there."""
        value = self.peek(*keys)
        self._used.update(_leaves(value, keys))
        return value

    def peek(self, *keys: str | int) -> Any:
        """What `answer` gives, without counting it as read."""
        value = self.need("answers")
        for key in keys:
            try:
                value = value[key]
            except (LookupError, TypeError):
                raise BadCase(f"{self.path / INFO} has no {_dotted(keys)}") from None
        return value

    def weights(self, prefix: str = "") -> dict[str, Any]:
        """The tensors of weights.safetensors whose names begin so, without the prefix. Raises BadCase."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / WEIGHTS
        try:
            stored = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise BadCase(f"{path} is missing, damaged or no safetensors file: {_sentence(error)}") from error
        return {name[len(prefix) :]: value for name, value in stored.items() if name.startswith(prefix)}

    def check(self, name: str, found: Any, mark: float = MARK) -> Compared:
        """Compare with the array of that name."""
        return compare(name, found, self[name], mark)

    def check_answer(self, found: Any, *keys: str | int, mark: float, scale: float | None = None) -> Compared:
        """Compare with the answer of these keys."""
        return compare(_dotted(keys), found, self.answer(*keys), mark, scale)

    def not_compared(self) -> int:
        """How many intermediate results nothing has read; they are there to explain a difference."""
        return sum(1 for name in self.names("mid_") if name not in self._used)

    def not_handled(self) -> list[str]:
        """Names of the expected results that nothing has read, those of a common parent under its name."""
        arrays = [name for name in self.names("out_") if name not in self._used]
        read = {leaf[:end] for leaf in self._used if isinstance(leaf, tuple) for end in range(len(leaf) + 1)}
        unread = [leaf for leaf in _leaves(self.info.get("answers"), ()) if leaf not in read]
        tops = [next(leaf[:end] for end in range(len(leaf) + 1) if leaf[:end] not in read) for leaf in unread]
        return arrays + [_dotted(top) for top in dict.fromkeys(tops)]


def compare(name: str, found: Any, expected: Any, mark: float = MARK, scale: float | None = None) -> Compared:
    """Compare two tensors of any numeric kind; integers and booleans must be equal.

    The error is the largest difference relative to `scale`, by default the largest finite expected value (to 1 where
    that is 0). NaN and infinity are equal to themselves only, at the same places.
    """
    got, want = _array(found), _array(expected)
    if got.shape != want.shape:
        return Compared(name, math.inf, mark, f"its shape is {got.shape} instead of {want.shape}")
    if want.dtype.kind in "iub":
        wrong = int(np.count_nonzero(got != want))
        return Compared(name, math.inf if wrong else 0.0, 0.0, f"{wrong} of {want.size} values differ" if wrong else "")
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    wrong = int(np.count_nonzero(~finite & ~np.isclose(got, want, equal_nan=True)))
    wrong += int(np.count_nonzero(finite & ~np.isfinite(got)))
    if wrong:
        return Compared(name, math.inf, mark, f"{wrong} of {want.size} values are NaN or infinite on one side only")
    if not finite.any():
        return Compared(name, 0.0, mark)
    scale = float(np.abs(want[finite]).max()) or 1.0 if scale is None else scale
    return Compared(name, float(np.abs(got[finite] - want[finite]).max()) / scale, mark)


def compare_keys(case: Case, state: Mapping[str, Any]) -> Iterator[Compared]:
    """Compares the weights of an empty network with a table key, shape, numel, same_tensor_as.

    Names, shapes and the count of values must be equal, and weights that share memory in the one must in the other.
    Raises BadCase for another table.
    """
    with (gzip.open if case.path.suffix == ".gz" else open)(case.path, "rt", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    if not rows or not {"key", "shape", "numel", "same_tensor_as"} <= set(rows[0]):
        raise BadCase(f"{case.path} is no table with the columns key, shape, numel, same_tensor_as")
    unlike = sorted({row["key"] for row in rows} ^ set(state))
    yield Compared("keys", math.inf if unlike else 0.0, 0.0, f"{len(unlike)} names differ, first {unlike[:1]}")
    listed = sum(int(row["numel"]) for row in rows)
    yield compare("numel", sum(weight.numel() for weight in state.values()), listed)
    for row in rows:
        if row["key"] in state:
            weight, twin = state[row["key"]], row["same_tensor_as"]
            shape = "x".join(map(str, weight.shape))
            right = shape == row["shape"] and (not twin or weight is state.get(twin))
            yield Compared(row["key"], 0.0 if right else math.inf, 0.0, "" if right else f"its shape or twin: {shape}")


def draw_weights(case: Case, empty: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the weights of a full-size network by the seed rule of its case. empty: its state dict."""
    import torch

    tied, std = case.info.get("tied_keys", {}), case.need("weight_std")
    weights: dict[str, Any] = {}
    for index, (key, shaped) in enumerate(sorted(empty.items())):
        if key not in tied:
            generator = torch.Generator().manual_seed(case.need("seed") * 100003 + index)
            weights[key] = torch.randn(shaped.shape, generator=generator).mul_(std)
            if re.search(case.need("norm_regex"), key):
                weights[key] += 1
            if key.endswith(".gamma"):
                weights[key] += case.info.get("layerscale_mean", 0)
    return weights | {key: weights[twin] for key, twin in tied.items()}


def compare_probes(case: Case, weights: Mapping[str, Any]) -> Iterator[Compared]:
    """Compares drawn weights with the first values and the sums that the case has of some of them."""
    for key, probe in case.info.get("weight_probes", {}).items():
        first = probe["first"]
        yield compare(f"weight {key}", weights[key].flatten()[: len(first)], first)
        yield compare(f"sum of weight {key}", weights[key].double().sum(), probe["sum"], FULL_MARK)


def find_cases(folder: Path) -> list[Path]:
    """The cases in a folder and below, or the folder itself where it is one, by name. Raises BadCase for none."""
    if not folder.is_dir():
        raise BadCase(f"{folder} is no folder")
    try:
        files = sorted(path for path in folder.rglob("*") if path.name in (INFO, ARRAYS) or path.name.endswith(KEYS))
    except OSError as error:
        raise BadCase(f"{folder} cannot be read: {_sentence(error)}") from error
    found = list(dict.fromkeys(path if path.name.endswith(KEYS) else path.parent for path in files))
    if not found:
        raise BadCase(f"{folder} holds no case: no {INFO} is in it or below")
    return found


def read_info(path: Path) -> dict[str, Any]:
    """What case.json says; of a table of keys, its kind. Raises BadCase for a missing or damaged file."""
    if path.name.endswith(KEYS):
        return {"kind": path.name.split("_")[0] + "_keys"}
    path /= INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCase(f"{path} cannot be read: {_sentence(error)}") from error
    except (ValueError, RecursionError) as error:
        raise BadCase(f"{path} is not valid JSON: {_sentence(error)}") from error
    if not isinstance(info, dict):
        raise BadCase(f"{path} must hold one JSON object")
    return info


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # of zipfile, zlib, numpy: whatever foreign bytes lead to
        raise BadCase(f"{path} is damaged or no npz file of plain arrays: {_sentence(error)}") from error


def _listed(io: Any, path: Path) -> dict[str, tuple[str, list[int]]]:
    """The arrays that case.json lists, with type and shape; {} when it lists none."""
    try:
        return {str(name): (str(dtype), list(shape)) for name, (dtype, shape) in (io or {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise BadCase(f"{path / INFO}: 'io' must give the type and shape of every array") from None


def _leaves(value: Any, keys: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Keys of the numbers in nested lists and dicts; what is there for contrast only is no result."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not key.endswith("for_contrast"):
                yield from _leaves(item, (*keys, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*keys, index))
    elif isinstance(value, int | float):
        yield keys


def _dotted(keys: tuple[str | int, ...]) -> str:
    return ".".join(["answers", *map(str, keys)])


def _array(value: Any) -> np.ndarray:
    array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    if array.dtype.kind not in "iubf":
        raise PqkError(f"no numbers to compare, but {array.dtype}")
    return array


def _sentence(error: Exception) -> str:
    return (str(error).strip().split("\n")[0][:160] or type(error).__name__).rstrip(".")
