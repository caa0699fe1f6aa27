"""Picks the device of a training: `pick_device`."""

from __future__ import annotations

import os
import re

import torch

from pqk.errors import PqkError, nearest


def pick_device(name: str) -> torch.device:
    """Returns the device; 'auto' is CUDA where there is one. Raises PqkError for an unknown or unavailable device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise PqkError(
            f"unknown device {name!r}{nearest(name, ('auto', 'cpu', 'cuda'))}; allowed are auto, cpu and cuda[:n]"
        )
    if name == "cpu":
        return torch.device(name)
    if "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    there = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= there:
        raise PqkError(f"device {name!r} was asked for, but torch sees {there} CUDA devices; use --device cpu")
    return torch.device(name)
