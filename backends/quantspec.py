"""Checks a request to a quantizer: first what it supports at all, before anything is made, then the rest of the spec.

A quantizer says what it can do in attributes, all of them optional: `bits` (see `lowered_to`); `follows`, settings of
`QuantSpec` with the values that it takes (any value for those that are not listed); `needs`, modules that it imports
and that may be missing, and `remedy`, the command that installs them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.base import BackendError, Quantizer, QuantSpec, Source, Unavailable, lowered_to, nearest

if TYPE_CHECKING:
    import torch

WEIGHT_RANGES = ("auto", "full", "half")
_SHOWN = 8  # channels of a layer, and layers, that a note lists


def check_settings(quantizer: Quantizer, asked: Any, others: Iterable[Quantizer] = (), section: str = "") -> None:
    """Refuses what `quantizer` cannot do at all. `asked` has the settings of a `QuantSpec` as attributes.

    The sentence names the setting, `section` before it, and those of `others` that can. Raises BackendError.
    """
    try:
        lowered_to(quantizer, asked.bits_w, asked.bits_a)
    except BackendError as error:
        able = [q.name for q in others if (asked.bits_w, asked.bits_a) in getattr(q, "bits", ((8, 8),))]
        raise BackendError(f"{error}{_instead(able)}") from None
    for setting, takes in _follows(quantizer).items():
        value = getattr(asked, setting)
        if value in takes:
            continue
        able = [q.name for q in others if value in _follows(q).get(setting, (value,))]
        known = " or ".join(map(_shown, takes))
        raise BackendError(
            f"{section}{setting} is {_shown(value)}, and the quantizer {quantizer.name!r} takes {known} alone"
            f"{_instead(able)}"
        )


def check_installed(quantizer: Quantizer) -> None:
    """Raises Unavailable when a module that `quantizer` imports is missing; nothing is imported."""
    missing = [name for name in getattr(quantizer, "needs", ()) if not importlib.util.find_spec(name)]
    if missing:
        remedy = f"; {quantizer.remedy}" if hasattr(quantizer, "remedy") else ""
        raise Unavailable(f"quantizer {quantizer.name!r} cannot run: no module named {', '.join(missing)}{remedy}")


def _follows(quantizer: Quantizer) -> dict[str, tuple[Any, ...]]:
    return dict(getattr(quantizer, "follows", {}))


def _instead(able: list[str]) -> str:
    return f"; take --quantizer {' or '.join(able)}" if able else ""


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check_left(graph: str, able: Iterable[str], kept: Iterable[str], keep: Sequence[str]) -> None:
    """Refuses a graph of which nothing would be quantized, with one sentence for all quantizers.

    able: its matmuls and convolutions that the quantizer lowers; kept: those nodes that the keep-list `keep` protects.
    Raises BackendError.
    """
    if set(able) <= set(kept):
        raise nothing_left(graph, keep)


def lost_channels(tool: str, layers: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> list[str]:
    """Returns a note on output channels whose weights are rounded to one step of the quantizer or to none.

    layers: name, largest magnitude of each output channel's weights, and the steps that this is, both of shape
    (channels,). Channels that are zero in float are none of them.
    """
    lost = []
    for name, magnitudes, steps in layers:
        channels = np.flatnonzero((magnitudes > 0) & (np.rint(steps) <= 1)).tolist()
        if channels:
            lost.append((name, channels))
    if not lost:
        return []
    count = sum(len(channels) for _, channels in lost)
    listed = _short([f"{name} {_short([str(channel) for channel in channels], ', ')}" for name, channels in lost], "; ")
    return [f"{tool} leaves output channels of very small weights one step or none ({count} in all): {listed}"]


def _short(words: list[str], sign: str) -> str:
    more = f"{sign}and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return sign.join(words[:_SHOWN]) + more


class NothingLeft(BackendError):
    """Reports a graph of which nothing would be quantized. Beside others that are, it can stay in float."""


def nothing_left(graph: str, keep: Sequence[str]) -> NothingLeft:
    """Returns the error for a graph of which nothing is quantized."""
    listed = f"the keep-list ({', '.join(keep)})" if keep else "the keep-list (empty)"
    return NothingLeft(
        f"{graph}: nothing is left to quantize: {listed} leaves it no matmul or convolution that can be lowered; "
        "keep less of this graph, or run without quantization"
    )


def check_common(spec: QuantSpec, source: Source) -> None:
    """Raises BackendError for an unknown weight range, fewer than one calibration item, or a name that is a path."""
    if spec.weight_range not in WEIGHT_RANGES:
        hint = nearest(spec.weight_range, WEIGHT_RANGES)
        raise BackendError(f"weight_range must be one of {list(WEIGHT_RANGES)}, got {spec.weight_range!r}{hint}")
    if spec.calibration_samples < 1:
        raise BackendError(f"calibration_samples must be at least 1, got {spec.calibration_samples}")
    if not source.name or Path(source.name).name != source.name:
        raise BackendError(f"a graph's name must be a plain file name, got {source.name!r}")
    alpha = spec.smooth_quant_alpha
    if alpha is not None and not 0 <= alpha <= 1:
        raise BackendError(f"smooth_quant_alpha must lie in [0, 1] or be null, got {alpha}")


def module_of(source: Source, tool: str) -> torch.nn.Module:
    """Returns the module of `source`. Raises BackendError where it, its example inputs, or an input of its graph is
    missing; `tool` is the subject of the message."""
    if source.module is None or not source.example:
        raise BackendError(f"{tool} starts from a torch module and example inputs: give both")
    have, want = list(source.example), [t.name for t in source.graph.inputs]
    if have != want:
        raise BackendError(f"the example's inputs {have} are not those of the graph, {want}")
    return source.module
