"""The training loop: schedule, averaging, resuming bit by bit, stopping."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training_toys import TINY, spec_with, tiny  # noqa: F401 (tiny is a fixture)

from pqk.compress.train.loop import Schedule, Trainer, parameter_groups
from pqk.errors import PqkError

CPU = torch.device("cpu")


def line(schedule: Schedule | None = None, decay: float = 0.9, clip: float = 1e9) -> Trainer:
    """A trainer of one linear layer."""
    torch.manual_seed(0)
    schedule = schedule or Schedule(40, 0.05, 0.0, 0.0)
    model = nn.Linear(3, 1)
    return Trainer(model, schedule, device=CPU, weight_decay=0.0, clip_norm=clip, ema=decay, autocast=False)


def fit(module, step, share):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
    return (module(x)[:, 0] - x @ torch.tensor([1.0, -2.0, 0.5])).square().mean()


def test_schedule_by_hand():
    schedule = Schedule(100, 1.0, 0.1, 0.2)
    assert [schedule.rate(s) for s in (0.0, 0.1, 0.2)] == pytest.approx([0.0, 0.5, 1.0])
    assert schedule.rate(0.6) == pytest.approx(0.55)  # half of the way down
    assert schedule.rate(1.0) == pytest.approx(0.1)
    assert schedule.share(25, 1e9) == 0.25
    assert Schedule(100, 1.0, 0.1, 0.2, minutes=2.0).share(25, 30.0) == 0.25


@given(st.floats(1e-6, 1.0), st.floats(0, 1), st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1))
def test_schedule_bounds(rate, final, warmup, first, second):
    schedule = Schedule(10, rate, rate * final, warmup)
    low, high = sorted((first, second))
    values = [schedule.rate(low), schedule.rate(high)]
    assert all(0 <= v <= rate * (1 + 1e-9) for v in values)
    if low >= warmup:
        assert values[0] >= values[1] - 1e-12 and values[1] >= rate * final * (1 - 1e-9)
    if high < warmup:
        assert values[0] <= values[1]


@given(st.integers(1, 1000), st.integers(0, 5000), st.floats(0, 1e6), st.none() | st.floats(0.01, 1e4))
def test_share_bounds(steps, step, seconds, minutes):
    assert 0 <= Schedule(steps, 1.0, 0.0, 0.0, minutes).share(step, seconds) <= 1


def test_decay_spares_vectors():
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), 0.05)
    assert [[tuple(p.shape) for p in g["params"]] for g in groups] == [[(2, 3)], [(2,), (2,), (2,)]]
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0]


def test_average_is_the_recurrence():
    """After each step: average += (1 - d) (weights - average), d = min(decay, (1 + n) / (10 + n))."""
    trainer, expected, seen = line(decay=0.5), None, []
    start = trainer.averaged()["weight"]

    def loss_of(module, step, share):
        seen.append(module.weight.detach().clone())
        return fit(module, step, share)

    trainer.run(loss_of)
    expected = start
    for n, weight in enumerate([*seen[1:], trainer.model.weight.detach()], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = expected + (1 - decay) * (weight - expected)
    assert len(seen) == 40
    assert torch.allclose(trainer.averaged()["weight"], expected, atol=1e-6)
    assert not torch.equal(trainer.averaged()["weight"], trainer.model.weight)


def test_learning_and_reports():
    trainer, rates, losses = line(), [], []

    def report(p):
        rates.append(p.learning_rate)
        losses.append(p.loss)

    assert trainer.run(fit, report=report, batch_of=lambda share: 16) == "done"
    assert rates == pytest.approx([trainer.schedule.rate(n / 40) for n in range(40)])
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.progress.step == 40 and trainer.progress.share == 1.0
    assert trainer.progress.samples_per_second > 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_without_finite_gradient_is_skipped(poison):
    trainer, before = line(), {}

    def loss_of(module, step, share):
        if step == 5:
            before.update({k: v.clone() for k, v in module.state_dict().items()})
        if step == 6:
            assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        return fit(module, step, share) * (poison if step == 5 else 1.0)

    assert trainer.run(loss_of) == "done"
    assert trainer.progress.step == 40 and before
    assert all(torch.isfinite(v).all() for v in trainer.averaged().values())


def test_a_lost_run_ends():
    with pytest.raises(PqkError, match="no finite gradient in 20 steps in a row, up to step 19; lower learning_rate"):
        line().run(lambda module, step, share: fit(module, step, share) * math.nan)


def test_clipping():
    """With a clipped norm of 1e-6 the moments of Adam are that small, without they are not."""
    for clip, small in ((1e-6, True), (1e9, False)):
        trainer = line(Schedule(1, 0.1, 0.0, 0.0), clip=clip)
        trainer.run(fit)
        moment = trainer.optimizer.state[trainer.model.weight]["exp_avg"].norm().item()
        assert (moment < 1e-6) == small


def test_early_stop_and_after(tmp_path):
    """Three validations without a better score end the run; started again, it has nothing left to do."""
    scores = iter([0.5, 0.4, 0.45, 0.4, 0.41, 0.1])
    trainer = line()
    options = {"every": 2, "patience": 3, "checkpoint": tmp_path / "c.pt"}
    assert trainer.run(fit, validate=lambda weights: {"score": next(scores)}, **options) == "early"
    p = trainer.progress
    assert (p.step, p.stale, p.best) == (10, 3, 0.4)
    assert [h["score"] for h in p.history] == [0.5, 0.4, 0.45, 0.4, 0.41]
    again = line()
    again.resume(tmp_path / "c.pt")
    assert again.run(fit, validate=lambda weights: {"score": next(scores)}, **options) == "early"
    assert again.progress.step == 10


def test_the_best_average_is_kept(tmp_path):
    """Best at step 4 of 10: those weights are kept, over a pause too, and not the last ones."""
    scores, seen = iter([0.5, 0.4, 0.45, 0.41, 0.6]), []

    def validate(weights):
        seen.append(weights)
        return {"score": next(scores)}

    options = {"every": 2, "patience": 3, "checkpoint": tmp_path / "c.pt", "validate": validate}
    outcome, trainer = "paused", line()
    while outcome == "paused":
        outcome = trainer.run(fit, pause_after_s=1e-9, **options)
        if outcome == "paused":
            trainer = line()
            trainer.resume(tmp_path / "c.pt")
    assert (outcome, trainer.progress.step, len(seen)) == ("early", 10, 5)
    assert all(torch.equal(v, seen[1][k]) for k, v in trainer.best_averaged().items())
    assert not torch.equal(trainer.averaged()["weight"], seen[1]["weight"])


def test_the_last_weights_are_validated_once():
    """A schedule that ends between two validations: its end counts too, and once."""
    trainer, steps = line(Schedule(5, 0.05, 0.0, 0.0)), []
    assert trainer.run(fit, validate=lambda weights: {"score": 1.0 / len(steps or [1])}, every=2) == "done"
    steps += [h["step"] for h in trainer.progress.history]
    assert trainer.run(fit, validate=lambda weights: {"score": 0.0}, every=2) == "done"
    assert steps == [h["step"] for h in trainer.progress.history] == [2, 4, 5]


def test_a_checkpoint_without_a_best(tmp_path):
    """One written before the best was kept: its average is the best so far, with its last score."""
    trainer, scores = line(Schedule(4, 0.05, 0.0, 0.0)), iter([0.1, 0.3])
    trainer.run(fit, validate=lambda weights: {"score": next(scores)}, every=2, checkpoint=tmp_path / "c.pt")
    old = torch.load(tmp_path / "c.pt", weights_only=True)
    assert not torch.equal(old.pop("best")["weight"], old["ema"]["weight"])
    torch.save(old, tmp_path / "c.pt")
    again = line()
    again.resume(tmp_path / "c.pt")
    assert again.progress.best == 0.3
    assert all(torch.equal(v, old["ema"][k]) for k, v in again.best_averaged().items())


def test_pause_and_resume_is_the_undisturbed_run(tmp_path):
    straight = line()
    straight.run(fit, checkpoint=tmp_path / "straight.pt")
    rounds, outcome = 0, "paused"
    while outcome == "paused":
        trainer = line()
        if rounds:
            trainer.resume(tmp_path / "c.pt")
        pause = 1e-9 if rounds < 3 else None
        outcome = trainer.run(fit, checkpoint=tmp_path / "c.pt", pause_after_s=pause)
        rounds += 1
        assert trainer.progress.step == (rounds if outcome == "paused" else 40)
    assert rounds == 4
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[key])
        assert torch.equal(straight.ema[key], trainer.ema[key])


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "c.pt"
    line().run(fit, checkpoint=path)
    whole = path.read_bytes()
    for damage in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(damage)
        with pytest.raises(PqkError, match=r"c\.pt: not a checkpoint of this model .*; start over with --fresh") as e:
            line().resume(path)
        assert "\n" not in str(e.value)
    path.write_bytes(whole)
    wide = Trainer(
        nn.Linear(4, 1), Schedule(1, 1, 0, 0), device=CPU, weight_decay=0, clip_norm=1, ema=0.9, autocast=False
    )
    with pytest.raises(PqkError, match="not a checkpoint of this model"):
        wide.resume(path)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'pwned'}",))

    torch.save({"model": Evil()}, tmp_path / "c.pt")
    with pytest.raises(PqkError, match="not a checkpoint"):
        line().resume(tmp_path / "c.pt")
    assert not (tmp_path / "pwned").exists()
