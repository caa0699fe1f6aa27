"""Decides when a training run is given up, `StopRules`: no improvement, drop, divergence, hours, epochs.

The rules depend on a run's reports alone. The lines are those of `configs/eval.yaml` (`stop_loss`, `early_stop`), as
tightened by the card. The training loop calls `StopRules.check` after each step; the runner calls `judge` for the kind
of a stop, and `at_end` when the run is over. Differences smaller than their own noise decide nothing. Nothing here
trains or needs torch. What to do about a failed stage: `pqk.recipe.rollback`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from pqk.errors import CheckFailed
from pqk.settings.recipe import STAGES, check_stages
from pqk.stats.intervals import drop_interval

if TYPE_CHECKING:
    from pqk.compress.train.loop import Progress
    from pqk.settings.evaluation import Evaluation, StopLoss

Kind = Literal["diverged", "over_budget", "drop", "no_improvement", "max_epochs"]
Checkpoint = Mapping[str, Any]

MAIN_LINE = (("K",), ("K", "Q"))
"""Recipes whose whole path is held to the line of K; T, which trains nothing, changes no line."""
DIVERGED = 2.0
"""A score above this many times that of the first validation has diverged."""


@dataclass(frozen=True)
class Stop:
    """Reason why a run ends: its kind, and one sentence with the numbers.

    After no_improvement and max_epochs, the best checkpoint is the result of the run. After the other kinds (`failed`)
    the run has no result, and repeating it without a change is useless.
    """

    kind: Kind
    why: str

    @property
    def failed(self) -> bool:
        return self.kind in ("diverged", "over_budget", "drop")


def drop_line(stage: str, recipe: Sequence[str], lines: StopLoss) -> tuple[float, str]:
    """Returns the stop-loss line of a stage of a recipe, in percent of drop against the Teacher, and its name.

    Main line (K or K→Q): `drop_stop_k_pct`, also for its Q. Q in any other recipe: `drop_stop_q_pct`. P, the joint PQK,
    and K after P, which starts from the pruned network: `drop_stop_p_pct`. Raises ValueError when the recipe is not
    valid or does not have the stage.
    """
    stages = check_stages(recipe)
    if stage not in stages:
        raise ValueError(f"stage {stage!r} is not in the recipe {'→'.join(stages)}")
    if tuple(one for one in stages if one != "T") in MAIN_LINE:
        return lines.drop_stop_k_pct, f"main line {'→'.join(stages)}"
    if stage == "K" and "P" not in stages[: stages.index("K")]:
        return lines.drop_stop_k_pct, "K"
    if stage == "Q":
        return lines.drop_stop_q_pct, "Q"
    return lines.drop_stop_p_pct, "K after P" if stage == "K" else stage


def stale(history: Sequence[Checkpoint], min_improvement_pct: float) -> int:
    """Returns how many of the last checkpoints in a row brought no improvement.

    An improvement is a 'score' (lower is better) at least `min_improvement_pct` percent below that of the last
    improvement; the first checkpoint counts as one. So small gains add up until they count. A score that is not finite
    never counts.

    Where checkpoints have the score of each held-out sample ('scores'), their differences are taken sample by sample,
    with a 95 % interval. A checkpoint is an improvement only if the interval is below 0, and raises the count only if
    the interval excludes an improvement. In between, noise decides, so the count does not change.
    """
    best: Checkpoint | None = None
    count = 0
    for entry in history:
        if not math.isfinite(_score(entry)):
            count += 1
        elif best is None:
            best, count = entry, 0
        else:
            better, worse = _improved(entry, best, min_improvement_pct)
            if better:
                best, count = entry, 0
            else:
                count += worse
    return count


def _improved(entry: Checkpoint, best: Checkpoint, least_pct: float) -> tuple[bool, bool]:
    """Returns whether `entry` is surely better than `best` by `least_pct`, and whether it surely is not."""
    enough = _score(entry) < _score(best) * (1 - least_pct / 100)
    mine, base = entry.get("scores"), best.get("scores")
    if not mine or not base:
        return enough, not enough
    change = drop_interval(mine, base, range(len(base)))
    if change.low is None or change.high is None:
        return enough, not enough
    return enough and change.high < 0, change.low > -least_pct


def untold_drop(history: Sequence[Checkpoint], line_pct: float) -> str | None:
    """Returns a sentence if the best checkpoint's drop is above a line by less than its own noise, else None."""
    best = best_checkpoint(history)
    drop, low = (best.get("drop_pct"), best.get("drop_low")) if best else (None, None)
    if drop is None or low is None or not low <= line_pct < drop:
        return None
    return (
        f"the drop of {drop:.3g} % on held-out pairs is above the stop-loss line of {line_pct:g} % by less than its "
        f"noise (it is at least {low:.3g} %), so the run is not stopped"
    )


