"""Runs a plan: each experiment is `pqk run CARD` in a process of its own, and its outcome is kept.

Where the plan has eval seeds for an experiment, `pqk ledger eval` and `pqk ledger finalize` of its result follow.
Experiments run here one after another, or on the machines of a cluster (`pqk.launch`) as soon as what they require is
done.

    outputs/plans/NAME/state.json       every attempt: see `pqk.study.plan_state`
    outputs/plans/NAME/machine.json     the kind of machine that the plan began on
    outputs/plans/NAME/ID.log           the output of the experiment, for a reader; the plan does not use it
    outputs/plans/NAME/ID.result.json   the result of its last command as data: see `pqk.result`

An attempt is noted before it begins. Experiments die with their plan; the stages that they finished are in the artifact
store.
"""

from __future__ import annotations

import heapq
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pqk import paths
from pqk.errors import EXIT_CHECK_FAILED, EXIT_OK, EXIT_UNAVAILABLE, EXIT_UNDECIDED, EXIT_USAGE
from pqk.files import check_writable, sha256_json
from pqk.launch.cell import Cell, Done
from pqk.launch.launch import LOCAL, launcher, run
from pqk.launch.machine import KIND_FILE, difference, read_kind
from pqk.launch.needs import Needs
from pqk.locks import is_locked
from pqk.recipe.experiment import Experiment, default_teacher, resolve
from pqk.record.runlog import RunLog
from pqk.settings.card import load_card
from pqk.settings.plan import TEACHER_CARD, Plan, Step
from pqk.settings.workload import Workload
from pqk.study.plan_state import Attempt, Journal, only_run, read_state, seconds_of

STATUSES = ("done", "failed", "undecided", "stopped", "error", "unavailable", "running", "waiting")
_WITHOUT_SUCCESS = ("failed", "undecided")

CommandsOf = Callable[[Step], Sequence[Sequence[str]]]


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
    """Returns the progress of every experiment, from files only. Raises PqkError when the state is damaged.

    The detail of one that was done on another kind of machine than the plan's first says so: its times are not to be
    compared with the others'.
    """
    folder = folder_of(plan.name, root)
    state = read_state(folder)
    live, plans_kind = is_locked(folder / ".lock"), read_kind(folder / KIND_FILE)
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
        elif plans_kind and attempts and attempts[-1].get("machine") and attempts[-1].get("measured"):
            other = difference(attempts[-1]["machine"], plans_kind)
            detail = "; ".join(filter(None, (detail, f"times of {other}" if other else "")))
        seconds = [seconds_of(attempt, folder, step.id) for attempt in attempts]
        found.append(Progressed(step, status, detail, sum(seconds) / 3600 if seconds else None))
    return found


def past_attempts(plan: Plan, steps: Sequence[Step], root: Path) -> list[Past]:
    """Returns all attempts of a plan, in the order in which they began. Raises PqkError as `progress` does."""
    folder = folder_of(plan.name, root)
    live, state = is_locked(folder / ".lock"), read_state(folder)
    found = []
    for step in steps:
        own = state["attempts"].get(step.id, [])
        for number, attempt in enumerate(own, 1):
            until = own[number]["began"] if number < len(own) else None
            status, detail = _status(step, [attempt], attempt["key"], live and number == len(own), root, until)
            found.append(
                Past(step, float(attempt["began"]), seconds_of(attempt, folder, step.id) / 3600, status, detail)
            )
    return sorted(found, key=lambda past: past.began)


