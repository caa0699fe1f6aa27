"""The folder of an export: new, empty, or an earlier export; links, mount points, processes that are killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_toys import environment

from pqk.errors import PqkError
from pqk.export.target import MANIFEST, export_folder, target_of
from pqk.files import write_json


def export(out: Path, *names: str) -> Path:
    """Writes a made-up export of these files; returns its folder."""
    target = target_of(out)
    with export_folder(target) as folder:
        assert list(folder.iterdir()) == []
        for name in names:
            (folder / name).write_text(f"{name} of {names}")
        write_json(folder / MANIFEST, {"files": {name: {} for name in names}})
    return target


def holds(folder: Path, *names: str) -> None:
    """Asserts that a folder is exactly the export of these files."""
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, MANIFEST])
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == set(names)
    assert all((folder / name).read_text() == f"{name} of {names}" for name in names)


def test_a_new_folder_and_its_parents(tmp_path: Path) -> None:
    holds(export(tmp_path / "a" / "b", "x", "y"), "x", "y")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_an_earlier_export_is_replaced_in_its_place(tmp_path: Path) -> None:
    out = export(tmp_path / "out", "x", "y")
    (out / "built.plan").write_text("by edge_eval.py, out of x")
    number = out.stat().st_ino
    holds(export(out, "y", "z"), "y", "z")
    assert out.stat().st_ino == number, "the folder itself stays: it may be a mount point"


def test_through_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "later").symlink_to("not-there")
    for link, target in (("link", "real"), ("later", "not-there")):
        for _ in range(2):
            assert export(tmp_path / link, "x") == tmp_path / target
            holds(tmp_path / target, "x")
            assert (tmp_path / link).is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["later", "link", "not-there", "real"]


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    out = export(tmp_path / "out", "x")
    (out / "mine").write_text("mine")
    plans = export(tmp_path / "plans", "x")
    (plans / "folder.plan").mkdir()
    for target, words in (
        (file, "is a file"),
        (full, "holds no earlier export"),
        (out, "'mine', which"),
        (plans, "'folder.plan', which"),
    ):
        with pytest.raises(PqkError, match=words):
            target_of(target)
    link = tmp_path / "loop"
    link.symlink_to("loop")
    with pytest.raises((PqkError, RuntimeError), match=r"(?i)loop"):
        target_of(link)


def test_a_failure_leaves_all_as_it_was(tmp_path: Path) -> None:
    out = export(tmp_path / "out", "x")
    for target in (out, tmp_path / "new"):
        with pytest.raises(ZeroDivisionError), export_folder(target) as folder:
            (folder / "y").write_text("half")
            raise ZeroDivisionError
    holds(out, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, sys
from pathlib import Path
from pqk.export import target as export_target
sys.path.insert(0, sys.argv[3])
from test_export_target import export

moves = 0
real = Path.replace

def replace(self, target):
    global moves
    if moves == int(sys.argv[2]):
        os._exit(9)
    moves += 1
    return real(self, target)

Path.replace = replace
export(Path(sys.argv[1]), "y", "z")
"""


def test_killed_while_it_moves_files(tmp_path: Path) -> None:
    """After every move: the folder is the old export, the new one, or none; and the next export goes through."""
    here = str(Path(__file__).parent)
    ended = []
    for moves in range(6):
        out = export(tmp_path / str(moves), "x", "y")
        command = [sys.executable, "-c", KILLED, str(out), str(moves), here]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode in (0, 9), done.stderr
        ended.append(done.returncode)
        if (out / MANIFEST).exists():
            names = json.loads((out / MANIFEST).read_text())["files"]
            assert all((out / name).exists() for name in names)
        holds(export(out, "w"), "w")
    assert ended == [9, 9, 9, 9, 9, 0]  # moves: the new manifest is written, the old one goes; y, z, it come up


MOUNTED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_export_target import export, holds

root = Path(sys.argv[1])
for name, command in (("bind", "mount --bind {root}/source {root}/bind"), ("disk", "mount -t tmpfs none {root}/disk")):
    if os.system(command.format(root=root)):
        sys.exit(3)
(root / "disk" / "lost+found").mkdir()  # as on an ext4 disk
holds(export(root / "bind", "x"), "x")
holds(export(root / "bind", "y"), "y")
export(root / "disk", "x")
assert sorted(os.listdir(root / "disk")) == ["lost+found", "manifest.json", "x"]
"""


def test_mount_points(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting needs root and unshare")
    for name in ("source", "bind", "disk"):
        (tmp_path / name).mkdir()
    command = ["unshare", "-m", sys.executable, "-c", MOUNTED, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode == 3 or "unshare failed" in done.stderr:
        pytest.skip("this container may not mount")
    assert done.returncode == 0, done.stderr
    holds(tmp_path / "source", "y")
