"""Scenes as files: what is written, that it can be read back, and that it is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pqk.data.render.generate import CLOSEST, ScenePlan, find_scene, make_scenes
from pqk.data.render.synthetic import render, texture_bank
from pqk.data.scenes.covisibility import covisibility
from pqk.data.scenes.open import open_scene, open_scenes
from pqk.data.scenes.pairs import pair_graph
from pqk.errors import PqkError
from pqk.files import sha256_file

PLAN = ScenePlan("test", 3, 0, views=4, size=64)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two scenes, by this process alone."""
    out = tmp_path_factory.mktemp("made")
    make_scenes(out, [PLAN, replace(PLAN, index=1)], jobs=1)
    return out


def test_what_is_written_is_read_back(made):
    scene = open_scene(made / PLAN.name)
    assert [view.name for view in scene.views] == [f"{i:03d}.jpg" for i in range(4)]
    assert scene.has_ground_truth and scene.notes == ()
    batch, pose, fov, generator, _ = find_scene(PLAN)
    images, depth, focal = render(batch, pose, fov, 64, 64, texture_bank(), generator, band=32)
    for i, view in enumerate(scene.views):
        assert view.depth_path.read_bytes() == depth[0, i].numpy().astype("<f4").tobytes()
        np.testing.assert_array_equal(view.load_depth(), depth[0, i].numpy())
        f = float(focal[0, i])
        np.testing.assert_array_equal(view.K, [[f, 0, 32], [0, f, 32], [0, 0, 1]])
        np.testing.assert_allclose(view.world_to_cam @ pose[0, i].double().numpy(), np.eye(4), atol=2e-6)
        error = view.load_image().astype(float) - images[0, i].permute(1, 2, 0).numpy() * 255
        assert np.abs(error).mean() < 4  # JPEG's loss on a noisy little image


def test_neighbours_overlap_as_recorded(tmp_path):
    """The recorded share of every used pair is at least 0.3, and that of the depth files is about the same."""
    plan = replace(PLAN, seed=8, views=5, size=128)
    folder = make_scenes(tmp_path, [plan], jobs=1)[0]
    about = json.loads((folder / "scene.json").read_text())
    views = open_scene(folder).views
    pairs = pair_graph(5, "neighbor", plan.k, symmetrize=True)
    assert set(about["covisibility"]) == {f"{i}-{j}" for i, j in pairs}
    for i, j in pairs:
        a, b = views[i], views[j]
        found = covisibility(a.load_depth(), a.K, a.world_to_cam, b.load_depth(), b.K, b.world_to_cam, stride=1)
        assert about["covisibility"][f"{i}-{j}"] >= 0.30
        assert found == pytest.approx(about["covisibility"][f"{i}-{j}"], abs=0.02)
    assert min(view.load_depth().min() for view in views) >= CLOSEST * 0.95


def test_scenes_are_the_same_bytes_again_and_in_parallel(made, tmp_path):
    plans = [PLAN, replace(PLAN, index=1)]
    make_scenes(tmp_path / "again", plans[:1], jobs=1)
    folders = make_scenes(tmp_path / "two", plans, jobs=2)
    assert folders == [tmp_path / "two" / plan.name for plan in plans]
    assert contents(made / PLAN.name) == contents(tmp_path / "again" / PLAN.name)
    assert contents(made) == contents(tmp_path / "two")


def test_splits_seeds_and_indices_are_different_scenes(made, tmp_path):
    others = [replace(PLAN, split="calibration"), replace(PLAN, seed=4), replace(PLAN, split="train")]
    make_scenes(tmp_path, others, jobs=1)
    depth = [p.read_bytes() for p in tmp_path.rglob("ground_truth_depth/*/000.jpg")]
    depth += [p.read_bytes() for p in made.rglob("ground_truth_depth/*/000.jpg")]
    assert len(depth) == 5 and len(set(depth)) == 5


def test_existing_scenes_are_kept(made):
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    names: list[str] = []
    make_scenes(made, [PLAN], jobs=1, done=names.append)
    assert names == [] and before == {p: p.stat().st_mtime_ns for p in made.rglob("*")}


def test_a_scene_of_another_plan_is_not_taken_for_this_one(made):
    with pytest.raises(PqkError, match="holds a scene with size 64, asked is 96"):
        make_scenes(made, [replace(PLAN, size=96)])
    with pytest.raises(PqkError, match="holds a scene with views 4, asked is 5"):
        make_scenes(made, [replace(PLAN, views=5)])


def test_foreign_files_are_left_alone(tmp_path):
    foreign = tmp_path / PLAN.name / "thesis.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    with pytest.raises(PqkError, match="is no generated scene"):
        make_scenes(tmp_path, [PLAN], jobs=1)
    assert foreign.read_text() == "mine"
    (foreign.parent / "scene.json").write_text("{")
    with pytest.raises(PqkError, match="damaged"):
        make_scenes(tmp_path, [PLAN], jobs=1)


