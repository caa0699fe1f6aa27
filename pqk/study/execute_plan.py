"""Runs a plan: each experiment is `pqk run CARD` in a process of its own, and its outcome is kept.

Where the plan has eval seeds for an experiment, `pqk ledger eval` and `pqk ledger finalize` of its result follow.

    outputs/plans/NAME/state.json       every attempt: start, duration, exit code and reason
    outputs/plans/NAME/ID.log           the output of the experiment, for a reader; the plan does not use it
    outputs/plans/NAME/ID.result.json   the result of its last command as data: see `pqk.result`
    outputs/plans/NAME/.lock            held (flock) while the plan runs

An attempt is noted before it begins, and state.json is replaced in one step. So after a kill, the next call knows which
attempt was running. Experiments die with their plan; the stages that they finished are in the artifact store.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pqk import paths
from pqk.errors import EXIT_CHECK_FAILED, EXIT_OK, EXIT_UNAVAILABLE, EXIT_UNDECIDED, EXIT_USAGE, PqkError
from pqk.files import check_writable, clear_write_errors, sha256_json, write_json
from pqk.locks import is_locked, locked
from pqk.oserrors import cannot_read, says_nothing
from pqk.recipe.experiment import default_teacher, resolve
from pqk.record.runlog import RunLog
from pqk.result import VARIABLE
from pqk.settings.card import load_card
from pqk.settings.plan import TEACHER_CARD, Plan, Step
from pqk.store.worker import _die_with_parent, _environment

STATUSES = ("done", "failed", "undecided", "stopped", "error", "unavailable", "running", "waiting")
_WITHOUT_SUCCESS = ("failed", "undecided")
_VERSION = 1
_SAID = 300  # characters of an experiment's reason that are kept
_JUDGED = {EXIT_CHECK_FAILED: "fail", EXIT_UNDECIDED: "undecided"}
"""Verdicts by exit code, for runs that were measured to their end without success."""

CommandsOf = Callable[[Step], Sequence[Sequence[str]]]
Attempt = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """The options of `pqk plan NAME --run` that every experiment gets."""

    backend: str
    model: str | None = None


@dataclass(frozen=True)
class Progressed:
    """The progress of one experiment.

    status: done; failed (a threshold did not hold); undecided (the measurement was too coarse to decide); stopped (by a
    stop-loss line, or interrupted: it goes on with the next call); error (wrong input, or a defect); unavailable
    (backend or method); running; waiting. detail: the reason.
    hours: wall hours of all its attempts, None when there is none.
    """

    step: Step
    status: str
    detail: str
    hours: float | None


@dataclass(frozen=True)
class Past:
    """An attempt of an experiment: when it began (seconds since 1970), its wall hours, and how it ended.

    status and detail: as in `Progressed`; done also where the inputs have changed since.
    """

    step: Step
    began: float
    hours: float
    status: str
    detail: str


def folder_of(plan: str, root: Path) -> Path:
    """Returns the folder with a plan's state and the output of its experiments."""
    return root / "outputs" / "plans" / plan


def progress(plan: Plan, steps: Sequence[Step], root: Path) -> list[Progressed]:
    """Returns the progress of every experiment, from files only. Raises PqkError when the state is damaged."""
    folder = folder_of(plan.name, root)
    state = _read(folder)
    live = is_locked(folder / ".lock")
    keys = _keys(plan, steps, Asked(**state["asked"]), root) if state["asked"] else {}
    found = []
    statuses: dict[str, str] = {}
    for step in steps:
        attempts = state["attempts"].get(step.id, [])
        status, detail = _status(step, attempts, keys.get(step.id), live, root)
        statuses[step.id] = status
        if status == "waiting":
            lacking = [other for other in step.requires if statuses[other] not in ("done", "waiting", "running")]
            detail = detail or (f"for {_listed(lacking, statuses)}" if lacking else "")
        seconds = [_seconds(attempt, folder, step.id) for attempt in attempts]
        found.append(Progressed(step, status, detail, sum(seconds) / 3600 if seconds else None))
    return found


def past_attempts(plan: Plan, steps: Sequence[Step], root: Path) -> list[Past]:
    """Returns all attempts of a plan, in the order in which they began. Raises PqkError as `progress` does."""
    folder = folder_of(plan.name, root)
    live, state = is_locked(folder / ".lock"), _read(folder)
    found = []
    for step in steps:
        own = state["attempts"].get(step.id, [])
        for number, attempt in enumerate(own, 1):
            until = own[number]["began"] if number < len(own) else None
            status, detail = _status(step, [attempt], attempt["key"], live and number == len(own), root, until)
            found.append(Past(step, float(attempt["began"]), _seconds(attempt, folder, step.id) / 3600, status, detail))
    return sorted(found, key=lambda past: past.began)


def asked_backend(plan: Plan, root: Path) -> str | None:
    """Returns the backend of a plan's last run; None when it never ran."""
    asked = _read(folder_of(plan.name, root))["asked"]
    return str(asked["backend"]) if asked else None


def run_plan(
    plan: Plan,
    steps: Sequence[Step],
    root: Path,
    asked: Asked,
    say: Callable[[str], None],
    echo: Callable[[str], None],
    *,
    keep_going: bool = False,
    commands_of: CommandsOf | None = None,
) -> list[Progressed]:
    """Runs the experiments that are not done yet, in order, and returns the progress of all.

    An experiment is done when it ended with exit code 0, and its card, configs, backend, model and requirements are
    still the same. An experiment whose requirements are not done waits. With `keep_going`, and in a plan without
    rollback, a requirement that failed its thresholds or was undecided counts as done, because it has a result. In a
    plan without rollback, such an experiment is not run again either.
    `commands_of`: the command lines of a step, instead of `commands`. `say` gets a line for every event, `echo` every
    line that the experiments print.
    Raises PqkError when another process runs this plan, or when the disk cannot be written. KeyboardInterrupt is noted
    as an interrupted attempt and raised again.
    """
    folder = folder_of(plan.name, root)
    check_writable(folder)
    commands_of = commands_of or (lambda step: commands(step, asked, plan.rollback, root))
    with _lock(folder, plan.name):
        state = _read(folder)
        _close_interrupted(state, folder)
        state["asked"] = {"backend": asked.backend, "model": asked.model}
        keys = _keys(plan, steps, asked, root)
        _write(folder, state)
        now: dict[str, str] = {}
        for step in steps:
            attempts = state["attempts"].setdefault(step.id, [])
            now[step.id], _ = _status(step, attempts, keys[step.id], False, root)
            if now[step.id] == "done":
                say(f"{step.id}: done before")
                continue
            if now[step.id] in _WITHOUT_SUCCESS and not plan.rollback and _measured(attempts, keys[step.id]):
                say(f"{step.id}: measured before, {now[step.id]} ({attempts[-1]['said']})")
                continue
            good = {name for name, status in now.items() if status == "done"}
            good |= {name for name, status in now.items() if status in _WITHOUT_SUCCESS and keep_going}
            if not plan.rollback:  # a verdict is a result; a training whose hours ran out left none
                good |= {name for name in now if _measured(state["attempts"][name], keys[name])}
            lacking = [other for other in step.requires if other not in good]
            if lacking:
                now[step.id] = "waiting"
                say(f"{step.id}: waits for {_listed(lacking, now)}")
                continue
            began = time.time()
            attempt: Attempt = {"key": keys[step.id], "began": began, "seconds": None, "exit_code": None, "said": ""}
            attempts.append(attempt)
            _write(folder, state)
            say(f"{step.id}: begins, {datetime.now(UTC).strftime('%Y-%m-%d %H:%M')} UTC")
            clock = time.monotonic()
            try:
                attempt |= _carry_out(commands_of(step), root, folder / f"{step.id}.log", echo)
            except KeyboardInterrupt:
                attempt |= {"interrupted": True}
                raise
            finally:
                attempt["seconds"] = round(time.monotonic() - clock, 3)
                _write(folder, state)
            now[step.id], detail = _status(step, attempts, keys[step.id], False, root)
            say(f"{step.id}: {now[step.id]}{f' ({detail})' if detail else ''}, {attempt['seconds']:.0f} s")
    return progress(plan, steps, root)


def exit_code(found: Sequence[Progressed]) -> int:
    """Returns the exit code of a plan that ran, by its worst experiment.

    In this order: 2 error, 1 failed or stopped, 4 undecided, 3 unavailable, else 0.
    """
    statuses = {item.status for item in found}
    if "error" in statuses:
        return EXIT_USAGE
    if statuses & {"failed", "stopped"}:
        return EXIT_CHECK_FAILED
    if "undecided" in statuses:
        return EXIT_UNDECIDED
    return EXIT_UNAVAILABLE if "unavailable" in statuses else EXIT_OK


