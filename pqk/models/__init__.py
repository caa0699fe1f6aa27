"""Model families. `load_model`, `build_model` and `save_model` import torch only when they are first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqk.families.build import build_model
    from pqk.families.checkpoint import load_model, save_model

__all__ = ["build_model", "load_model", "save_model"]


def __getattr__(name: str) -> Any:
    if name == "build_model":
        from pqk.families.build import build_model

        return build_model
    if name in ("load_model", "save_model"):
        from pqk.families import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
