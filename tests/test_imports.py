"""What the command line may not import when it starts, and how large files and rooms may grow.

Who may import whom is import-linter's: its contracts are in pyproject.toml, and `make lint` checks them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = (
    *("torch", "openvino", "nncf", "onnx", "onnxruntime", "pandas", "scipy", "matplotlib", "openpyxl", "tensorrt"),
    "transformers",
)
SOURCES = [path for folder in ("pqk", "backends", "scripts") for path in (REPOSITORY / folder).rglob("*.py")]


def test_the_contracts_of_imports_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_no_file_is_longer_than_600_lines() -> None:
    assert len(SOURCES) > 150
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert {path.relative_to(REPOSITORY).as_posix(): n for path, n in lengths.items() if n > 600} == {}


def test_no_room_has_more_than_20_files() -> None:
    rooms = Counter(path.parent.relative_to(REPOSITORY).as_posix() for path in SOURCES if path.name != "__init__.py")
    assert {room: count for room, count in rooms.items() if count > 20} == {}


SHOW_MODULES = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


@pytest.mark.parametrize(
    "start",
    [
        "import pqk",
        "import pqk.cli",
        "import pqk.models, pqk.families.dust3r.settings, pqk.recipe, pqk.data, backends.registry",
    ],
)
def test_starting_imports_nothing_heavy(start: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{start}\n{SHOW_MODULES}"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert set(json.loads(done.stdout)) & set(HEAVY) == set()


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    """CPU time beside that of the library that makes the command line, five runs of each in turns: neither a slow
    machine nor other work on it must decide. With rich, whose layout typer takes unless asked not to, it was twice as
    much.
    """
    code = (
        "import sys\nfrom pqk.cli import main\nsys.argv = ['pqk', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + SHOW_MODULES], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "bench" in done.stdout
    assert set(json.loads(done.stdout.splitlines()[-1])) & {*HEAVY, "rich", "yaml", "pydantic", "numpy"} == set()
    seconds: dict[str, list[float]] = {"import typer": [], code: []}
    for _ in range(5):
        for ran, spent in seconds.items():
            before = os.times()
            subprocess.run([sys.executable, "-c", ran], cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)
            after = os.times()
            spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert sum(seconds[code]) < 3 * sum(seconds["import typer"]), seconds


def test_help_names_every_verb_with_a_whole_sentence() -> None:
    env = os.environ | {"COLUMNS": "100"}
    for words, verbs in (([], ("run", "ledger")), (["ledger"], ("finalize", "compare"))):
        command = [sys.executable, "-m", "pqk.cli", *words, "--help"]
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True)
        assert all(f"\n  {verb} " in done.stdout for verb in verbs)
        lines = done.stdout.splitlines()
        assert not [line for line in lines[1:] if line.endswith("...") or "\x1b" in line]
        assert max(map(len, lines)) <= 100
