"""What a terminal and a pipe show of a long stage."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pqk.cli.run_output import _progress

KEY = "0123456789abcdef" * 4


def shown(terminal: bool, end: str, text: str = "step 3  loss [0.5]") -> str:
    out = io.StringIO()
    report = _progress(Console(file=out, force_terminal=terminal, width=80, highlight=False))
    report("make", "qat int8", KEY, 0.0)
    report("progress", "qat int8", text, 0.25)
    report("progress", "qat int8", text, 0.5)
    report(end, "qat int8", KEY, 1.2)
    return out.getvalue()


def test_a_pipe_gets_plain_lines_now_and_then() -> None:
    assert shown(False, "done").splitlines() == [
        "  … quantization-aware training int8",
        "     25.0 %  step 3  loss [0.5]",
        "  ✓ quantization-aware training int8  1.2 s",
    ]


@pytest.mark.parametrize("end", ["done", "failed"])
def test_a_terminal_gets_a_bar_that_goes_away(end: str) -> None:
    text = shown(True, end)
    assert " 50.0 % " in text and "step 3  loss [0.5]" in text
    assert text.index("\x1b[?25l") < text.index(" 50.0 % ") < text.index("\x1b[?25h"), "the cursor comes back"
    assert text.count("\x1b[?25h") == 1
    assert "\x1b[1A\x1b[2K" in text.split("\x1b[?25h")[1], "the line of the bar is removed"


def test_a_long_text_leaves_room_for_the_bar() -> None:
    lines = shown(True, "failed", "x" * 500).replace("\r", "\n").splitlines()
    assert any(" 50.0 % " in line and "x" * 36 in line for line in lines)
    assert not any("x" * 37 in line for line in lines)