def best_checkpoint(history: Sequence[Checkpoint]) -> Checkpoint | None:
    """Returns the entry with the lowest finite score, whose weights are kept; None without one."""
    finite = [entry for entry in history if math.isfinite(_score(entry))]
    return min(finite, key=_score) if finite else None


@dataclass(frozen=True)
class StopRules:
    """The stop-loss lines of one training run; make them with `StopRules.of`.

    The rules are checked in this order, on a `Progress` whose `history` has 'step', 'score' (lower is better) and,
    where it is known, 'drop_pct' (against the Teacher on the same samples):

    - **diverged**: the newest score is not finite, or above twice that of the first validation. Training has made the
      model far worse than at the start, and a falling learning rate does not repair that. (Smaller losses against the
      best score are handled by the next rules.) The loss counts only at a checkpoint and only once it was read: the
      loop skips a step whose gradient is not finite, and gives up by itself after twenty in a row.
    - **over_budget**: hours of this run times `devices`, plus the card's earlier hours, above
      `gpu_hours_overrun_pct` percent of its budget.
    - **no_improvement**: `no_improve_ckpt` checkpoints in a row without one; see `stale`.
    - **drop**: the same, when the best checkpoint's drop, and the lower end of its interval ('drop_low'), is above the
      line. A student that was just cut starts far above any line and improves as the learning rate falls, so a drop
      alone ends no run while it still shrinks; a run that lost its quality stops improving too. `at_end` checks the
      drop at the end of the run.
    - **max_epochs**: more than `max_epochs` epochs, where the run counts in epochs.

    While the learning rate warms up (`warmup`, a share of the run) only divergence and hours are checked, because a run
    that starts from trained weights may get worse at first.
    """

    line_pct: float
    line_name: str
    no_improve_ckpt: int
    min_improvement_pct: float
    budget_hours: float
    overrun_pct: float
    max_epochs: int
    steps_per_epoch: int | None = None
    spent_hours: float = 0.0
    devices: int = 1
    warmup: float = 0.0

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        gpu_hours: float,
        stage: str,
        recipe: Sequence[str] | None = None,
        *,
        steps_per_epoch: int | None = None,
        spent_hours: float = 0.0,
        devices: int = 1,
        warmup: float = 0.0,
    ) -> StopRules:
        """Returns the rules for `stage` (P, K, Q or PQK) of a card with this recipe (default: the stage alone).

        evaluation: the card's own, overrides included. gpu_hours: the card's budget, of which its earlier stages have
        used `spent_hours`. steps_per_epoch: None where a run is not counted in epochs. Raises ValueError for a stage
        that is not in the recipe.
        """
        if stage not in STAGES:
            raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
        lines = evaluation.stop_loss
        line, name = drop_line(stage, recipe or (stage,), lines)
        return cls(
            line,
            name,
            lines.no_improve_ckpt,
            evaluation.early_stop.min_improvement_pct,
            gpu_hours,
            lines.gpu_hours_overrun_pct,
            lines.max_epochs,
            steps_per_epoch,
            spent_hours,
            devices,
            warmup,
        )

    def check(self, progress: Progress) -> str | None:
        """Returns the reason to stop now, one sentence with the numbers, or None; called by the training loop."""
        stop = self.judge(progress)
        return stop.why if stop else None

    def judge(self, progress: Progress) -> Stop | None:
        """Returns the same as `check`, with the kind of the stop."""
        stop = self._diverged(progress) or self._over_budget(progress)
        if stop is None and progress.share >= self.warmup:
            stop = self._stale(progress.history) or self._too_long(progress)
        return stop

    def at_end(self, progress: Progress) -> Stop | None:
        """Checks a finished run for divergence and for the drop of the best checkpoint; None when it is fine."""
        return self._diverged(progress) or self._dropped(progress.history, "")

    def hours(self, progress: Progress) -> float:
        """Returns the card's GPU (or CPU) hours so far."""
        return self.spent_hours + self.devices * progress.seconds / 3600

    def _diverged(self, progress: Progress) -> Stop | None:
        if not progress.history:
            return None
        first, last = progress.history[0], progress.history[-1]
        score, at = _score(last), f"at step {last['step']:g}"
        if not math.isfinite(score):
            return Stop("diverged", f"diverged: the validation score is {score} {at}")
        read = progress.samples_per_second > 0  # the loss of a run that just began or resumed is not known yet
        if read and last["step"] == progress.step and not math.isfinite(progress.loss):
            return Stop("diverged", f"diverged: the loss is {progress.loss} {at}")
        if score > DIVERGED * _score(first):
            return Stop(
                "diverged",
                f"diverged: the validation score {score:.4g} {at} is more than {DIVERGED:g} times "
                f"the first one, {_score(first):.4g}",
            )
        return None

    def _over_budget(self, progress: Progress) -> Stop | None:
        hours, limit = self.hours(progress), self.budget_hours * self.overrun_pct / 100
        if hours <= limit:
            return None
        return Stop(
            "over_budget",
            f"{hours:.3g} GPU hours are above {self.overrun_pct:g} % of the card's {self.budget_hours:g}",
        )

    def _stale(self, history: Sequence[Checkpoint]) -> Stop | None:
        count = stale(history, self.min_improvement_pct)
        if count < self.no_improve_ckpt:
            return None
        since = f"no improvement of {self.min_improvement_pct:g} % or more in {count} checkpoints in a row"
        best = best_checkpoint(history)
        least = f": the best score is {_score(best):.4g} at step {best['step']:g}" if best else ""
        return self._dropped(history, f", and {since}") or Stop("no_improvement", since + least)

    def _dropped(self, history: Sequence[Checkpoint], more: str) -> Stop | None:
        best = best_checkpoint(history)
        drop = best.get("drop_pct") if best else None
        low = best.get("drop_low") if best else None
        if best is None or drop is None or not (drop if low is None else low) > self.line_pct:
            return None
        return Stop(
            "drop",
            f"the best checkpoint (step {best['step']:g}) drops {drop:.3g} %, above the stop-loss line of "
            f"{self.line_pct:g} % ({self.line_name}){more}",
        )

    def _too_long(self, progress: Progress) -> Stop | None:
        if self.steps_per_epoch is None or progress.step <= self.max_epochs * self.steps_per_epoch:
            return None
        epochs = progress.step / self.steps_per_epoch
        return Stop("max_epochs", f"{epochs:.4g} epochs, and at most {self.max_epochs} are allowed")


def stopper(rules: Mapping[str, Any]) -> Callable[[Progress], str | None]:
    """Returns the function that a training calls after every step; `rules`: the fields of `StopRules`.

    That function raises CheckFailed when the card's hours are used up.
    """
    lines = StopRules(**rules)

    def stop(progress: Progress) -> str | None:
        found = lines.judge(progress)
        if found is not None and found.kind == "over_budget":
            raise CheckFailed(f"stop-loss: {found.why}; its checkpoint is kept, a larger budget goes on from there")
        return found.why if found else None

    return stop


def _score(entry: Checkpoint) -> float:
    return cast(float, entry["score"])
