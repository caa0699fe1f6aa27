"""The artifact store: reuse, damage, real kills, real concurrency."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.errors import PqkError
from pqk.files import sha256_json
from pqk.recipe.stages import provenance
from pqk.store import store
from pqk.store.store import MANIFEST, Store

REPOSITORY = Path(__file__).resolve().parents[2]
CONTENT = {"a.bin": bytes(range(256)) * 40, "deep/b.txt": "grün".encode()}


def write_content(folder: Path) -> None:
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def files_of(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found.pop(MANIFEST)
    return found


def leftovers(root: Path) -> list[str]:
    return [p.name for p in root.rglob("*.tmp")]


class Events(list[str]):
    def __call__(self, kind: str, stage: str, key: str, seconds: float) -> None:
        assert seconds >= 0
        assert len(key) == 64
        self.append(kind)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    prelude = "import os, signal, sys, time\nfrom pathlib import Path\nfrom pqk.store.store import Store\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(script), *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_made_once_then_reused(tmp_path: Path) -> None:
    store, events = Store(tmp_path), Events()
    made = store.get_or_make("export", {"x": 1}, write_content, events)
    again = store.get_or_make("export", {"x": 1}, lambda folder: pytest.fail("made twice"), events)
    assert (made.reused, again.reused) == (False, True)
    assert events == ["make", "done", "reuse"]
    assert made.path == again.path == tmp_path / "export" / made.key[:16]
    assert made.manifest == again.manifest
    assert files_of(again.path) == CONTENT
    assert again.manifest["inputs"] == {"x": 1}
    assert again.manifest["files"]["a.bin"]["bytes"] == len(CONTENT["a.bin"])
    assert not leftovers(tmp_path)


def test_an_artifact_keeps_the_commit_that_made_it(tmp_path: Path) -> None:
    """It is no part of the key: another commit with the same code reuses the artifact, which says who made it."""
    made = Store(tmp_path, commit="one").get_or_make("timing", {}, write_content)
    again = Store(tmp_path, commit="two").get_or_make("timing", {}, lambda folder: pytest.fail("made twice"))
    assert again.reused and again.key == made.key
    assert provenance(again) == {"measured_at": made.manifest["created"], "measured_commit": "one"}
    path = made.path / MANIFEST
    old = {name: value for name, value in made.manifest.items() if name != "commit"}  # as earlier versions wrote it
    path.write_text(json.dumps(old | {"sha256": sha256_json(old)}))
    kept = Store(tmp_path, commit="two").get_or_make("timing", {}, lambda folder: pytest.fail("made twice"))
    assert provenance(kept) == {"measured_at": made.manifest["created"], "measured_commit": None}
    path.write_text(json.dumps({**old, "commit": "forged", "sha256": sha256_json(old)}))
    anew = Store(tmp_path, commit="two").get_or_make("timing", {}, write_content)
    assert not anew.reused and provenance(anew)["measured_commit"] == "two"


def test_other_inputs_or_stage_is_another_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = {
        store.get_or_make(stage, {"x": x}, write_content).key
        for stage in ("export", "quantize")
        for x in (1, "1", True)
    }
    assert len(keys) == 6


@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.99])
def test_one_changed_byte_is_found_and_rebuilt(tmp_path: Path, name: str, where: float) -> None:
    store, events = Store(tmp_path), Events()
    path = store.get_or_make("export", {"x": 1}, write_content).path
    data = bytearray((path / name).read_bytes())
    data[int(where * len(data))] ^= 1
    (path / name).write_bytes(data)
    again = store.get_or_make("export", {"x": 1}, write_content, events)
    if name != MANIFEST or events != ["reuse"]:  # a changed blank between two keys changes nothing
        assert events == ["damaged", "make", "done"]
        assert not again.reused
    assert files_of(again.path) == CONTENT
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: (path / "a.bin").unlink(),
        lambda path: (path / "a.bin").write_bytes(b""),
        lambda path: (path / "surplus").write_text("x"),
        lambda path: (path / MANIFEST).unlink(),
        lambda path: (path / MANIFEST).write_text((path / MANIFEST).read_text()[:100]),
        lambda path: (path / MANIFEST).write_text("[]"),
        lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"),
        lambda path: [(path / "a.bin").unlink(), (path / "a.bin").symlink_to("/dev/zero")],
        lambda path: [path.rename(path.with_name("aside")), path.write_text("a file, not a folder")],
        lambda path: [path.rename(path.with_name("aside")), path.symlink_to(path.with_name("aside"))],
    ],
    ids=["missing", "empty", "surplus", "nomanifest", "cut", "list", "notutf8", "link", "file", "linkedfolder"],
)
def test_damage_is_rebuilt(tmp_path: Path, harm: Any) -> None:
    store, events = Store(tmp_path), Events()
    harm(store.get_or_make("export", {"x": 1}, write_content).path)
    again = store.get_or_make("export", {"x": 1}, write_content, events)
    assert events == ["damaged", "make", "done"]
    assert files_of(again.path) == CONTENT
    assert store.get_or_make("export", {"x": 1}, write_content).reused


def test_a_manifest_of_another_key_is_not_believed(tmp_path: Path) -> None:
    store, events = Store(tmp_path), Events()
    one = store.get_or_make("export", {"x": 1}, write_content).path
    other = store.root / "export" / store.key("export", {"x": 2})[:16]
    one.rename(other)
    store.get_or_make("export", {"x": 2}, write_content, events)
    assert events == ["damaged", "make", "done"]


def test_a_changed_value_in_the_manifest_is_found(tmp_path: Path) -> None:
    store, events = Store(tmp_path), Events()
    path = store.get_or_make("export", {"x": 1}, write_content).path / MANIFEST
    path.write_text(path.read_text().replace('"x": 1', '"x": 2'))
    store.get_or_make("export", {"x": 1}, write_content, events)
    assert events == ["damaged", "make", "done"]


def test_failure_keeps_nothing_and_frees_the_lock(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(folder: Path) -> None:
        write_content(folder)
        raise ValueError("no convergence")

    with pytest.raises(ValueError, match="no convergence"):
        store.get_or_make("train", {}, fail)
    assert not leftovers(tmp_path)
    assert not store.get_or_make("train", {}, write_content).reused


def test_nested_stages(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def outer(folder: Path) -> None:
        inner = store.get_or_make("export", {}, write_content)
        (folder / "copy").write_bytes((inner.path / "a.bin").read_bytes())

    assert files_of(store.get_or_make("quantize", {}, outer).path) == {"copy": CONTENT["a.bin"]}


# A child that kills itself with SIGKILL at its n-th call of one of the functions that touch the disk.
KILLED = """
    root, nth = Path(sys.argv[1]), int(sys.argv[2])
    calls = 0
    def deadly(function):
        def wrapped(*args, **kwargs):
            global calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapped
    os.fsync = deadly(os.fsync)
    os.unlink = deadly(os.unlink)
    os.rmdir = deadly(os.rmdir)
    for name in ("rename", "replace", "write_bytes", "mkdir"):
        setattr(Path, name, deadly(getattr(Path, name)))
    def make(folder):
        (folder / "a.bin").write_bytes(bytes(range(256)) * 40)
        (folder / "deep").mkdir()
        (folder / "deep/b.txt").write_bytes("gr\\u00fcn".encode())
    print(Store(root).get_or_make("export", {"x": 1}, make).reused)
