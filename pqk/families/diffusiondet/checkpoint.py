"""Reads official DiffusionDet files: published and training checkpoints, and backbones to start from.

A published file holds the weights under `model`, a training file also `ema_state`, the moving average of the same
weights. No file holds the configuration; the sizes are in the shapes. Attention heads, the signal scale and the number
of proposals are not: they are those of the released models unless they are given.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pqk.errors import PqkError, first_line
from pqk.families.diffusiondet.sampling import schedule
from pqk.families.diffusiondet.settings import SIGN
from pqk.files import check_readable

AVERAGE = "ema_state"
NOT_OFFICIAL = "it is not an official DiffusionDet checkpoint"
_HEADLESS = ("stem.fc.", "fc.")
"""Of an image classifier's last layer, in a backbone's file."""
_LARGEST_BACKBONE = 2**31


def official(content: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Returns configuration and weights of an official checkpoint: a state dict under `model`, or a bare one.

    None when it is another family's. Raises PqkError for one that is damaged.
    """
    if not isinstance(content, Mapping):
        return None
    inner = content.get("model")
    weights = inner if isinstance(inner, Mapping) and SIGN in inner else content
    return _read(weights) if SIGN in weights else None


def averaged(content: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns configuration and weights of the moving average in a training file. Raises PqkError where it has none."""
    found = content.get(AVERAGE) if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping) or SIGN not in found:
        raise PqkError(f"it holds no moving average of weights ({AVERAGE} with {SIGN})")
    return _read(found)


def read_backbone(path: Path) -> dict[str, Tensor]:
    """Returns the weights of a backbone's file under the names of the detector: `backbone.bottom_up.` and so on.

    The file is a pickle of a dict whose `model` holds numpy arrays by name; nothing but arrays and plain data is read.
    Raises PqkError in one sentence for any other file.
    """
    check_readable(path)
    if path.stat().st_size > _LARGEST_BACKBONE:
        raise PqkError(f"{path} has more than {_LARGEST_BACKBONE} bytes, which no backbone's file has")
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()  # of Python 2 too
    except PqkError as error:
        raise PqkError(f"{path} {error}") from None
    except Exception as error:  # of pickle and numpy: whatever foreign bytes lead to
        raise PqkError(f"{path} is damaged or no file of a backbone: {first_line(error)}") from error
    arrays = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(arrays, Mapping) or "stem.conv1.weight" not in arrays:
        raise PqkError(f"{path} is no file of a backbone: it has no 'model' with stem.conv1.weight")
    found: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise PqkError(f"{path}: {name!r} is no array of floating-point numbers")
        if not name.startswith(_HEADLESS):
            found[f"backbone.bottom_up.{name}"] = torch.from_numpy(array.astype(np.float32))
    return found


def infer_config(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of weights from their shapes. Raises PqkError for a missing weight.

    Where attention is biased by geometry its heads are in the shapes too.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in weights:
            raise PqkError(f"it is no complete DiffusionDet checkpoint: it lacks {key}")
        return tuple(weights[key].shape)

    def numbers(pattern: str) -> set[int]:
        return {int(match[1]) for key in weights if (match := re.match(pattern, key))}

    stage, bottom = "head.head_series.0.", "backbone.bottom_up."
    stages = len(numbers(r"head\.head_series\.(\d+)\."))

    def widths(key: str) -> int | list[int]:
        found = [shape(f"head.head_series.{index}.{key}")[0] for index in range(stages)]
        return found[0] if len(set(found)) == 1 else found

    config: dict[str, Any] = {
        "hidden_dim": shape(f"{stage}norm1.weight")[0],
        "dim_feedforward": widths("linear1.weight"),
        "dim_dynamic": widths("inst_interact.norm1.weight"),
        "num_heads": stages,
        "num_classes": shape(f"{stage}class_logits.weight")[0],
        "num_cls": len(numbers(re.escape(stage) + r"cls_module\.(\d+)\.bias")),
        "num_reg": len(numbers(re.escape(stage) + r"reg_module\.(\d+)\.bias")),
        "blocks": [len(numbers(re.escape(bottom) + rf"res{group}\.(\d+)\.")) for group in range(2, 6)],
        "stem_out": shape(f"{bottom}stem.conv1.weight")[0],
        "res2_out": shape(f"{bottom}res2.0.conv3.weight")[0],
        "width_per_group": shape(f"{bottom}res2.0.conv1.weight")[0],
    }
    inner = [
        [shape(f"{bottom}res{level + 2}.{block}.conv1.weight")[0] for block in range(blocks)]
        for level, blocks in enumerate(config["blocks"])
    ]
    if any(width != config["width_per_group"] << level for level, group in enumerate(inner) for width in group):
        config["inner"] = inner
    if f"{stage}quality_logit.weight" in weights:
        config["quality_head"] = True
    if f"{stage}geo_feat.0.weight" in weights:
        config["geo_feat"] = True
    if f"{stage}geo_bias.0.weight" in weights:
        kind, last = ("mlp", 2) if f"{stage}geo_bias.2.weight" in weights else ("relation", 0)
        heads = shape(f"{stage}geo_bias.{last}.weight")[0]
        config |= {"geo_bias": True, "geo_bias_type": kind, "nheads": heads}
    if "head.label_embed.weight" in weights:
        config["label_state"] = "sample"
    return config


def _read(weights: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise PqkError(f"{NOT_OFFICIAL}: {key!r} is no tensor")
    try:
        config = infer_config(weights)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):  # of shapes that no network has
        raise PqkError(f"{NOT_OFFICIAL}: its weights have impossible shapes") from None
    _check_schedule(weights)
    return config, dict(weights)


def _check_schedule(weights: Mapping[str, Tensor]) -> None:
    """Raises PqkError for a noise schedule that is not the one that is sampled with here."""
    for name in schedule.NAMES:
        found = weights.get(name)
        if found is None:
            continue
        right = tuple(found.shape) == (schedule.TIMES,)
        if right and not found.is_meta:
            ours = torch.from_numpy(schedule.tables()[name])
            right = torch.allclose(found.detach().cpu().double(), ours, rtol=1e-2, atol=1e-6)
        if not right:
            raise PqkError(f"its noise schedule is not the cosine one of {schedule.TIMES} times: {name} differs")


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of numpy arrays and plain data."""

    _TYPES = ("ndarray", "dtype", "_reconstruct", "scalar")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # bytes of arrays in pickles of protocol 2
            return super().find_class(module, name)
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in self._TYPES:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise PqkError(f"is not safe to read: it holds the type {module}.{name}, not only arrays")
