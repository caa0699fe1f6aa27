"""Who may import whom, and what the command line may not import when it starts."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "openvino", "nncf", "onnx", "onnxruntime", "pandas", "scipy", "matplotlib", "openpyxl", "tensorrt")
SHOWS_BACKENDS = {"pqk.env"}
"""Outside pqk/run, who may look at the toolchains: what only tells about them."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports anywhere, in functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            found.update({node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # 'module:object', as the lazy registries name what they import.
            head, colon, tail = node.value.partition(":")
            if colon and tail.isidentifier() and head.split(".")[0] in ("pqk", "backends"):
                found.add(head)
    return found


MODULES = {
    module_name(path): imported(path) for folder in ("pqk", "backends") for path in (REPOSITORY / folder).rglob("*.py")
}


def within(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(package + ".")}


def test_the_walk_sees_something() -> None:
    assert len(MODULES) > 50
    assert within(MODULES["pqk.recipe.runner"], "backends")
    assert within(MODULES["backends.registry"], "backends.openvino")
    assert within(MODULES["pqk.families.registry"], "pqk.families.dust3r.model")


def test_backends_never_import_pqk() -> None:
    assert {
        name: bad for name, used in MODULES.items() if name.startswith("backends") and (bad := within(used, "pqk"))
    } == {}


def test_only_the_runner_touches_both_a_model_and_a_backend() -> None:
    both = {n for n, used in MODULES.items() if within(used, "pqk.models") and within(used, "backends")}
    assert both
    assert {name for name in both if not name.startswith("pqk.run.")} == set()


def test_who_uses_backends() -> None:
    users = {n for n, used in MODULES.items() if n.startswith("pqk") and within(used, "backends")}
    outside = {name for name in users if not name.startswith("pqk.run.")}
    assert outside <= SHOWS_BACKENDS | {name for name in users if name.startswith("pqk.report.")}
    assert not [name for name in outside if within(MODULES[name], "pqk.models")]


def test_models_do_not_know_the_runner() -> None:
    for name in MODULES:
        if name.startswith(("pqk.models", "pqk.data", "pqk.measure")):
            assert within(MODULES[name], "pqk.run") == within(MODULES[name], "pqk.cli") == set(), name


SHOW_MODULES = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


@pytest.mark.parametrize(
    "start", ["import pqk", "import pqk.cli", "import pqk.models, pqk.run, pqk.data, backends.registry"]
)
def test_starting_imports_nothing_heavy(start: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{start}\n{SHOW_MODULES}"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert set(json.loads(done.stdout)) & set(HEAVY) == set()


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    """CPU time, as other work on the machine must not decide; the best of five.

    With rich, whose layout typer takes unless it is asked not to, it was twice as much.
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
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        spent = (after.children_user + after.children_system) - (before.children_user + before.children_system)
        seconds.append(spent)
    assert min(seconds) < 0.25, seconds


def test_help_names_every_verb_with_a_whole_sentence() -> None:
    env = os.environ | {"COLUMNS": "100"}
    for words, verbs in (([], ("run", "ledger")), (["ledger"], ("finalize", "compare"))):
        command = [sys.executable, "-m", "pqk.cli", *words, "--help"]
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True)
        assert all(f"\n  {verb} " in done.stdout for verb in verbs)
        lines = done.stdout.splitlines()
        assert not [line for line in lines[1:] if line.endswith("...") or "\x1b" in line]
        assert max(map(len, lines)) <= 100
