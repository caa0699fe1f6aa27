"""Makes `backend_toys` importable under --import-mode=importlib, and shares the slow artifacts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="session")
def source(toy_folder):
    from backend_toys import toy_source

    return toy_source(toy_folder)