"""


@pytest.mark.parametrize("before", ["absent", "damaged"])
def test_kill_9_at_every_step_then_rerun(tmp_path: Path, before: str) -> None:
    kills = 0
    for nth in range(1, 60):
        root = tmp_path / str(nth)
        store = Store(root)
        if before == "damaged":
            path = store.get_or_make("export", {"x": 1}, write_content).path
            (path / "a.bin").write_bytes(b"damaged")
        child = start(KILLED, root, nth)
        out, err = child.communicate(timeout=60)
        for folder in (root / "export").glob("[0-9a-f]*"):
            assert (folder / MANIFEST).exists()
            complete = [CONTENT, CONTENT | {"a.bin": b"damaged"}] if before == "damaged" else [CONTENT]
            assert files_of(folder) in complete, f"a half-made artifact is visible after kill {nth}"
        again = store.get_or_make("export", {"x": 1}, write_content)
        assert files_of(again.path) == CONTENT
        assert store.get_or_make("export", {"x": 1}, lambda folder: pytest.fail("not reused")).reused
        assert not leftovers(root)
        if child.returncode == 0:
            assert out.strip() == "False"
            break
        assert child.returncode == -signal.SIGKILL, err
        kills += 1
    else:
        pytest.fail("the child never finished")
    assert kills >= 12


def test_kill_9_in_the_middle_of_a_long_make(tmp_path: Path) -> None:
    child = start(
        """
        def make(folder):
            (folder / "half.bin").write_bytes(b"x" * 1000)
            print("begun", flush=True)
            time.sleep(60)
        Store(Path(sys.argv[1])).get_or_make("train", {}, make)
        """,
        tmp_path,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    assert len(leftovers(tmp_path)) == 1
    Store(tmp_path).get_or_make("train", {"other": 1}, write_content)
    assert len(leftovers(tmp_path)) == 1, "the temporary folder of a living process must stay"
    child.kill()
    child.wait()
    events = Events()
    Store(tmp_path).get_or_make("train", {"other": 2}, write_content)
    assert not leftovers(tmp_path), "another artifact of the stage cleans up after the dead"
    assert files_of(Store(tmp_path).get_or_make("train", {}, write_content, events).path) == CONTENT
    assert events == ["make", "done"]


RACER = """
    root, go, log = map(Path, sys.argv[1:4])
    def make(folder):
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\\n")
        time.sleep(0.5)
        (folder / "who").write_text(str(os.getpid()))
    print("ready", flush=True)
    while not go.exists():
        time.sleep(0.001)
    kinds = []
    artifact = Store(root).get_or_make("export", {"x": sys.argv[4]}, make, lambda kind, *rest: kinds.append(kind))
    print((artifact.path / "who").read_text(), artifact.reused, *kinds)
