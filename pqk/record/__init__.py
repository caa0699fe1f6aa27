"""Records, ledgers and deliverables. `frame`, which needs pandas, is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqk.record.frames import frame

__all__ = ["frame"]


def __getattr__(name: str) -> Any:
    if name == "frame":
        return import_module("pqk.record.frames").frame  # as text: no stage's key depends on it
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
