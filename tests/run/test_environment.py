"""A machine that refuses something: streams, temporary folders, the working directory, links, locks, names, Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from run_toys import REPOSITORY, environment, many

from pqk import files
from pqk.cli import main
from pqk.errors import PqkError, told
from pqk.files import temporary_folder
from pqk.oserrors import refusal
from pqk.result import reported

PQK = [sys.executable, "-m", "pqk.cli"]


def shell(command: str, root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which $PQK is `pqk`; its exit code is that of the first command of a pipe."""
    env = environment() | {"PQK": " ".join(PQK)} | variables
    script = f"{command}\nexit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", script], cwd=root, env=env, capture_output=True, text=True, errors="replace")


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("arguments", ["plan best", "--help"])
@pytest.mark.parametrize("reader", ["true", "head -c 1"])
def test_a_reader_that_goes_away(arguments: str, reader: str, project: Path) -> None:
    done = shell(f"$PQK {arguments} | {reader}", REPOSITORY)
    assert (done.returncode in (0, 141), done.stderr) == (True, "")
    if reader == "true":  # nobody reads, and something is printed
        assert done.returncode == 141


def test_progress_that_nobody_reads(project: Path) -> None:
    """As `pqk run ... 2>&1 | head -1`."""
    assert shell("$PQK plan bst 2>&1 | true", project).returncode in (2, 141)


def test_a_full_disk_behind_stdout(project: Path) -> None:
    for arguments in ("plan best", "--help"):
        done = shell(f"$PQK {arguments} > /dev/full", REPOSITORY)
        assert (done.returncode, done.stderr) == (2, "pqk: cannot write stdout: the disk is full\n"), arguments


def test_a_full_disk_behind_stderr(project: Path) -> None:
    assert shell("$PQK plan bst 2> /dev/full", project).returncode == 2
    assert shell("$PQK nonsense 2> /dev/full", project).returncode == 2


def test_closed_streams(project: Path) -> None:
    assert shell("$PQK plan best >&-", project).returncode == 0
    done = shell("$PQK plan bst <&- >&-", project)
    assert done.returncode == 2 and done.stderr.startswith("pqk: there is no plan 'bst'")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "latin-1:strict", "utf-8:strict"])
def test_what_an_encoding_lacks_is_replaced(encoding: str) -> None:
    code = (
        "import sys\nfrom rich.console import Console\nfrom rich.table import Table\nfrom pqk.errors import told\n"
        "def work():\n    table = Table('a', 'b')\n    table.add_row('3 – 4 ✓', 'β 深 \\udce9')\n"
        "    Console(width=40).print(table)\n    print('✓ done → β', file=sys.stderr)\n    return 0\n"
        "sys.exit(told(work))"
    )
    env = environment() | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    said = done.stdout.decode(encoding.partition(":")[0])
    assert (done.returncode, "Traceback" in done.stderr.decode("latin-1")) == (0, False), done.stderr
    if encoding.startswith("utf-8"):
        assert "3 – 4 ✓" in said and "β 深 \\xe9" in said
    else:
        assert "+ done > ?" in done.stderr.decode("latin-1") and "? ? \\xe9" in said
        assert len({len(line.rstrip()) for line in said.splitlines() if line.strip()}) <= 2, said  # columns hold


def test_the_rest_of_the_streams_stays(capsys: pytest.CaptureFixture[str]) -> None:
    """A stream that a test or another program put there is left alone."""
    assert told(lambda: print("here") or 3) == 3  # type: ignore[func-returns-value]
    assert capsys.readouterr().out == "here\n"


# ---------------------------------------------------------------- folders and links


def test_the_working_directory_is_gone(tmp_path: Path) -> None:
    for arguments in ("run B1", "plan best"):
        gone = tmp_path / "gone"
        gone.mkdir()
        done = shell(f"rmdir ../gone; $PQK {arguments}", gone)
        sentence = "pqk: the working directory is gone; change into a folder that exists\n"
        assert (done.returncode, done.stderr) == (2, sentence)


