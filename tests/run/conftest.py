"""Makes `run_toys` importable under --import-mode=importlib, and shares one finished run among the tests."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import preloaded
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
    assert outcome.code in (0, 1, 4), outcome.err
    return root, outcome


@pytest.fixture
def copy_of(finished: tuple[Path, Outcome], tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the finished project, store included, for tests that go on from there."""
    count = iter(range(1000))

    def copy() -> Path:
        return shutil.copytree(finished[0], tmp_path / f"copy{next(count)}", symlinks=True)

    return copy


@pytest.fixture(scope="session")
def begun(finished: tuple[Path, Outcome]) -> Callable[[Path], Path]:
    """Makes projects in which nothing has run, but whose store has what B1 made: other cards need most of it, too."""

    def copy(root: Path) -> Path:
        logs = shutil.ignore_patterns("B1-*", "runs")
        return shutil.copytree(finished[0], root, symlinks=True, ignore=logs)

    return copy


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Workers that pqk starts in this process are forks, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", preloaded.python())
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, begun: Callable[[Path], Path]) -> Path:
    """A small project with B1's int8 engines exported to `int8` and the float graphs to `onnx`. Read-only for tests."""
    pytest.importorskip("openvino")
    root = begun(tmp_path_factory.mktemp("exported") / "project")
    made = pqk(root, "export", "B1", "--backend", "openvino", "--model", tiny_model, "-o", "int8")
    assert (made.code, made.out) == (0, "int8\n"), made.err
    made = pqk(
        root, "export", "B1", "--backend", "reference", "--precision", "f32", "--model", tiny_model, "-o", "onnx"
    )
    assert (made.code, made.out) == (0, "onnx\n"), made.err
    assert "kept from before" in made.err  # the float graphs are those that were quantized
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of other sizes than the input: to be shrunk, to be enlarged, upright and wide."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(3)
    for name, shape in {"a": (90, 131), "b": (140, 75), "c": (40, 51), "d": (64, 64)}.items():
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize(shape[::-1], Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder
