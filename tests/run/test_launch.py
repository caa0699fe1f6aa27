"""Cells on this machine, on SLURM's local stand-in and on a real Ray cluster of two machines that both are this one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import preloaded
import psutil
import pytest
from run_toys import environment, pqk

from pqk.errors import NotBuilt, PqkError
from pqk.launch.cell import Cell, carry_out
from pqk.launch.launch import check_on, launcher
from pqk.launch.machine import agreed, difference, kind, own_cores
from pqk.launch.needs import Needs, needs_of
from pqk.record.ledger import read_rows
from pqk.settings.plan import Plan, Step, load_plan, ordered
from pqk.study.checkpoints import finalize
from pqk.study.execute_plan import Asked, exit_code, folder_of, progress, run_plan
from pqk.study.plan_state import read_state

SEEDS = 24
LARGE = 1000  # experiments, a thousand for each card
PLAN = f"""version: "1.0"
title: Toys
goal: Run on many machines.
hours_from: "a guess"
device: CPU
rate: 0
experiments:
  - {{id: B1, hours: 1, what: "a toy", train_seeds: {list(range(SEEDS))}}}
"""
FAKE = textwrap.dedent("""
    import json, os, sys, time
    from pathlib import Path

    with open("ran.txt", "a") as ran:
        ran.write(f"{sys.argv[1]} {len(os.sched_getaffinity(0))}\\n")
    print("this is", sys.argv[1])
    Path(os.environ["PQK_RESULT"]).write_text(json.dumps({"exit_code": 0, "run_id": sys.argv[1]}))
    """)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two raylets of one core each, and the address at which they are found."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=small)
    small.pop("include_dashboard")
    found.second = found.add_node(**small)  # type: ignore[attr-defined]
    yield found
    found.shutdown()


@pytest.fixture
def toys(project: Path) -> Path:
    """A project with the plan `toys`, 24 seeds of B1, and a program in the place of `pqk run`."""
    (project / "schedule" / "plans" / "toys.yaml").write_text(PLAN)
    (project / "fake.py").write_text(FAKE)
    return project


def steps_of(root: Path, name: str = "toys") -> tuple[Plan, list[Step]]:
    plan = load_plan(name, root)
    return plan, ordered(plan, root)


def go(root: Path, on: str, needs: Needs | None = None, count: int = SEEDS, **known: Any) -> dict[str, str]:
    """Runs the first experiments of the plan as fakes; returns their statuses."""
    plan, steps = steps_of(root)
    known.setdefault("commands_of", lambda step: [[sys.executable, "fake.py", step.id]])
    said: list[str] = []
    found = run_plan(
        plan, steps[:count], root, Asked("toy"), said.append, said.append, on=on, needs=needs or Needs(), **known
    )
    return {item.step.id: item.status for item in found}


def ran(root: Path) -> list[str]:
    return [line.split()[0] for line in (root / "ran.txt").read_text().splitlines()]


@pytest.mark.parametrize(
    ("on", "sentence"),
    [
        ("rai", "--on rai: it is local, ray[:ADDRESS], slurm[:PARTITION] or slurm-local (did you mean 'ray'?)"),
        ("local:3", "--on local:3: it is local"),
        ("ray:", "--on ray:: it is local"),
        ("slurm-local:gpu", "it is local, ray"),
    ],
)
def test_other_places_are_one_sentence(on: str, sentence: str) -> None:
    with pytest.raises(PqkError) as caught:
        check_on(on)
    assert sentence in str(caught.value)


def test_what_a_cell_needs() -> None:
    assert needs_of(None) == Needs() and needs_of("cores=4, memory_gb=1.5,gpus=1") == Needs(4, 1, 1.5)
    for wrong, why in {
        "cors=4": "'cors' is unknown (did you mean 'cores'?)",
        "cores=4,cores=5": "'cores' is given twice",
        "cores=0": "cores is '0' but must be a whole number from 1 on",
        "gpus=1.5": "gpus is '1.5' but must be a whole number from 0 on",
        "hours=nan": "hours is 'nan' but must be a number from 0.01 on",
    }.items():
        with pytest.raises(PqkError) as caught:
            needs_of(wrong)
        assert why in str(caught.value)


@pytest.mark.parametrize(("on", "module", "extra"), [("ray", "ray", "ray"), ("slurm", "submitit", "slurm")])
def test_a_missing_extra_is_one_sentence(
    on: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotBuilt, match=rf"is not installed; install pqk's extra {extra}: pip install 'pqk\[{extra}\]'"):
        launcher(on, Needs(), tmp_path, print, print)
    assert NotBuilt.exit_code == 3


def test_kinds_of_machines(tmp_path: Path) -> None:
    here = kind()
    assert here["cores"] >= 1 and here["device"] and difference(here, dict(here)) is None
    assert agreed(tmp_path / "a" / "machine.json", here) == here
    other = {**here, "device": "NVIDIA H200"}
    assert agreed(tmp_path / "a" / "machine.json", other) == here  # the first one decides
    assert difference(other, here) == f"NVIDIA H200, {here['cores']} cores, not {here['device']}, {here['cores']} cores"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["machine.json"]
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 11\n")
    assert kind(1, tmp_path)["device"] == "NVIDIA H200" and kind(0, tmp_path) == here


def test_cells_of_one_machine_have_cores_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    with own_cores(2, tmp_path) as one, own_cores(1, tmp_path) as two, own_cores(2, tmp_path) as three:
        assert (one, two) == ({0, 1}, {2})
        assert 3 in three and len(three) == 2  # no other is free: one is shared
    with own_cores(None, tmp_path) as whole, own_cores(3, tmp_path) as again:
        assert whole == {0, 1, 2, 3} and again == {0, 1, 2}


def test_a_cell_on_another_kind_of_machine(toys: Path) -> None:
    """On a cluster it is refused, and nothing runs; here it runs, and is marked."""
    folder = folder_of("toys", toys)
    folder.mkdir(parents=True)
    (folder / "machine.json").write_text(json.dumps({**kind(), "device": "NVIDIA H200"}))
    words = (sys.executable, "fake.py", "a")
    done = carry_out(Cell("a", (words,), toys, folder / "a.log", folder / "machine.json"))
    assert done.refused and done.outcome["exit_code"] == 3 and ", not NVIDIA H200, " in done.outcome["said"]
    assert not (toys / "ran.txt").exists()
    assert go(toys, "local", count=2) == {"B1-s0": "done", "B1-s1": "done"}
    (item, _) = progress(*[steps_of(toys)[0], steps_of(toys)[1][:2]], toys)
    assert item.detail.startswith("times of ") and "not NVIDIA H200" in item.detail


def test_lines_of_the_state(toys: Path) -> None:
    """What a killed plan left is read: lines since state.json, the last one cut short; a wrong one is refused."""
    assert set(go(toys, "local", count=2).values()) == {"done"}
    folder = folder_of("toys", toys)
    before = read_state(folder)
    attempt = before["attempts"]["B1-s0"][0]
    lines = [["B1-s0", 0, attempt], ["B1-s1", 1, {**attempt, "exit_code": 1}]]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "state.jsonl").write_text(text + '["B1-s0", 1, {"key"')
    found = read_state(folder)["attempts"]
    assert found["B1-s0"] == [attempt] and [a["exit_code"] for a in found["B1-s1"]] == [0, 1]
    (folder / "state.jsonl").write_text('["B1-s0", 7, {}]\n')
    with pytest.raises(PqkError, match="not the state of a plan"):
        read_state(folder)


def test_a_large_plan(toys: Path) -> None:
    """1,000 experiments are ordered, resumed and tabulated in 10 s; 10,000 were in 25 s."""
    from rich.console import Console

    from pqk.study.plan_state import Journal
    from pqk.study.plan_table import plan_data, print_plan, print_status, status_data

    cards, text = toys / "schedule" / "TaskCards", PLAN.split("  - ")[0]
    for number in range(LARGE // 1000):
        (cards / f"X{number}.md").write_text((cards / "B1.md").read_text().replace("id: B1", f"id: X{number}"))
        text += f'  - {{id: X{number}, hours: 1, what: "a toy", train_seeds: {list(range(1000))}}}\n'
    (toys / "schedule" / "plans" / "toys.yaml").write_text(text)
    began = time.monotonic()
    plan, steps = steps_of(toys)
    quiet = Console(file=(toys / "table.txt").open("w"), width=80)
    print_plan(plan_data(plan, steps, "CPU", None), quiet)
    planned = time.monotonic() - began
    assert len(steps) == LARGE
    assert set(go(toys, "local", count=2).values()) == {"done"}
    journal = Journal(folder_of("toys", toys))
    from pqk.study.execute_plan import _keys

    keys, one = _keys(plan, steps, Asked("toy"), toys), journal.state["attempts"]["X0-s0"][0]
    journal.state["attempts"] = {step.id: [{**one, "key": keys[step.id]}] for step in steps}
    del journal.state["attempts"][steps[-1].id]
    journal.fold()
    (toys / "ran.txt").unlink()
    began = time.monotonic()
    statuses = go(toys, "local", count=LARGE)
    resumed = time.monotonic() - began
    assert ran(toys) == [steps[-1].id] and set(statuses.values()) == {"done"}
    began = time.monotonic()
    print_status(status_data(plan, progress(plan, steps, toys), None), quiet)
    tabulated = time.monotonic() - began
    print(f"planned {planned:.1f} s, resumed {resumed:.1f} s, tabulated {tabulated:.1f} s")
    assert planned + resumed + tabulated < LARGE / 100


def test_keys_are_those_of_resolved_settings(toys: Path) -> None:
    from pqk.recipe.experiment import resolve
    from pqk.study.execute_plan import _seeded

    step = steps_of(toys)[1][5]
    assert step.card and step.train_seed == 5
    whole = resolve(step.card, toys, settings=step.settings)
    assert _seeded(resolve(step.card, toys), 5).sha256 == whole.workload.sha256


def test_a_store_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one machine made, another one fetches; a damaged file is not used, and a new artifact takes its place."""
    from pqk.store.mirror import mirror
    from pqk.store.store import Store

    assert mirror() is None
    monkeypatch.setenv("PQK_STORE", f"file://{tmp_path / 'shared'}")
    made: list[str] = []

    def of(machine: str) -> bytes:
        def make(folder: Path) -> None:
            made.append(machine)
            (folder / "deep").mkdir()
            (folder / "deep" / "a.bin").write_bytes(b"bytes of " + machine.encode())

        found = Store(tmp_path / machine, mirror=mirror()).get_or_make("toy", {"a": 1}, make)
        assert not list((tmp_path / machine / "toy").glob(".*"))
        return (found.path / "deep" / "a.bin").read_bytes()

    assert of("one") == of("two") == of("one") == b"bytes of one" and made == ["one"]
    (there,) = (tmp_path / "shared" / "toy").iterdir()
    (there / "deep" / "a.bin").write_bytes(b"something else")
    assert of("three") == of("again") == b"bytes of three" and made == ["one", "three"]
    (there / "manifest.json").unlink()  # as one that is being sent
    assert of("four") == b"bytes of four"
    assert of("five") == b"bytes of four"  # it replaced what was cut short
    monkeypatch.setenv("PQK_STORE", "nosuch://bucket")
    with pytest.raises(PqkError, match="PQK_STORE is 'nosuch://bucket', which fsspec cannot open"):
        mirror()