def test_no_folder_for_temporary_files() -> None:
    code = (
        "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/nowhere', '/proc']\n"
        "import sys\nfrom pqk.errors import told\nfrom pqk.store import worker\n"
        "sys.exit(told(lambda: bool(worker.call('memory', {}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("pqk: no usable temporary folder: none of /nowhere, /proc can be written; name one")


def test_loops_of_links(project: Path, tmp_path: Path) -> None:
    (project / "loop").symlink_to("other")
    (project / "other").symlink_to("loop")
    for link in ("schedule/TaskCards/X.md", "configs/joint.yaml", "logs/unified_log_schema.json"):
        (project / link).unlink(missing_ok=True)
        (project / link).symlink_to(Path(link).name)
    cases = {
        "export B1 --backend openvino -o loop": "loop",
        "export B1 --backend openvino -o loop/x": "loop/x",
        "run X --backend openvino": "X.md",
        "run B1 --backend openvino": "configs/joint.yaml",
        "table --logs loop": "loop",
        "table --reports loop": "loop",
    }
    found = many(project, tmp_path, [(None, command.split()) for command in cases])
    for (command, named), (code, said) in zip(cases.items(), found, strict=True):
        last = said.splitlines()[-1]
        assert code == 2 and last.startswith("pqk: ") and named in last, (command, said)
        assert "did you mean" not in last


def test_a_path_that_is_not_utf8_is_named(project: Path) -> None:
    odd = project.rename(project.parent / os.fsdecode(b"caf\xe9"))
    for arguments in ("table", "plan best"):
        done = shell(f"$PQK {arguments}", odd)
        assert done.returncode == 2
        sentence = f"pqk: the path of the project is not UTF-8: {project.parent}/caf\\xe9; rename that folder"
        assert done.stderr.splitlines()[-1] == sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/nowhere/x"), "cannot read /nowhere/x: permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write a file: the disk is full"),
        (OSError(errno.ENOSPC, "No space left", "a/b"), "cannot write a/b: the disk is full"),
        (OSError(errno.EROFS, "Read-only", b"a\xe9"), "cannot write a\\xe9: the file system is read-only"),
        (OSError(errno.ELOOP, "Too many levels", "l"), "cannot read l: it is a loop of symbolic links"),
        (RuntimeError("Symlink loop from 'l'"), "cannot read 'l': it is a loop of symbolic links"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "nn"), "cannot read nn: the name is too long"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "too many open files: raise the limit (ulimit -n)"),
        (RuntimeError("Could not determine home directory."), "this user has no home folder; name one in HOME"),
        (MemoryError("Unable to allocate 9 TiB"), "not enough memory: Unable to allocate 9 TiB"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), None),
        (OSError(errno.EINVAL, "Invalid argument", "x"), None),
        (RuntimeError("any other"), None),
        (ValueError("x"), None),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"), None),
    ],
)  # fmt: skip
def test_what_is_a_refusal_and_what_a_defect(error: Exception, sentence: str | None) -> None:
    assert refusal(error) == sentence


def test_a_name_inside_a_long_text() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        '{"before": "x", "name": "caf\udce9", "after": "y"}'.encode()
    assert refusal(caught.value) == r"the name 'caf\\xe9' is not UTF-8; rename the file or folder"


# ---------------------------------------------------------------- locks

