"""Finds a model by its name on the Hugging Face Hub in the local cache: `cached`. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pqk.errors import PqkError

_NAME = re.compile(r"[\w.-]+/[\w.-]+\Z")
_FILES = ("model.safetensors", "model.pt")


def cached(asked: str) -> str:
    """Returns the folder or file in the cache for a hub name such as OWNER/NAME; anything else as it is.

    A path that exists, or lies in a folder that does, is never taken for a name. Raises PqkError for a name that is not
    in the cache, with what to do.
    """
    owner, _, name = asked.partition("/")
    if not _NAME.match(asked) or ".." in asked or Path(asked).exists() or Path(owner).is_dir():
        return asked
    places = [place / f"models--{owner}--{name}" for place in _caches()]
    found = [path for place in places for path in place.glob("snapshots/*") if any((path / f).exists() for f in _FILES)]
    if not found:
        looked = ", ".join(map(str, _caches()))
        raise PqkError(
            f"no such model: {asked} is neither a file nor a folder here, nor in the hub's cache ({looked}); download "
            f"model.safetensors and config.json of https://huggingface.co/{asked} into a folder and give its path"
        )
    newest = max(found, key=lambda path: path.stat().st_mtime)
    whole = (newest / _FILES[0]).exists() and (newest / "config.json").exists()
    return str(newest if whole else next(newest / f for f in _FILES if (newest / f).exists()))


def _caches() -> list[Path]:
    """Returns the folders where the hub's library keeps models; see its page on environment variables."""
    named = [os.environ.get("HF_HUB_CACHE"), os.environ.get("HF_HOME") and f"{os.environ['HF_HOME']}/hub"]
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return [Path(place).expanduser() for place in named if place] or [Path(home, "huggingface", "hub").expanduser()]