def asked_backend(plan: Plan, root: Path) -> str | None:
    """Returns the backend of a plan's last run; None when it never ran."""
    asked = read_state(folder_of(plan.name, root))["asked"]
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
    on: str = LOCAL,
    needs: Needs = Needs(),  # noqa: B008
) -> list[Progressed]:
    """Runs the experiments that are not done yet, in order, and returns the progress of all.

    An experiment is done when it ended with exit code 0, and its card, configs, backend, model and requirements are
    still the same. An experiment whose requirements are not done waits. With `keep_going`, and in a plan without
    rollback, a requirement that failed its thresholds or was undecided counts as done, because it has a result. In a
    plan without rollback, such an experiment is not run again either.
    `commands_of`: the command lines of a step, instead of `commands`. `say` gets a line for every event, `echo` every
    line that experiments on this machine print. on, needs: see `pqk.launch.launch.launcher`.
    Raises PqkError when another process runs this plan, or when the disk cannot be written. KeyboardInterrupt is noted
    as an interrupted attempt and raised again.
    """
    folder = folder_of(plan.name, root)
    check_writable(folder)
    commands_of = commands_of or (lambda step: commands(step, asked, plan.rollback, root))
    with only_run(folder, plan.name):
        journal = Journal(folder)
        journal.begin({"backend": asked.backend, "model": asked.model})
        keys = _keys(plan, steps, asked, root)
        board = _Board(plan, steps, root, journal, keys, keep_going, say)

        def more(places: int) -> Iterator[Cell]:
            for step in board.free(places):
                board.begin(step)
                log = folder / f"{step.id}.log"
                yield Cell(step.id, tuple(map(tuple, commands_of(step))), root, log, folder / KIND_FILE)

        with launcher(on, needs, folder, echo, say) as launched:
            try:
                for done in run(lambda places: list(more(places)), launched):
                    board.end(done)
            except BaseException as error:
                board.stop(interrupted=isinstance(error, KeyboardInterrupt))
                raise
        journal.fold()
    return progress(plan, steps, root)


class _Board:
    """The experiments of a plan that is running: which of them may begin, and what became of the others."""

    def __init__(
        self,
        plan: Plan,
        steps: Sequence[Step],
        root: Path,
        journal: Journal,
        keys: Mapping[str, str],
        keep_going: bool,
        say: Callable[[str], None],
    ) -> None:
        self._rollback, self._keep_going, self._say = plan.rollback, keep_going, say
        self._root, self._journal, self._keys = root, journal, keys
        self._steps = {step.id: step for step in steps}
        self._place = {step.id: place for place, step in enumerate(steps)}
        self._open = {step.id: len(step.requires) for step in steps}  # requirements that are not settled
        self._behind: dict[str, list[str]] = {step.id: [] for step in steps}
        for step in steps:
            for other in step.requires:
                self._behind[other].append(step.id)
        self._now: dict[str, str] = {}
        self._ready: list[int] = []
        self._order = [step.id for step in steps]
        self._running: set[str] = set()
        for step in steps:
            if not step.requires and self._look_at(step.id):
                self._settle(step.id, self._now[step.id])

    def free(self, most: int) -> Iterator[Step]:
        """Yields at most so many experiments that may begin, the first ones of the plan's order."""
        while most > 0 and self._ready:
            most -= 1
            yield self._steps[self._order[heapq.heappop(self._ready)]]

    def begin(self, step: Step) -> None:
        """Notes that an experiment begins."""
        attempt: Attempt = {"key": self._keys[step.id], "began": time.time(), "seconds": None}
        self._journal.attempts(step.id).append(attempt | {"exit_code": None, "said": ""})
        self._journal.note(step.id)
        self._running.add(step.id)
        self._say(f"{step.id}: begins, {datetime.now(UTC).strftime('%Y-%m-%d %H:%M')} UTC")

    def end(self, done: Done) -> None:
        """Notes the end of an experiment, and looks at those that wait for it."""
        attempts = self._journal.attempts(done.name)
        attempts[-1] |= {**done.outcome, "began": done.began, "seconds": round(done.seconds, 3)}
        attempts[-1] |= {"machine": done.machine, "node": done.node}
        self._journal.note(done.name)
        self._running.discard(done.name)
        step = self._steps[done.name]
        status, detail = _status(step, attempts, self._keys[step.id], False, self._root)
        self._say(f"{step.id}: {status}{f' ({detail})' if detail else ''}, {done.seconds:.0f} s")
        if status == "error" and not attempts[-1]["said"]:
            for line in done.tail[-3:]:
                self._say(f"{step.id}: | {line}")
        self._settle(step.id, status)

    def stop(self, interrupted: bool) -> None:
        """Notes the experiments that run as stopped."""
        for name in sorted(self._running):
            attempt = self._journal.attempts(name)[-1]
            attempt["seconds"] = round(time.time() - attempt["began"], 3)
            if interrupted:
                attempt["interrupted"] = True
            self._journal.note(name)

    def _settle(self, name: str, status: str) -> None:
        """Sets what became of an experiment, and looks at those whose last open requirement it was."""
        self._now[name] = status
        settled = deque([name])
        while settled:
            for other in self._behind[settled.popleft()]:
                self._open[other] -= 1
                if not self._open[other] and other not in self._now and self._look_at(other):
                    settled.append(other)

    def _look_at(self, name: str) -> bool:
        """Puts an experiment among those that may begin; returns True where it is settled without."""
        step, attempts = self._steps[name], self._journal.attempts(name)
        status, _ = _status(step, attempts, self._keys[name], False, self._root)
        if status == "done":
            self._say(f"{name}: done before")
        elif status in _WITHOUT_SUCCESS and not self._rollback and _measured(attempts, self._keys[name]):
            self._say(f"{name}: measured before, {status} ({attempts[-1]['said']})")
        else:
            lacking = [other for other in step.requires if not self._good(other)]
            if not lacking:
                heapq.heappush(self._ready, self._place[name])
                return False
            status = "waiting"
            self._say(f"{name}: waits for {_listed(lacking, self._now)}")
        self._now[name] = status
        return True

    def _good(self, name: str) -> bool:
        """Returns whether what requires this experiment may begin."""
        if self._now[name] == "done" or (self._keep_going and self._now[name] in _WITHOUT_SUCCESS):
            return True
        # a verdict is a result; a training whose hours ran out left none
        return not self._rollback and _measured(self._journal.attempts(name), self._keys[name])


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


