"""Worker processes that fail: what the caller gets. Each runs the real `call` with a task that is made to fail."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from run_toys import environment

from pqk.errors import EXIT_CRASH, PqkError, told
from pqk.store import worker


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """A request without its key is what a defect of pqk looks like in a worker: exit code 70."""
    with pytest.raises(worker.WorkerCrashed) as caught:
        worker.call("memory", {})
    assert not isinstance(caught.value, PqkError)

    def again() -> int:
        raise caught.value

    assert told(again) == EXIT_CRASH
    said = capsys.readouterr().err
    assert "the memory process ended with exit code 1" in said
    assert "KeyError: 'variant'" in said
    assert 'worker.py", line' in said, "the frames of the worker"


def test_an_end_without_an_answer() -> None:
    killed = worker._no_answer("quality", -9, "")
    assert isinstance(killed, PqkError)
    assert str(killed) == "the quality process was killed (SIGKILL), probably out of memory"
    full = worker._no_answer("quality", worker._CANNOT_WRITE, "a warning\ncannot write x: the disk is full")
    assert isinstance(full, PqkError)
    assert str(full) == "cannot write x: the disk is full"
    crashed = worker._no_answer("timing", -11, "first\nlast")
    assert not isinstance(crashed, PqkError)
    assert str(crashed) == "the timing process ended with SIGSEGV:\nfirst\nlast"


def fake_worker(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A real process, that runs `script` instead of the worker."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: start([sys.executable, "-c", script], **options))


def test_a_killed_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_worker(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(PqkError, match=r"the timing process was killed \(SIGKILL\), probably out of memory"):
        worker.call("timing", {})


def test_bytes_that_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_worker(monkeypatch, r"import os; os.write(2, b'vendor \xff\xfe says'); os._exit(3)")
    with pytest.raises(worker.WorkerCrashed, match=r"exit code 3:\nvendor \ufffd+ says"):
        worker.call("timing", {})


def test_a_full_disk_of_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PqkError, match=r"cannot write \S+request\.json: the disk is full"):
        worker.call("memory", {})


def test_it_does_not_import_from_the_current_folder(tmp_path: Path) -> None:
    """A user's own random.py and json.py where he runs pqk are not taken for those of Python."""
    for name in ("random", "json", "numpy", "backends"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    script = (
        "import os, sys\n"
        "from pqk.store import worker\n"
        "os.chdir(sys.argv[1])\n"
        "try:\n"
        "    worker.call('memory', {})\n"
        "except worker.WorkerCrashed as error:\n"
        "    print(error)\n"
    )
    variables = environment() | {"PYTHONPATH": environment()["PYTHONPATH"] + ":"}  # an empty entry: the current folder
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, tmp_path], env=variables, text=True, capture_output=True, check=True
    )
    assert "KeyError: 'variant'" in done.stdout, done.stdout