# SLURM


@pytest.mark.whole
def test_a_plan_as_jobs(toys: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    assert go(toys, "slurm-local", count=2) == {"B1-s0": "done", "B1-s1": "done"}
    assert ran(toys) == ["B1-s0", "B1-s1"]
    assert {a["node"] for (a,) in read_state(folder_of("toys", toys))["attempts"].values()} == {os.uname().nodename}
    assert go(toys, "slurm-local", count=2) == {"B1-s0": "done", "B1-s1": "done"}
    assert len(ran(toys)) == 2  # done before


@pytest.mark.whole
def test_a_lost_job_is_sent_again(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is killed without an answer begins again, as often as asked, and then is an interrupted attempt."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)  # 15, for folders of other machines
    (toys / "fake.py").write_text(FAKE + "\nos.kill(os.getppid(), 9)\ntime.sleep(60)\n")
    assert go(toys, "slurm-local", Needs(retries=1), count=1) == {"B1-s0": "stopped"}
    assert ran(toys) == ["B1-s0"] * 2
    assert "its job was lost" in read_state(folder_of("toys", toys))["attempts"]["B1-s0"][0]["said"]


@pytest.mark.whole
def test_a_job_whose_command_is_killed_is_sent_again(toys: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    commands_are_killed(toys, "slurm-local")


def commands_are_killed(toys: Path, on: str) -> None:
    """Kills a command once, then always; what runs it lives, as when the kernel is short of memory."""
    kill = "\nif len(open('ran.txt').readlines()) < {}:\n    os.kill(os.getpid(), 9)\n"
    (toys / "fake.py").write_text(FAKE + kill.format(2))
    assert go(toys, on, Needs(retries=1), count=1) == {"B1-s0": "done"}
    assert ran(toys) == ["B1-s0"] * 2
    (toys / "fake.py").write_text(FAKE + kill.format(9))
    (toys / "ran.txt").unlink()
    plan, steps = steps_of(toys)
    assert go(toys, on, Needs(retries=1), count=2) == {"B1-s0": "done", "B1-s1": "stopped"}
    assert ran(toys) == ["B1-s1"] * 2
    (stopped,) = (item for item in progress(plan, steps[:2], toys) if item.status == "stopped")
    assert stopped.detail == "its command was killed by signal 9"


@pytest.mark.slow
def test_a_matrix_as_jobs(copy_of: Callable[[], Path], tiny_model: Path) -> None:
    """Each point is a command of its own; the tables are those of one command."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    root = copy_of()
    words = ("run", "H1", "--backend", "openvino", "--model", tiny_model, "--json", "--axis", "calibration")
    words = (*words, "--set", "quant.ptq.calibration_images=8")
    one = pqk(root, *words)
    many = pqk(root, *words, "--on", "slurm-local")
    assert (one.code, many.code) == (0, 0), many.err
    tables = [{n: r["quality_drop_pct"] for n, r in o.record["axes"]["calibration"].items()} for o in (one, many)]
    assert tables[0] == tables[1] and len(tables[0]) == 3
    assert "H1 calibration: 128 images: done" in many.err
    alone = pqk(root, "run", "B1", "--backend", "openvino", "--model", tiny_model, "--on", "ray")
    assert alone.code == 2 and "card B1 is one" in alone.sentence
    none = pqk(root, *words, "--point", "64 images")
    assert none.code == 2 and "axis calibration of card H1 has no point '64 images'" in none.sentence


@pytest.mark.whole
def test_a_ledger_as_jobs(toys: Path, tiny_model: Path) -> None:
    """Each eval seed is a command of its own; all rows are in one file, and a seed that fails is one sentence."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    finalize(tiny_model, toys, "tiny", train_seed=4, task_card="A1")
    words = ("ledger", "eval", "tiny", "--backend", "reference", "--no-timing", "--json", "--on", "slurm-local")
    done = pqk(toys, *words, "-o", "results/a.tsv", "--eval-seeds", "0..1")
    assert done.code == 0, done.err
    rows = read_rows(toys / "results" / "a.tsv")
    assert [row["eval_seed"] for row in rows] == [0, 1] and "eval seed 1: " in done.err
    assert [row["eval_seed"] for row in json.loads(done.out.splitlines()[-1])] == [0, 1]
    wrong = pqk(toys, *words, "--set", "workload.scenes.test.seed=1020", "--eval-seeds", "5")
    assert wrong.code == 2 and "1 of 1 eval seeds have no row, first seed-5: " in wrong.sentence
    assert "would be 1025, above 1023" in wrong.sentence


# Ray


@pytest.mark.whole
def test_a_plan_on_two_machines(cluster: Any, toys: Path) -> None:
    _, steps = steps_of(toys)
    began = time.monotonic()
    assert set(go(toys, f"ray:{cluster.address}", count=12).values()) == {"done"}
    each = (time.monotonic() - began) / 12
    print(f"{each:.2f} s for each cell")
    assert each < 2
    assert sorted(ran(toys)) == sorted(step.id for step in steps[:12])
    state = read_state(folder_of("toys", toys))["attempts"]
    assert [state[step.id][0]["run_id"] for step in steps[:12]] == [step.id for step in steps[:12]]
    assert "this is B1-s3" in (folder_of("toys", toys) / "B1-s3.log").read_text()
    assert {a["machine"]["cores"] for (a,) in state.values()} == {1}


@pytest.mark.whole
def test_a_cell_whose_command_is_killed_begins_again(cluster: Any, toys: Path) -> None:
    commands_are_killed(toys, f"ray:{cluster.address}")


@pytest.mark.whole
def test_other_machines_are_refused(cluster: Any, toys: Path) -> None:
    folder = folder_of("toys", toys)
    folder.mkdir(parents=True)
    (folder / "machine.json").write_text(json.dumps({**kind(), "device": "NVIDIA H200"}))
    plan, steps = steps_of(toys)
    assert set(go(toys, f"ray:{cluster.address}", count=2).values()) == {"unavailable"}
    assert exit_code(progress(plan, steps[:2], toys)) == 3 and not (toys / "ran.txt").exists()


@pytest.mark.whole
def test_a_cluster_of_its_own_listens_here_alone(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    program = textwrap.dedent("""
        import psutil
        from pathlib import Path
        from pqk.launch.launch import launcher
        from pqk.launch.needs import Needs

        with launcher("ray", Needs(), Path.cwd(), print, print) as launched:
            own = [psutil.Process(), *psutil.Process().children(recursive=True)]
            heard = {c.laddr.ip for p in own for c in p.net_connections() if c.status == "LISTEN"}
            print(*heard, launched.places() > 0)
        """)
    words = [sys.executable, "-P", "-c", program]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    addresses = done.stdout.splitlines()[-1].split()
    assert addresses.pop() == "True" and addresses, done.stderr
    assert all(ip.startswith("127.") or ip in ("::1", "::ffff:127.0.0.1") for ip in addresses)


@pytest.mark.whole
def test_a_machine_that_is_left_out(cluster: Any, toys: Path) -> None:
    """Cells begin only on the others."""
    import ray

    with launcher(f"ray:{cluster.address}", Needs(), toys, print, print) as launched:
        ids = {node["NodeID"] for node in ray.nodes()}
        launched._other.add(cluster.second.node_id)
        assert launched.places() == 1
        found = []
        for number in range(3):
            words = (sys.executable, "fake.py", str(number))
            launched.begin(Cell(str(number), (words,), toys, toys / "a.log", toys / "machine.json"))
            found += [ray.get(reference)[0] for reference in launched._running]
            assert [done.outcome["exit_code"] for done in launched.wait()] == [0]
    assert set(found) == ids - {cluster.second.node_id} and len(ids) == 2


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.timeout(600)
def test_killed_workers_and_a_killed_machine(cluster: Any, toys: Path, tiny_model: Path, tmp_path: Path) -> None:
    """20 random kill -9 of workers and one of a machine: no finished stage is made twice, the ledger is the same."""
    path = toys / "configs" / "workload.yaml"
    path.write_text(
        path.read_text().replace(
            "test: {source: synthetic, count: 2, views: 3", "test: {source: synthetic, count: 1, views: 2"
        )
    )
    finalize(tiny_model, toys, "tiny", train_seed=4, task_card="A1")
    calm = shutil.copytree(toys, tmp_path / "calm")
    words = ("ledger", "eval", "tiny", "--backend", "reference", "--no-timing", "-o", "results/a.tsv", "--eval-seeds")
    whole = pqk(calm, *words, f"0..{SEEDS - 1}")
    assert whole.code == 0, whole.err

    def commands_of(step: Step) -> list[list[str]]:
        return [[preloaded.python(), "-P", "-m", "pqk.cli", *words, str(step.train_seed)]]

    kills: list[int] = []
    over = threading.Event()

    def kill() -> None:
        chance = random.Random(0)
        while not over.wait(chance.uniform(0.1, 0.6)) and len(kills) < 20:
            workers = [p for p in psutil.process_iter(["cmdline"]) if is_busy(p)]
            if workers:
                with_pid = chance.choice(workers).pid
                os.kill(with_pid, signal.SIGKILL)
                kills.append(with_pid)
                if len(kills) == 10:
                    cluster.remove_node(cluster.second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = go(toys, f"ray:{cluster.address}", Needs(retries=30), commands_of=commands_of)
    finally:
        over.set()
        killer.join()
    state = read_state(folder_of("toys", toys))["attempts"]
    assert set(found.values()) == {"done"}, [state[name] for name, end in found.items() if end != "done"]
    assert len(kills) == 20
    rows, others = ({row["eval_seed"]: row for row in read_rows(root / "results" / "a.tsv")} for root in (toys, calm))
    times = ("datetime", "output", "commit")
    assert len(rows) == SEEDS
    for seed, row in rows.items():
        assert {n: v for n, v in row.items() if n not in times} == {
            n: v for n, v in others[seed].items() if n not in times
        }
    logs = [line for step in found for line in (folder_of("toys", toys) / f"{step}.log").read_text().splitlines()]
    for step in found:  # a stage that is told as made is told once
        own = [line for line in (folder_of("toys", toys) / f"{step}.log").read_text().splitlines() if "✓" in line]
        made = [line.split("✓")[1].rsplit("  ", 1)[0] for line in own if "kept from before" not in line]
        assert len(made) == len(set(made)), (step, own)
    assert any("✓" in line for line in logs)


def is_busy(process: psutil.Process) -> bool:
    """Tells whether a process is a worker of Ray that runs a cell; its title is the cell's name."""
    words = process.info["cmdline"] or [""]
    return words[0].startswith("ray::B1-s")
