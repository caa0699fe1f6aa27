"""Checks of what is asked of a quantizer: what it can do at all, before anything is made, and the rest of a spec.

A quantizer says what it can do in attributes, all of them optional: `bits` (see `lowered_to`); `follows`, settings of
`QuantSpec` with the values that it takes (any value for those that are not listed); `needs`, modules that it imports
and that may be missing, and `mend`, the command that installs them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backends.base import BackendError, Quantizer, QuantSpec, Source, Unavailable, lowered_to, nearest

WEIGHT_RANGES = ("auto", "full", "half")


def check_settings(quantizer: Quantizer, asked: Any, others: Iterable[Quantizer] = (), section: str = "") -> None:
    """Refuse what `quantizer` cannot do at all. `asked` has the settings of a `QuantSpec` as attributes.

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
        mend = f"; {quantizer.mend}" if hasattr(quantizer, "mend") else ""
        raise Unavailable(f"quantizer {quantizer.name!r} cannot run: no module named {', '.join(missing)}{mend}")


def _follows(quantizer: Quantizer) -> dict[str, tuple[Any, ...]]:
    return dict(getattr(quantizer, "follows", {}))


def _instead(able: list[str]) -> str:
    return f"; take --quantizer {' or '.join(able)}" if able else ""


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check_common(spec: QuantSpec, source: Source) -> None:
    """Raises BackendError for an unknown weight range, fewer than one calibration item, or a name that is a path."""
    if spec.weight_range not in WEIGHT_RANGES:
        hint = nearest(spec.weight_range, WEIGHT_RANGES)
        raise BackendError(f"weight_range must be one of {list(WEIGHT_RANGES)}, got {spec.weight_range!r}{hint}")
    if spec.calibration_samples < 1:
        raise BackendError(f"calibration_samples must be at least 1, got {spec.calibration_samples}")
    if not source.name or Path(source.name).name != source.name:
        raise BackendError(f"a graph's name must be a plain file name, got {source.name!r}")
