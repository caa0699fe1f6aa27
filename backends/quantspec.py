"""Checks of a `QuantSpec` that every quantizer makes."""

from __future__ import annotations

from pathlib import Path

from backends.base import BackendError, QuantSpec, Source, nearest

WEIGHT_RANGES = ("auto", "full", "half")


def check_common(spec: QuantSpec, source: Source) -> None:
    """Raises BackendError for an unknown weight range, fewer than one calibration item, or a name that is a path."""
    if spec.weight_range not in WEIGHT_RANGES:
        hint = nearest(spec.weight_range, WEIGHT_RANGES)
        raise BackendError(f"weight_range must be one of {list(WEIGHT_RANGES)}, got {spec.weight_range!r}{hint}")
    if spec.calibration_samples < 1:
        raise BackendError(f"calibration_samples must be at least 1, got {spec.calibration_samples}")
    if not source.name or Path(source.name).name != source.name:
        raise BackendError(f"a graph's name must be a plain file name, got {source.name!r}")