def test_scenes_without_depth(tmp_path):
    folder = make_scenes(tmp_path, [replace(PLAN, views=2, depth=False)], jobs=1)[0]
    scene = open_scene(folder)
    assert not scene.has_ground_truth and all(view.depth_path is None for view in scene.views)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.slow
def test_killed_in_the_middle(tmp_path, jobs):
    """After kill -9 there are whole scenes and hidden leftovers only, no worker lives on, a second run completes."""
    out = tmp_path / "scenes"
    code = (
        "import sys; from pathlib import Path; from pqk.data.render.generate import ScenePlan, make_scenes\n"
        "if __name__ == '__main__':\n"
        f"    plans = [ScenePlan('test', 3, i, views=4, size=64) for i in range(200)]\n"
        f"    make_scenes(Path({str(out)!r}), plans, jobs={jobs})\n"
    )
    script = tmp_path / "make.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)])
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob(".test-*.tmp")) or len(list(out.glob("test-*"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        workers = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert not alive
    whole = [folder for folder in out.iterdir() if not folder.name.startswith(".")]
    assert whole and all((folder / "scene.json").exists() for folder in whole)
    assert len(open_scenes(out)) == len(whole)
    ghost = out / f".{PLAN.name.replace('0000', '0199')}.{process.pid}.tmp"  # a scene it surely did not reach
    (ghost / "images").mkdir(parents=True)
    count = len(whole) + 1
    plans = [ScenePlan("test", 3, i, views=4, size=64) for i in (*range(count), 199)]
    make_scenes(out, plans, jobs=1)
    assert all((out / plan.name / "scene.json").exists() for plan in plans)
    assert not ghost.exists()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"split": "tset"}, r"unknown split 'tset' \(did you mean 'test'\?\)"),
        ({"views": 1}, "at least 2 views, got 1"),
        ({"size": 100}, "multiple of 16 from 32 to 2048, got 100"),
        ({"size": 4096}, "multiple of 16 from 32 to 2048, got 4096"),
        ({"seed": -1}, "seed of a scene must be from 0 to 1023, got -1"),
        ({"index": 2**20}, "index of a scene must be from 0 to 1048575"),
        ({"k": 0}, "k must be at least 1"),
        ({"min_covisibility": 0.999}, "no camera path with covisibility 0.999"),
    ],
)
def test_bad_plans_are_one_sentence(tmp_path, change, sentence):
    with pytest.raises(PqkError, match=sentence) as caught:
        make_scenes(tmp_path / "out", [replace(PLAN, **change)], jobs=1)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("scene.json"))


def test_bad_jobs_and_places_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(PqkError, match="jobs must be at least 1"):
        make_scenes(tmp_path, [PLAN], jobs=0)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(PqkError, match="it is a file, not a folder"):
        make_scenes(file, [PLAN])
    with pytest.raises(PqkError, match="a parent of it is a file"):
        make_scenes(file / "below", [PLAN])

    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PqkError, match=r"cannot write .*: the file system is read-only"):
        make_scenes(tmp_path / "elsewhere", [PLAN])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PqkError, match="no permission to write"):
        make_scenes(tmp_path, [PLAN], jobs=1)


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    """The disk is full at the last file: the sentence says so and no folder stays."""
    from pqk.data.render import generate

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(generate, "write_json", full)
    with pytest.raises(PqkError, match="the disk is full"):
        make_scenes(tmp_path, [replace(PLAN, views=2)], jobs=1)
    assert list(tmp_path.iterdir()) == []


def test_as_many_processes_as_allowed_cores(tmp_path, monkeypatch):
    """Not as many as the machine has: a container may be allowed two of 200."""
    from pqk.data.render import pool

    asked = []

    class Pool:
        def __init__(self, jobs, **options):
            asked.append(jobs)
            raise BrokenProcessPool

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 200)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    plans = [replace(PLAN, index=index) for index in range(10)]
    with pytest.raises(PqkError, match=r"one of the 3 processes .* memory; .*--jobs 1"):
        make_scenes(tmp_path, plans)
    assert asked == [3]


def test_a_killed_process_of_the_pool(tmp_path):
    """A real pool whose process is killed, as the kernel does when memory runs out."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from pqk.data.render import generate\n"
        "from pqk.errors import told\n"
        "def die(task):\n"
        "    os.kill(os.getpid(), 9)\n"
        "if __name__ == '__main__':\n"
        "    generate._write_one = die\n"
        "    plan = generate.ScenePlan('test', 3, 0, views=2, size=64)\n"
        "    plans = [plan, replace(plan, index=1)]\n"
        "    sys.exit(told(lambda: len(generate.make_scenes(Path(sys.argv[1]), plans, jobs=2))))\n"
    )
    done = subprocess.run(
        [sys.executable, script, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "pqk: one of the 2 processes that render scenes was killed" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_number_of_threads_does_not_show():
    """Depth and images are the same bits on one and on two threads, at a size where torch does split the work."""
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            batch, pose, fov, generator, _ = find_scene(replace(PLAN, views=2))
            results.append(render(batch, pose, fov, 256, 256, texture_bank(), generator))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