"""


def race(tmp_path: Path, values: list[str]) -> tuple[list[list[str]], list[str]]:
    go, log = tmp_path / "go", tmp_path / "log"
    children = [start(RACER, tmp_path / "store", go, log, value) for value in values]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    go.touch()
    answers = []
    for child in children:
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        answers.append(out.split())
    return answers, log.read_text().split()


def test_processes_with_one_key_make_once(tmp_path: Path) -> None:
    answers, makers = race(tmp_path, ["same"] * 3)
    assert len(makers) == 1
    assert {answer[0] for answer in answers} == set(makers)
    assert sorted(answer[2:] for answer in answers) == [["make", "done"], ["wait", "reuse"], ["wait", "reuse"]]


def test_processes_with_other_keys_do_not_wait(tmp_path: Path) -> None:
    answers, makers = race(tmp_path, ["one", "two"])
    assert len(makers) == 2
    assert all(answer[2:] == ["make", "done"] for answer in answers)


def test_the_waiting_one_takes_over_when_the_maker_is_killed(tmp_path: Path) -> None:
    maker = start(
        """
        def make(folder):
            print("begun", flush=True)
            time.sleep(60)
        Store(Path(sys.argv[1])).get_or_make("train", {}, make)
        """,
        tmp_path,
    )
    assert maker.stdout is not None
    maker.stdout.readline()
    threading.Timer(0.5, maker.kill).start()
    events = Events()
    begin = time.monotonic()
    assert files_of(Store(tmp_path).get_or_make("train", {}, write_content, events).path) == CONTENT
    maker.wait()
    assert events == ["wait", "make", "done"]
    assert 0.3 < time.monotonic() - begin < 20


@pytest.mark.parametrize("harm", ["fresh", "damaged"])
def test_a_reader_never_misses_what_is_replaced(tmp_path: Path, harm: str) -> None:
    """Another run that was given the path reads on while the artifact is made anew."""
    path = Store(tmp_path).get_or_make("export", {}, write_content).path
    if not store._exchange(path, path):
        pytest.skip("this file system cannot exchange two names")
    reader = start(
        """
        path, stop = map(Path, sys.argv[1:3])
        print("ready", flush=True)
        while not stop.exists():
            (path / "deep" / "b.txt").stat()
        """,
        path,
        tmp_path / "stop",
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    for _ in range(60):
        if harm == "damaged":
            (path / "a.bin").write_bytes(b"damaged")
        assert not Store(tmp_path, fresh=harm == "fresh").get_or_make("export", {}, write_content).reused
    (tmp_path / "stop").touch()
    _, err = reader.communicate(timeout=60)
    assert reader.returncode == 0, err
    assert files_of(path) == CONTENT
    assert not leftovers(tmp_path)


def test_replacing_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two renames, one right after the other: the old one is deleted when the new one stands."""
    path = Store(tmp_path).get_or_make("export", {}, write_content).path
    monkeypatch.setattr(store, "_exchange", lambda one, other: False)
    delete = store._delete

    def deleting(old: Path) -> None:
        assert files_of(path) == CONTENT | {"new": b""}
        assert files_of(old) == CONTENT
        delete(old)

    def make(folder: Path) -> None:
        write_content(folder)
        (folder / "new").touch()

    monkeypatch.setattr(store, "_delete", deleting)
    Store(tmp_path, fresh=True).get_or_make("export", {}, make)
    assert files_of(path) == CONTENT | {"new": b""}
    assert not leftovers(tmp_path)


