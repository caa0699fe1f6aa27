"""A plan that is carried out: what runs, what is skipped, what a failure holds up, and how it goes on after a kill.

Most experiments here are a small program of their own in the place of `pqk run`; two tests run the real command.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_toys import Outcome, environment, hear_ctrl_c, pqk, start

from pqk.errors import PqkError
from pqk.settings.plan import load_plan, ordered
from pqk.study.execute_plan import Asked, Progressed, commands, exit_code, folder_of, progress, run_plan
from pqk.study.plan_table import status_data

FAKE = textwrap.dedent("""
    import json, os, sys, time
    from pathlib import Path

    name = sys.argv[1]
    todo = json.loads(Path("todo.json").read_text()).get(name, {})
    with open("ran.txt", "a") as ran:
        ran.write(f"{name} {os.getpid()}\\n")
    print(f"this is {name}", flush=True)
    time.sleep(todo.get("sleep", 0))
    if "stop" in todo:
        from pqk.record.runlog import RunLog

        RunLog(Path("."), name).append("stop", why=todo["stop"])
    for line in todo.get("say", []):
        print(line)
    if "result" in todo:
        Path(os.environ["PQK_RESULT"]).write_text(json.dumps({"exit_code": todo.get("code", 0), **todo["result"]}))
    if "signal" in todo:
        os.kill(os.getpid(), todo["signal"])
    sys.exit(todo.get("code", 0))
    """)
DRIVER = textwrap.dedent("""
    import sys
    from pathlib import Path

    from pqk.study.execute_plan import Asked, run_plan
    from pqk.settings.plan import load_plan, ordered

    root = Path.cwd()
    plan = load_plan("medium", root)
    run_plan(
        plan, ordered(plan, root), root, Asked("toy"), print, print,
        commands_of=lambda step: [[sys.executable, "fake.py", step.id]],
    )
    """)
MEDIUM = ["Baseline", "A1", "C1", "B1", "E1", "D1"]


@pytest.fixture
def toys(project: Path) -> Path:
    """A project whose experiments are fake.py."""
    (project / "fake.py").write_text(FAKE)
    (project / "driver.py").write_text(DRIVER)
    todo(project)
    return project


def todo(root: Path, **experiments: dict[str, Any]) -> None:
    (root / "todo.json").write_text(json.dumps(experiments))


def go(root: Path, **known: Any) -> list[Progressed]:
    plan = load_plan("medium", root)
    said: list[str] = []
    found = run_plan(
        plan,
        ordered(plan, root),
        root,
        Asked(known.pop("backend", "toy"), known.pop("model", None)),
        said.append,
        said.append,
        commands_of=lambda step: [[sys.executable, str(root / "fake.py"), step.id]],
        **known,
    )
    assert found == look(root)
    return found


def look(root: Path) -> list[Progressed]:
    plan = load_plan("medium", root)
    return progress(plan, ordered(plan, root), root)


def statuses(found: Sequence[Progressed]) -> dict[str, str]:
    return {item.step.id: item.status for item in found}


def ran(root: Path) -> list[str]:
    """The experiments that ran since the last look, in order."""
    path = root / "ran.txt"
    names = [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def test_everything_runs_once(toys: Path) -> None:
    before = look(toys)
    assert statuses(before) == dict.fromkeys(MEDIUM, "waiting")
    assert status_data(load_plan("medium", toys), before, None)["cost"] is None
    found = go(toys)
    assert ran(toys) == MEDIUM
    assert statuses(found) == dict.fromkeys(MEDIUM, "done")
    assert exit_code(found) == 0
    data = status_data(load_plan("medium", toys), found, 3600.0)
    assert data["counts"] == {"done": 6}
    assert data["hours"] == pytest.approx(sum(item.hours or 0 for item in found))
    assert data["cost"] == pytest.approx(data["hours"] * 3600) and 0.1 < data["cost"] < 60
    assert "this is A1" in (folder_of("medium", toys) / "A1.log").read_text()
    again = go(toys)
    assert ran(toys) == []
    assert again == found


def test_a_failure_holds_up_only_what_requires_it(toys: Path) -> None:
    todo(toys, A1={"code": 1, "result": {"verdict": "fail", "why": "quality drop 2 % (at most 1 %)"}})
    found = go(toys)
    assert ran(toys) == ["Baseline", "A1", "C1", "B1", "E1"]
    assert statuses(found) == {**dict.fromkeys(MEDIUM, "done"), "A1": "failed", "D1": "waiting"}
    details = {item.step.id: item.detail for item in found}
    assert details["A1"] == "quality drop 2 % (at most 1 %)" and details["D1"] == "for A1 (failed)"
    assert exit_code(found) == 1
    assert found[-1].hours is None
    once = found[1].hours
    todo(toys)
    mended = go(toys)
    assert ran(toys) == ["A1", "D1"]
    assert exit_code(mended) == 0
    assert mended[1].hours is not None and once is not None and mended[1].hours > once  # both attempts count


def test_keep_going(toys: Path) -> None:
    todo(toys, A1={"code": 1}, C1={"code": 3})
    found = go(toys, keep_going=True)
    assert ran(toys) == ["Baseline", "A1", "C1", "B1", "D1"]  # no result of C1: E1 has nothing to begin with
    assert statuses(found) == {
        "Baseline": "done", "A1": "failed", "C1": "unavailable", "B1": "done", "E1": "waiting", "D1": "done",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("how", "status", "detail", "code"),
    [
        ({"code": 3, "result": {"error": "stage P is not offered"}}, "unavailable", "stage P is not offered", 3),
        ({"code": 2, "result": {"error": "quant.yaml:3: is wrong"}}, "error", "quant.yaml:3: is wrong", 2),
        ({"code": 70}, "error", "exit code 70", 2),
        (
            {"code": 4, "result": {"verdict": "undecided", "why": "8 scenes tell too little"}},
            "undecided",
            "8 scenes tell too little",
            4,
        ),
        # what it prints is for a reader: a sentence of another command in it decides nothing
        (
            {"code": 1, "say": ["pqk: a lie", "FAILED: another"], "result": {"verdict": "fail", "why": "the drop"}},
            "failed",
            "the drop",
            1,
        ),
        ({"code": 1, "say": ["pqk: a lie", "FAILED: another"]}, "failed", "", 1),
        ({"signal": int(signal.SIGKILL)}, "error", "killed by signal 9", 2),
        ({"code": 1, "stop": "2.42 GPU hours are above"}, "stopped", "2.42 GPU hours are above", 1),
    ],
)
def test_how_an_experiment_can_end(toys: Path, how: dict[str, Any], status: str, detail: str, code: int) -> None:
    todo(toys, C1=how)
    found = go(toys)
    assert ran(toys) == ["Baseline", "A1", "C1", "B1", "D1"]
    item = next(item for item in found if item.step.id == "C1")
    assert (item.status, item.detail) == (status, detail)
    assert next(item for item in found if item.step.id == "E1").detail == f"for C1 ({status})"
    assert exit_code(found) == code


def test_a_stop_of_another_attempt_is_not_taken_for_this_one(toys: Path) -> None:
    todo(toys, C1={"code": 1, "stop": "hours"})
    go(toys)
    time.sleep(1.1)  # the run log counts in seconds
    todo(toys, C1={"code": 1, "result": {"verdict": "fail", "why": "drop"}})
    assert {i.step.id: (i.status, i.detail) for i in go(toys)}["C1"] == ("failed", "drop")


def test_what_is_done_is_done_for_the_same_inputs_only(toys: Path) -> None:
    go(toys)
    ran(toys)
    card = toys / "schedule" / "TaskCards" / "A1.md"
    card.write_text(re.sub(r"gpu_hours: \d+", "gpu_hours: 7", card.read_text("utf-8")), "utf-8")
    changed = statuses(look(toys))
    assert [name for name, status in changed.items() if status == "waiting"] == ["A1", "D1"]
    go(toys)
    assert ran(toys) == ["A1", "D1"]
    go(toys, model="another")
    assert ran(toys) == MEDIUM
    config = toys / "configs" / "quant.yaml"
    config.write_text(re.sub(r"  epochs: \d+", "  epochs: 3", config.read_text("utf-8")), "utf-8")
    go(toys, model="another")
    assert ran(toys) == MEDIUM[1:]  # the Teacher in float is not quantized


def test_commands(toys: Path) -> None:
    plan = load_plan("medium", toys)
    by_name = {step.id: step for step in ordered(plan, toys)}
    (words,) = commands(by_name["A1"], Asked("trt", "my model"))
    assert words[0] == sys.executable and words[-7:] == [
        "pqk.cli",
        "run",
        "A1",
        "--backend",
        "trt",
        "--model",
        "my model",
    ]
    (words,) = commands(by_name["Baseline"], Asked("openvino"))
    assert "baseline" in words[3] and words[4:] == ["--backend", "openvino", "--card", "B1"]


def test_commands_of_a_campaign(toys: Path) -> None:
    """The run without rollback, then its result into the ledger, then its files kept."""
    plan = load_plan("results", toys)
    steps = {step.id: step for step in ordered(plan, toys)}
    lines = [" ".join(words[4:]) for words in commands(steps["D1-s1"], Asked("openvino"), plan.rollback)]
    assert lines == [
        "run D1 --backend openvino --set workload.seeds.train=1 --no-rollback",
        "ledger eval --card D1 --backend openvino --set workload.seeds.train=1 --eval-seeds 0..4",
        "ledger finalize --card D1 --backend openvino --set workload.seeds.train=1",
    ]
    teacher = commands(steps["Baseline"], Asked("openvino"), plan.rollback)[1]
    assert " ".join(teacher[4:]) == (
        "ledger eval models/dust3r-tiny --card B1 --backend openvino --eval-seeds 0..4 -o results/Baseline.openvino.tsv"
    )
    assert [words[4] for words in commands(steps["H1"], Asked("openvino"), plan.rollback)] == ["run"]


def test_a_campaign_reports_failures_and_goes_on(toys: Path) -> None:
    plan = load_plan("results", toys)
    steps = ordered(plan, toys)

    def go(words: int = 2) -> dict[str, tuple[str, str]]:
        parts = ["", "-eval"][:words]
        said: list[str] = []
        found = run_plan(
            plan,
            steps,
            toys,
            Asked("toy"),
            said.append,
            said.append,
            commands_of=lambda step: [[sys.executable, str(toys / "fake.py"), step.id + part] for part in parts],
        )
        return {item.step.id: (item.status, item.detail) for item in found}

    dropped = {"verdict": "fail", "why": "quality drop 2 %"}
    todo(
        toys,
        **{
            "A1-s0": {"code": 1, "result": dropped},  # a verdict: D1-s0 needs it all the same
            "A1-s1": {"code": 4, "result": {"verdict": "undecided", "why": "8 scenes"}},  # a verdict too
            "C1": {"code": 1, "result": {"error": "stop-loss: its hours are spent"}},  # no result: E1 and F1 wait
            "B1-eval": {"code": 2, "result": {"error": "results/B1.tsv: is wrong"}},
            "G1": {"code": 3, "result": {"error": "not offered"}},
        },
    )
    found = go()
    assert found["A1-s0"] == ("failed", "quality drop 2 %") and found["A1-s1"] == ("undecided", "8 scenes")
    assert found["B1"] == ("error", "results/B1.tsv: is wrong")
    assert found["C1"] == ("failed", "stop-loss: its hours are spent")
    assert found["E1"] == ("waiting", "for C1 (failed)") and found["D1-s0"] == (
        "waiting",
        "for A1-s0 (failed), B1 (error)",
    )
    first = ran(toys)
    assert {"A1-s0-eval", "C1-rho30-eval"} <= set(first) and not {"C1-eval", "G1-eval"} & set(first)

    todo(
        toys,
        **{"A1-s0": {"code": 1, "result": dropped}, "D1-s0": {"code": 1, "result": {"verdict": "fail", "why": "a"}}},
    )
    found = go()
    assert {name for name, (status, _) in found.items() if status != "done"} == {"A1-s0", "A1-s1", "D1-s0"}
    again = ran(toys)
    assert (
        "A1-s0" not in again
        and "A1-s1" not in again
        and {"C1", "C1-eval", "B1", "G1", "E1-eval", "D1-s0-eval"} <= set(again)
    )
    assert go()["D1-s0"] == ("failed", "a") and ran(toys) == []  # what was measured stays as it is


def drive(root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "driver.py"],
        cwd=root,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    )


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_and_run_again(toys: Path) -> None:
    todo(toys, C1={"sleep": 60})
    process = drive(toys)
    log = folder_of("medium", toys) / "C1.log"
    until(lambda: log.exists() and "this is C1" in log.read_text())
    assert statuses(look(toys)) == {
        **dict.fromkeys(MEDIUM, "waiting"),
        "Baseline": "done",
        "A1": "done",
        "C1": "running",
    }
    with pytest.raises(PqkError, match=r"plan medium is running already; see `pqk plan status medium`"):
        go(toys)
    child = int((toys / "ran.txt").read_text().splitlines()[-1].split()[1])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    found = look(toys)
    assert {i.step.id: (i.status, i.detail) for i in found}["C1"] == ("stopped", "interrupted")
    hours = next(i.hours for i in found if i.step.id == "C1")
    assert hours is not None and 0 <= hours * 3600 < 30  # up to its last words
    ran(toys)
    todo(toys)
    assert statuses(go(toys)) == dict.fromkeys(MEDIUM, "done")
    assert ran(toys) == ["C1", "B1", "E1", "D1"]
    state = json.loads((folder_of("medium", toys) / "state.json").read_text())
    first, second = state["attempts"]["C1"]
    assert (first["exit_code"], second["exit_code"]) == (None, 0)
    assert first["seconds"] == pytest.approx(hours * 3600, abs=0.01)


def test_killed_at_any_moment(toys: Path) -> None:
    """Whatever is on disk then is whole, nothing that was done is run again, and the end is the same."""
    done: set[str] = set()
    for tenths in (8, 12, 16):
        process = drive(toys)
        time.sleep(tenths / 10)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = {name for name, status in statuses(look(toys)).items() if status == "done"}
        assert done <= now
        done = now
    ran(toys)
    assert statuses(go(toys)) == dict.fromkeys(MEDIUM, "done")
    assert ran(toys) == [name for name in MEDIUM if name not in done]


def test_interrupted_from_the_keyboard(toys: Path) -> None:
    todo(toys, A1={"sleep": 60})
    process = drive(toys)
    until(lambda: "A1" in (toys / "ran.txt").read_text() if (toys / "ran.txt").exists() else False)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    assert {i.step.id: (i.status, i.detail) for i in look(toys)}["A1"] == ("stopped", "interrupted")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 9}', '{"version": 1, "asked": {}, "attempts": {}}',
                                  '{"version": 1, "asked": null, "attempts": {"A1": [{}]}}'])  # fmt: skip
def test_a_damaged_state_is_one_sentence(toys: Path, text: str) -> None:
    folder = folder_of("medium", toys)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(text)
    for what in (look, go):
        with pytest.raises(PqkError, match=r"state\.json: not the state of a plan \(.*\); remove it to start over"):
            what(toys)
    outcome = pqk(toys, "plan", "status", "medium")
    assert outcome.code == 2 and "remove it to start over" in outcome.sentence


def test_the_command_line_shows_plans(toys: Path) -> None:
    shown = pqk(toys, "plan", "best", "--device", "A100", "--rate", "2", "--json")
    assert shown.code == 0 and shown.record["hours"] == pytest.approx([140 * 1.7, 140 * 2.2])
    assert "238–308" in shown.err
    todo(toys, A1={"code": 1})
    go(toys)
    one = pqk(toys, "plan", "status", "medium", "--json")
    assert one.record["counts"] == {"done": 4, "failed": 1, "waiting": 1}
    assert [row["hours"] is None for row in one.record["experiments"]] == [False] * 5 + [True]
    every = json.loads(pqk(toys, "plan", "status", "--json").out)
    assert [(data["plan"], data["hours"] is None) for data in every] == [
        ("best", True),
        ("medium", False),
        ("minimal", True),
        ("results", True),
    ]
    assert "4 done, 1 failed, 1 waiting" in pqk(toys, "plan", "status").out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("mediun",), "there is no plan 'mediun' in schedule/plans (did you mean 'medium'?)"),
        (("medium", "--device", "T4"), "--device T4: hours are known for H100, A100"),
        (("medium", "--backend", "openvino"), "--backend, --model and --keep-going need --run"),
        (("medium", "best"), "'best' is one word too many: `pqk plan medium`, or `pqk plan status medium`"),
        (("status", "--run"), "run a plan by its name: `pqk plan NAME --run`"),
        (("medium", "--run", "--backend", "opnvino"), "did you mean 'openvino'?"),
    ],
)
def test_wrong_words_are_one_sentence(toys: Path, words: tuple[str, ...], sentence: str) -> None:
    outcome = pqk(toys, "plan", *words)
    assert outcome.code == 2 and sentence in outcome.sentence
    assert not folder_of("medium", toys).exists()


OWN = """# v1.0: one real experiment beside the Teacher.
version: "1.0"
title: Small
goal: Run the real command.
hours_from: "a guess"
device: H100
rate: 1
experiments:
  - {id: B1, hours: 1, what: "INT8"}
  - {id: Baseline, hours: 1, what: "the Teacher", door: baseline_eval}