def commands(step: Step, asked: Asked, rollback: bool = True, root: Path | None = None) -> list[list[str]]:
    """Returns the command lines of an experiment, in order: `pqk run CARD`, or for the Teacher baseline_eval.py.

    With eval seeds, `pqk ledger eval` of its result follows, and for a card also `pqk ledger finalize`.
    """
    # -P: the project's folder, in which it runs, may hold another pqk or a random.py
    python = [sys.executable, "-P"]
    backend = ["--backend", asked.backend]
    seeds = ["--eval-seeds", step.eval_seeds] if step.eval_seeds is not None else []
    if step.card is None:
        door = "import sys; from pqk.cli.legacy_scripts import baseline; sys.exit(baseline())"
        given = ["--ckpt", asked.model] if asked.model else []
        found = [[*python, "-c", door, *backend, "--card", TEACHER_CARD, *given]]
        if seeds:
            out = ["-o", f"results/{step.id}.{asked.backend}.tsv"]
            words = [
                asked.model or default_teacher(root or paths.project_root()).model,
                "--card",
                TEACHER_CARD,
                *backend,
                *seeds,
                *out,
            ]
            found.append([*python, "-m", "pqk.cli", "ledger", "eval", *words])
        return found
    model = ["--model", asked.model] if asked.model else []
    settings = [word for name, value in step.settings.items() for word in ("--set", f"{name}={value}")]
    run = ["run", step.card.id, *backend, *model, *settings, *([] if rollback else ["--no-rollback"])]
    result = ["--card", step.card.id, *backend, *model, *settings]
    found = [run]
    if seeds:
        found += [["ledger", "eval", *result, *seeds], ["ledger", "finalize", *result]]
    return [[*python, "-m", "pqk.cli", *words] for words in found]


def _carry_out(lines: Sequence[Sequence[str]], root: Path, log: Path, echo: Callable[[str], None]) -> dict[str, Any]:
    """Runs the command lines of an experiment, and returns the fields of its attempt.

    They are the exit code, the reason, whether it was measured to its end, and for a measured one run_id, verdict and
    record.
    The first command decides: after a verdict, also 'fail' and 'undecided', the other commands run; after anything else
    the experiment ends.
    """
    code, result = _execute(lines[0], root, log, echo)
    judged = code == EXIT_OK or (code in _JUDGED and result.get("verdict") == _JUDGED[code])
    outcome = {"exit_code": code, "said": _reason(result), "measured": judged}
    outcome |= {name: result.get(name) for name in ("run_id", "verdict", "record")}
    for words in lines[1:] if judged else ():
        code, result = _execute(words, root, log, echo)
        if code != EXIT_OK:
            return outcome | {"exit_code": code, "said": _reason(result), "measured": False}
    return outcome


def _reason(result: Mapping[str, Any]) -> str:
    """Returns the reason for a command's end in one sentence: its error, or the deciding threshold; '' for none."""
    return str(result.get("error") or result.get("why") or "")[:_SAID]


def _measured(attempts: Sequence[Attempt], key: str) -> bool:
    """Returns whether the last attempt was measured to its end with the present inputs."""
    return bool(attempts) and attempts[-1]["key"] == key and attempts[-1].get("measured") is True