def _measured(attempts: Sequence[Attempt], key: str) -> bool:
    """Returns whether the last attempt was measured to its end with the present inputs."""
    return bool(attempts) and attempts[-1]["key"] == key and attempts[-1].get("measured") is True


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
        return "stopped", said or "interrupted"
    if code == EXIT_OK:
        return ("done", "") if last["key"] == key else ("waiting", "done, but its inputs have changed since")
    if code == EXIT_CHECK_FAILED:
        why = last["stopped"] if "stopped" in last else _stopped_by(step, last["began"], until, root)
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
    known: dict[str, tuple[Experiment, dict[str, str]]] = {}  # of each card: to read the configs takes milliseconds
    for step in steps:  # in order: requirements come first
        card = step.card or load_card(TEACHER_CARD, root)
        if card.id not in known:
            first = resolve(card, root)
            known[card.id] = (first, first.hashes)
        experiment, hashes = known[card.id]
        if step.train_seed is not None:
            hashes = hashes | {"workload": _seeded(experiment, step.train_seed).sha256}
        of = {"workload": hashes["workload"], "eval": hashes["evaluation"]}
        keys[step.id] = sha256_json(
            {
                "asked": sha256_json(hashes) if step.card is not None else of,
                "backend": asked.backend,
                "model": asked.model,
                "rollback": plan.rollback,
                "eval_seeds": step.eval_seeds,
                "requires": {other: keys[other] for other in step.requires},
            }
        )
    return keys


def _seeded(experiment: Experiment, train_seed: int) -> Workload:
    """Returns the workload with another train seed, as `resolve` with that setting does."""
    seeds = experiment.workload.seeds.model_copy(update={"train": train_seed})
    return experiment.workload.model_copy(update={"seeds": seeds})
