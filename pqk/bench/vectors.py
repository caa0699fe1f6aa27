"""Runs cases with known answers, and reports results that agree or differ, and items that no code handles.

The families and the shared metrics provide the runners: a module with a table KINDS, kind -> runner.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from textwrap import TextWrapper

from pqk.errors import EXIT_CHECK_FAILED, EXIT_OK, PqkError, nearest
from pqk.families.registry import families
from pqk.families.vectors import BadCase, Case, Compared, NotHandled, Runner, find_cases, read_info

SHARED = "pqk.families.metrics.vectors"
"""Runners of the metrics that families share."""
NAMED = 24  # names on one line


@dataclass
class Outcome:
    """The result of one case."""

    name: str
    kind: str
    compared: list[Compared] = field(default_factory=list)
    not_handled: list[str] = field(default_factory=list)
    not_compared: int = 0  # intermediate results that pqk does not compute
    failure: str = ""  # why the case could not be run to its end
    damaged: bool = False  # a file of the case is damaged

    @property
    def state(self) -> str:
        """Returns passes, fails, not handled, partly handled or damaged."""
        if self.damaged:
            return "damaged"
        if self.failure or not all(each.passes for each in self.compared):
            return "fails"
        if self.not_handled:
            return "partly handled" if self.compared else "not handled"
        return "passes" if self.compared else "fails"

    def report(self) -> str:
        """Returns the lines to print, at most 120 columns wide."""
        wrap = TextWrapper(120, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)
        wrap.break_long_words = False
        return "\n".join([f"{self.name} ({self.kind}): {self.state}", *map(wrap.fill, self._facts())])

    def _facts(self) -> Iterator[str]:
        """Yields the tensors of each pass mark, the failures, and the items that are not handled."""
        for mark in dict.fromkeys(each.mark for each in self.compared):
            group = [each for each in self.compared if each.mark == mark]
            worst = max(group, key=lambda each: each.error)
            error = "all equal" if not worst.error else f"largest relative error {worst.error:.1e} ({worst.name})"
            yield f"{_names([each.name for each in group])}: {error}, pass mark {mark:.2g}"
        for each in self.compared:
            if not each.passes:
                yield f"FAILS {each.name}: {each.why or f'error {each.error:.1e}, pass mark {each.mark:.2g}'}"
        if self.failure:
            yield f"{'damaged' if self.damaged else 'FAILS'}: {self.failure}"
        elif not self.compared and not self.not_handled:
            yield "FAILS: it holds no expected result"
        if self.not_compared:
            yield f"{self.not_compared} mid_* are not compared"
        if self.not_handled:
            yield f"no code handles {_names(self.not_handled)}"


def runners() -> dict[str, Runner]:
    """Returns the runner of every kind that a family or a metric has code for."""
    found: dict[str, Runner] = {}
    for module in (*(of.vectors for of in families() if of.vectors), SHARED):
        found |= import_module(module).KINDS
    return found


def run_case(path: Path, kinds: Mapping[str, Runner] | None = None) -> Outcome:
    """Runs one case. Every error ends in an Outcome: damaged, not handled, or failed when the runner raises."""
    kinds = runners() if kinds is None else kinds
    outcome = Outcome(path.name, "unknown kind")
    try:
        case = Case(path)
        outcome.kind = case.kind
        if case.kind not in kinds:
            outcome.not_handled = [f"the kind {case.kind}"]
            return outcome
        for each in kinds[case.kind](case):
            outcome.compared.append(each)
        outcome.not_handled, outcome.not_compared = case.not_handled(), case.not_compared()
    except BadCase as error:
        outcome.failure, outcome.damaged = str(error), True
    except NotHandled as error:
        outcome.not_handled.append(str(error))
    except Exception as error:  # any defect of a file or of our code shows as a failure of this case
        outcome.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return outcome


def run_folder(folder: Path, only: Sequence[str] = ()) -> Iterator[Outcome]:
    """Runs every case in and below the folder, or those of the kinds `only` (names or patterns such as NAME_*).

    Raises BadCase for a folder without cases, and PqkError when no case is of the wanted kinds. With `only`, a case
    whose kind cannot be read is reported too.
    """
    kinds, seen, ran = runners(), set(), False
    for path in find_cases(folder):
        try:
            kind = str(read_info(path)["kind"]) if only else None
        except (BadCase, KeyError):
            kind = None  # it may be one of them
        seen.add(str(kind))
        if kind is None or any(fnmatchcase(kind, pattern) for pattern in only):
            ran = True
            yield run_case(path, kinds)
    if not ran:
        raise PqkError(f"{folder}: no case is of the kind {' or '.join(only)}{nearest(only[0], seen)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases of a folder and prints each; returns 0 when all pass, 1 when any fails or is not handled.

    Raises PqkError (exit code 2) for a folder without cases and, at the end, for a damaged case.
    """
    parser = argparse.ArgumentParser(prog="check_vectors.py", description="Compare pqk with cases of known answers.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a case, or a folder with cases in it or below")
    parser.add_argument("--only", metavar="KIND", action="append", default=[], help="only this kind; may be repeated")
    options = parser.parse_args(arguments)
    outcomes = []
    for outcome in run_folder(options.folder, options.only):
        print(outcome.report(), flush=True)
        outcomes.append(outcome)
    states = [outcome.state for outcome in outcomes]
    print(f"{len(states)} cases: {', '.join(f'{states.count(state)} {state}' for state in sorted(set(states)))}")
    unknown = sorted({outcome.kind for outcome in outcomes if outcome.state == "not handled"})
    if unknown:
        print(f"kinds that no code handles: {', '.join(unknown)}")
    damaged = [outcome for outcome in outcomes if outcome.damaged]
    if damaged:
        more = f" (and {len(damaged) - 1} more damaged cases)" if damaged[1:] else ""
        raise PqkError(damaged[0].failure + more)
    return EXIT_OK if set(states) == {"passes"} else EXIT_CHECK_FAILED


def _names(names: Sequence[str]) -> str:
    """Returns the names as text: items of a list as one name; of many names, intermediate results are only counted."""
    names = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names))
    if len(names) <= NAMED:
        return ", ".join(names)
    shown = [name for name in names if not name.startswith("mid_")]
    hidden = len(names) - len(shown)
    cut = shown[:NAMED] + ([f"{len(shown) - NAMED} more"] if shown[NAMED:] else [])
    return ", ".join([*cut, f"{hidden} mid_*"] if hidden else cut)
