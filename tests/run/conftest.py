"""Makes `run_toys` importable under --import-mode=importlib, and shares one finished run among the tests."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from run_toys import Outcome, make_model, make_project, pqk


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A fresh small project."""
    return make_project(tmp_path / "project")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Outcome]:
    """A small project in which B1 has run once, and what it said. Read-only for tests: copy it to change it."""
    root = make_project(tmp_path_factory.mktemp("finished") / "project")
    outcome = pqk(root, "run", "B1", "--backend", "openvino", "--model", tiny_model, "--json")
    assert outcome.code in (0, 1), outcome.err
    return root, outcome


@pytest.fixture
def copy_of(finished: tuple[Path, Outcome], tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the finished project, store included, for tests that go on from there."""
    count = iter(range(1000))

    def copy() -> Path:
        return shutil.copytree(finished[0], tmp_path / f"copy{next(count)}", symlinks=True)

    return copy