def test_a_worker_forked_while_making_does_not_keep_the_lock(tmp_path: Path) -> None:
    maker = start(
        """
        def make(folder):
            (folder / "a").write_text("a")
            if os.fork() == 0:
                os.close(1)
                os.close(2)
                time.sleep(5)
                os._exit(0)
        Store(Path(sys.argv[1])).get_or_make("train", {}, make)
        """,
        tmp_path,
    )
    _, err = maker.communicate(timeout=60)
    assert maker.returncode == 0, err
    events = Events()
    Store(tmp_path).get_or_make("train", {}, write_content, events)
    assert events == ["reuse"]


def test_threads_make_once(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        write_content(folder)

    threads = [threading.Thread(target=Store(tmp_path).get_or_make, args=("export", {}, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


@pytest.mark.parametrize("stage", ["", "Export", "../up", "a/b", ".locks", "a" * 49, "a\n"])
def test_stage_names(tmp_path: Path, stage: str) -> None:
    with pytest.raises(PqkError, match="stage"):
        Store(tmp_path).get_or_make(stage, {}, write_content)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inputs", [{1: "x"}, {"a": {2: 3}}, {"a": Path("x")}, {"a": {1, 2}}, {"a": b"x"}])
def test_inputs_that_are_not_plain_data(tmp_path: Path, inputs: Any) -> None:
    with pytest.raises(TypeError):
        Store(tmp_path).key("export", inputs)


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Store(tmp_path).key("export", {"a": float("nan")})


@pytest.mark.parametrize("name", [MANIFEST, "link", "pipe"])
def test_what_a_stage_may_not_write(tmp_path: Path, name: str) -> None:
    def make(folder: Path) -> None:
        if name == "link":
            (folder / name).symlink_to("/etc/hosts")
        elif name == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).write_text("{}")

    with pytest.raises(PqkError, match=name):
        Store(tmp_path).get_or_make("export", {}, make)
    assert not list((tmp_path / "export").iterdir())


def test_a_stage_that_fails_says_so(tmp_path: Path) -> None:
    events = Events()

    def make(folder: Path) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Store(tmp_path).get_or_make("export", {}, make, events)
    assert events == ["make", "failed"]


def test_full_disk_while_making_is_one_sentence(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        with Path("/dev/full").open("wb", buffering=0) as stream:
            stream.write(b"x")

    with pytest.raises(PqkError, match="the disk is full"):
        Store(tmp_path).get_or_make("export", {}, make)
    assert not leftovers(tmp_path)


def test_full_disk_while_finishing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PqkError, match="the disk is full"):
        Store(tmp_path).get_or_make("export", {}, write_content)
    assert not leftovers(tmp_path)


def test_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PqkError, match="not a folder"):
        Store(tmp_path / "file" / "store").get_or_make("export", {}, write_content)


def test_a_file_that_make_cannot_read_is_not_called_a_write_error(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "checkpoint.pth"))

    with pytest.raises(PermissionError, match=r"checkpoint\.pth"):
        Store(tmp_path / "store").get_or_make("export", {}, make)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any) -> Any:
    """The same data with every mapping's order reversed and lists as tuples."""
    if isinstance(value, dict):
        return {name: shuffled(value[name]) for name in reversed(list(value))}
    return tuple(map(shuffled, value)) if isinstance(value, list) else value


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=8), plain, max_size=5))
def test_key_does_not_depend_on_order_and_survives_json(inputs: dict[str, Any]) -> None:
    store = Store(Path("unused"))
    key = store.key("export", inputs)
    assert key == store.key("export", shuffled(inputs))
    assert key == store.key("export", json.loads(json.dumps(inputs)))
    assert key != store.key("export", inputs | {"one more key": 1})
    assert key != store.key("exports", inputs)