"""


@pytest.mark.slow
def test_the_real_command(copy_of: Callable[[], Path], finished: tuple[Path, Outcome], tiny_model: Path) -> None:
    """B1 has run in this project before, so it is reused; its verdict decides the plan's."""
    root = copy_of()
    (root / "schedule" / "plans" / "own.yaml").write_text(OWN)
    words = ("plan", "own", "--run", "--backend", "openvino", "--model", tiny_model, "--json")
    first = pqk(root, *words)
    code = finished[1].code
    assert first.code == code, first.err
    rows = {row["id"]: row for row in first.record["experiments"]}
    assert (rows["Baseline"]["status"], rows["B1"]["status"]) == ("done", "failed" if code else "done"), first.err
    assert "▸ B1: begins" in first.err and "kept from before" in first.err
    if code:
        assert rows["B1"]["detail"] in " ".join(finished[1].record["verdict_reasons"])
    second = pqk(root, *words)
    assert "▸ Baseline: done before" in second.err
    assert second.record["hours"] >= first.record["hours"]


def test_ctrl_c_on_the_real_command(toys: Path, tiny_model: Path) -> None:
    (toys / "schedule" / "plans" / "own.yaml").write_text(OWN)
    process = start(("plan", "own", "--run", "--backend", "openvino", "--model", tiny_model), toys)
    log = folder_of("own", toys) / "Baseline.log"
    until(lambda: log.exists() and "generated scenes" in log.read_text())
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "`pqk plan own --run` continues from here" in err and "Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    shutil.rmtree(toys / "outputs" / "store", ignore_errors=True)
    status = pqk(toys, "plan", "status", "own", "--json").record
    assert status["counts"] == {"stopped": 1, "waiting": 1}