NO_LOCKS = "#include <errno.h>\nint flock(int file, int how) { (void)file; (void)how; errno = CODE; return -1; }\n"


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS"])  # NFS without lockd, Lustre without -o flock
def test_a_file_system_without_locks(code: str, project: Path, tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "flock.c", tmp_path / "flock.so"
    source.write_text(NO_LOCKS)
    subprocess.run([compiler, "-shared", "-fPIC", f"-DCODE={code}", "-o", library, source], check=True)
    (project / "outputs" / "plans" / "minimal").mkdir(parents=True)
    (project / "outputs" / "plans" / "minimal" / ".lock").touch()
    store = "import sys; from pathlib import Path; from pqk.errors import told; from pqk.store.store import Store"
    make = "sys.exit(told(lambda: bool(Store(Path('s').absolute()).get_or_make('x', {}, lambda folder: None))))"
    log = "import sys; from pathlib import Path; from pqk.errors import told; from pqk.record.runlog import RunLog"
    append = "sys.exit(told(lambda: bool(RunLog(Path.cwd(), 'B1').append('began'))))"
    commands: Sequence[tuple[Sequence[str], str]] = (
        ([*PQK, "plan", "minimal", "--run", "--backend", "openvino"], "outputs/plans/minimal"),
        ([*PQK, "plan", "status", "minimal"], "outputs/plans/minimal"),
        ([sys.executable, "-c", f"{store}; {make}"], "s/.locks"),
        ([sys.executable, "-c", f"{log}; {append}"], "logs/runs"),
    )
    for command, folder in commands:
        env = environment() | {"LD_PRELOAD": str(library)}
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2, done.stderr
        assert last.startswith(f"pqk: cannot lock {project / folder}/"), last
        assert f"the file system of {project / folder} gives no file locks (" in last
        assert "running" not in done.stderr


# ---------------------------------------------------------------- killed and interrupted


def test_temporary_folders_of_the_dead_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    code = (
        "import sys, time\nfrom pqk.files import temporary_folder\n"
        "with temporary_folder('worker') as folder:\n"
        "    (folder / 'request.json').write_text('{}')\n    print(folder, flush=True)\n    time.sleep(60)\n"
    )
    env = environment() | {"TMPDIR": str(tmp_path)}
    made = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert all(process.stdout for process in made)
    dead, alive = [Path(process.stdout.readline().strip()) for process in made if process.stdout]
    made[0].kill()
    made[0].wait()
    foreign, link = tmp_path / "pqk-worker-mine", tmp_path / "pqk-worker-link"
    foreign.mkdir()  # no lock of ours in it: not ours to remove
    link.symlink_to(dead)
    assert dead.is_dir()
    with temporary_folder("tune") as own:
        assert own.is_dir() and own.parent == tmp_path
        assert not dead.exists() and alive.is_dir() and foreign.is_dir() and link.is_symlink()
        with temporary_folder("worker"):
            assert own.is_dir()
    assert not own.exists()
    made[1].kill()
    made[1].communicate()
    made[0].communicate()


def test_what_a_worker_leaves_lies_in_its_folder(tmp_path: Path) -> None:
    """A killed worker cannot clean up: its temporary files go with the folder that the parent removes."""
    code = (
        "import json, os, sys, tempfile\nfrom pqk.store import worker\n"
        'script = \'import os, tempfile; open(os.environ["SEEN"], "w").write(tempfile.mkdtemp()); os._exit(9)\'\n'
        "real = worker._run\n"
        "worker._run = lambda command, *rest: real([sys.executable, '-c', script], *rest)\n"
        "try:\n    worker.call('memory', {})\nexcept worker.WorkerCrashed:\n    pass\n"
    )
    env = environment() | {"TMPDIR": str(tmp_path), "SEEN": str(tmp_path / "seen")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    seen = Path((tmp_path / "seen").read_text())
    assert seen.parent.name.startswith("pqk-worker-") and seen.parent.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]


@pytest.mark.parametrize("verb", [["plan", "best"], ["ledger", "manifest"]])
def test_ctrl_c_is_one_line(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real SIGINT while the verb works, through the real command line."""

    def work(*arguments: object) -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        return 0

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("pqk.cli.plan_output.plan", work)
    monkeypatch.setattr("pqk.cli.ledger_output.manifest", work)
    monkeypatch.setattr(sys, "argv", ["pqk", *verb])
    with pytest.raises(SystemExit) as ended:
        main()
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    sentence = "pqk: interrupted; finished stages are kept, and the same command continues from there\n"
    assert capsys.readouterr().err == sentence


def test_a_disk_that_is_full_of_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))

    def full(*arguments: object, **named: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr(files.tempfile, "mkdtemp", full)
    with pytest.raises(PqkError, match=f"cannot write {tmp_path}: the disk is full"), temporary_folder("worker"):
        pass


def test_a_refusal_reaches_whoever_asked_for_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pqk plan --run` reads how its commands ended: a full disk is an error with a sentence, and no defect."""
    monkeypatch.setenv("PQK_RESULT", str(tmp_path / "result.json"))

    def work() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    assert told(reported(work)) == 2
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["exit_code"], found["error"]) == (2, "cannot write x: the disk is full")
