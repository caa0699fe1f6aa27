"""How a command ended, as data for the program that started it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import preloaded
import pytest
from run_toys import environment

from pqk.errors import PqkError
from pqk.result import VARIABLE, reported


def result_of(root: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """`pqk WORDS` as a process that is asked for its result."""
    answer = root / "answer.json"
    variables = environment() | {VARIABLE: str(answer)}
    command = [preloaded.python(), "-m", "pqk.cli", *words]
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True)
    return done.returncode, json.loads(answer.read_text())


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (("plan", "medium", "--device", "T4"), 2, "--device T4: hours are known for H100, A100"),
        (("plan", "medium", "--json"), 0, None),
        (("plan", "medium", "--no-such-option"), 2, None),
    ],
)
def test_what_a_command_leaves(project: Path, words: tuple[str, ...], code: int, error: str | None) -> None:
    assert result_of(project, *words) == (code, {"exit_code": code, "error": error})


def test_only_the_command_itself_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it starts does not see the request; a defect and a refusal are told too; a lost folder ends nothing."""
    answer = tmp_path / "answer.json"
    seen: list[bool] = []

    def asked() -> None:
        monkeypatch.setenv(VARIABLE, str(answer))

    def fails(error: Exception) -> Any:
        seen.append(VARIABLE in os.environ)
        raise error

    for error, code, text in [
        (PqkError("two\n lines"), 2, "two lines"),
        (KeyError("x"), None, "KeyError('x')"),
        (MemoryError(), 2, "not enough memory"),
    ]:
        asked()
        with pytest.raises(type(error)):
            reported(lambda error=error: fails(error))()  # type: ignore[misc]
        assert json.loads(answer.read_text()) == {"exit_code": code, "error": text}
    assert seen == [False] * 3
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "answer.json"))
    (tmp_path / "file").write_text("")
    assert reported(lambda: 4)() == 4