def _execute(words: Sequence[str], root: Path, log: Path, echo: Callable[[str], None]) -> tuple[int, dict[str, Any]]:
    """Runs a command to its end; its output goes to `log` and to `echo`, and is not interpreted.

    Returns its exit code and its result (see `pqk.result`), which is empty when there is none, as after a kill.
    """
    parent = os.getpid()
    answer = log.with_suffix(".result.json")
    with clear_write_errors(answer):
        answer.unlink(missing_ok=True)
    with clear_write_errors(log), log.open("ab", buffering=0) as kept:
        kept.write(f"== {datetime.now(UTC).isoformat(timespec='seconds')}: {shlex.join(words)}\n".encode())
        process = subprocess.Popen(
            list(words),
            cwd=root,
            env={**_environment(), VARIABLE: str(answer)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: _die_with_parent(parent),
        )
        assert process.stdout is not None
        try:
            for raw in process.stdout:
                kept.write(raw)
                echo(raw.decode("utf-8", errors="replace").rstrip())
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
    return code, _read_result(answer)


def _read_result(path: Path) -> dict[str, Any]:
    """Returns the result file of a command as data; empty when there is none, or an invalid one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _status(
    step: Step, attempts: Sequence[Attempt], key: str | None, live: bool, root: Path, until: float | None = None
) -> tuple[str, str]:
    """Returns status and reason from the last attempt. live: the plan is running. until: when the next one began."""
    if not attempts:
        return "waiting", ""
    last = attempts[-1]
    code, said = last["exit_code"], last["said"]
    if code is None:
        if live and last["seconds"] is None:
            return "running", ""
        return "stopped", "interrupted"
    if code == EXIT_OK:
        return ("done", "") if last["key"] == key else ("waiting", "done, but its inputs have changed since")
    if code == EXIT_CHECK_FAILED:
        why = _stopped_by(step, last["began"], until, root)
        return ("stopped", why) if why else ("failed", said)
    if code == EXIT_UNDECIDED:
        return "undecided", said
    if code == EXIT_UNAVAILABLE:
        return "unavailable", said
    how = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
    return "error", said or how


def _stopped_by(step: Step, began: float, until: float | None, root: Path) -> str:
    """Returns the reason of a stop-loss: the 'why' of a 'stop' at the end of the attempt's run log; else ''."""
    if step.card is None:
        return ""
    entries = [entry for entry in RunLog(root, step.card.id).read() if str(entry.get("time")) >= _utc(began)]
    if until is not None:
        entries = [entry for entry in entries if str(entry.get("time")) < _utc(until)]
    return str(entries[-1].get("why") or "stop-loss") if entries and entries[-1].get("event") == "stop" else ""


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _listed(names: Sequence[str], statuses: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({statuses[name]})" for name in names)


def _keys(plan: Plan, steps: Sequence[Step], asked: Asked, root: Path) -> dict[str, str]:
    """Returns a hash of the inputs per experiment: resolved card and configs, seeds, backend, model, rollback and the
    hashes of its requirements.
    """
    keys: dict[str, str] = {}
    for step in steps:  # in order: requirements come first
        experiment = resolve(step.card or load_card(TEACHER_CARD, root), root, settings=step.settings)
        of = {"workload": experiment.workload.sha256, "eval": experiment.evaluation.sha256}
        keys[step.id] = sha256_json(
            {
                "asked": experiment.sha256 if step.card is not None else of,
                "backend": asked.backend,
                "model": asked.model,
                "rollback": plan.rollback,
                "eval_seeds": step.eval_seeds,
                "requires": {other: keys[other] for other in step.requires},
            }
        )
    return keys


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["version"] != _VERSION:
            raise ValueError(f"version {state['version']}")
        if state["asked"] is not None and state["asked"].keys() != {"backend", "model"}:
            raise ValueError("asked is not backend and model")
        for attempts in state["attempts"].values():
            for attempt in attempts:
                if not {"key", "began", "seconds", "exit_code", "said"} <= attempt.keys():
                    raise ValueError("an attempt lacks a field")
    except FileNotFoundError:
        return {"version": _VERSION, "asked": None, "attempts": {}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and says_nothing(error):
            raise PqkError(cannot_read(path, error)) from error
        raise PqkError(f"{path}: not the state of a plan ({error}); remove it to start over") from error
    return dict(state)


def _write(folder: Path, state: Mapping[str, Any]) -> None:
    write_json(folder / "state.json", state)


def _seconds(attempt: Attempt, folder: Path, name: str) -> float:
    """Returns the wall seconds of an attempt; for a running or killed one, up to the last line that it printed."""
    if attempt["seconds"] is not None:
        return float(attempt["seconds"])
    with contextlib.suppress(OSError):
        return max(0.0, (folder / f"{name}.log").stat().st_mtime - float(attempt["began"]))
    return 0.0


def _close_interrupted(state: Mapping[str, Any], folder: Path) -> None:
    """Sets the time of attempts whose plan was killed, before their log grows again."""
    for name, attempts in state["attempts"].items():
        for attempt in attempts:
            attempt["seconds"] = round(_seconds(attempt, folder, name), 3)


@contextlib.contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    with locked(folder / ".lock", timeout=0.5) as free:  # `pqk plan status` may be looking at it
        if not free:
            raise PqkError(f"plan {name} is running already; see `pqk plan status {name}`")
        yield
