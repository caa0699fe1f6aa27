"""The stop rules, the rollback table and the run log."""

from __future__ import annotations

import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_toys import TINY, environment

from pqk.compress.train.loop import Progress, Schedule, Trainer
from pqk.compress.train.stop_rules import StopRules, best_checkpoint, drop_line, stale, untold_drop
from pqk.errors import PqkError
from pqk.families.dust3r.parts import ATTENTION, LAST_LAYERS
from pqk.families.dust3r.settings import Evaluation, load_evaluation
from pqk.recipe import rollback
from pqk.recipe.rollback import TABLE, Move, State, next_move
from pqk.record.runlog import RunLog
from pqk.settings.keep import split_entry
from pqk.settings.quant import load_quant
from pqk.settings.recipe import STAGES, check_stages

REPOSITORY = Path(__file__).resolve().parents[2]
patient = settings(max_examples=60, deadline=None)  # a busy machine is no failure


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return load_evaluation(REPOSITORY / "configs" / "eval.yaml")


def seen(*scores: float, drops: tuple[float | None, ...] = (), **known: Any) -> Progress:
    """A run that validated every 100 steps."""
    history = [{"step": 100 * n, "seconds": 10.0 * n, "score": score} for n, score in enumerate(scores, 1)]
    for entry, drop in zip(history, drops, strict=False):
        if drop is not None:
            entry["drop_pct"] = drop
    at = {"step": 100 * len(scores), "seconds": 10.0 * len(scores), "share": 0.5, "loss": 1.0}
    return Progress(**{**at, "samples_per_second": 1.0, **known}, history=history)


@pytest.fixture(scope="module")
def rules(evaluation: Evaluation) -> StopRules:
    return StopRules.of(evaluation, 10, "K", ("K", "Q"))


@pytest.mark.parametrize(
    ("stage", "recipe", "line"),
    [
        ("K", ("K",), 1.5),
        ("K", ("K", "Q"), 1.5),
        ("Q", ("K", "Q"), 1.5),
        ("Q", ("Q",), 2.0),
        ("Q", ("P", "K", "Q"), 2.0),
        ("P", ("P",), 3.0),
        ("P", ("P", "K", "Q"), 3.0),
        ("K", ("P", "K"), 3.0),
        ("K", ("K", "P"), 1.5),
        ("PQK", ("PQK",), 3.0),
        ("Q", ("K", "T", "Q"), 1.5),
        ("Q", ("T", "Q"), 2.0),
    ],
)
def test_lines(evaluation: Evaluation, stage: str, recipe: tuple[str, ...], line: float) -> None:
    assert drop_line(stage, recipe, evaluation.stop_loss)[0] == line
    assert StopRules.of(evaluation, 1, stage, recipe).line_pct == line


def test_a_card_that_tightens_a_line_is_heard(evaluation: Evaluation) -> None:
    tight = evaluation.model_copy(
        update={"stop_loss": evaluation.stop_loss.model_copy(update={"drop_stop_q_pct": 1.2})}
    )
    assert StopRules.of(tight, 1, "Q").line_pct == 1.2
    assert StopRules.of(tight, 1, "K").line_pct == 1.5


@pytest.mark.parametrize(("stage", "recipe"), [("X", None), ("K", ("P", "Q")), ("K", ("PQK", "K"))])
def test_a_stage_that_is_none(evaluation: Evaluation, stage: str, recipe: tuple[str, ...] | None) -> None:
    with pytest.raises(ValueError, match=r"none of|not in the recipe|alone"):
        StopRules.of(evaluation, 1, stage, recipe)


def test_no_improvement(rules: StopRules) -> None:
    assert rules.check(seen(0.2, 0.15, 0.151, 0.152)) is None
    stop = rules.judge(seen(0.2, 0.15, 0.151, 0.152, 0.1499))  # 0.07 % better is not enough
    assert stop is not None and stop.kind == "no_improvement" and not stop.failed
    assert stop.why == "no improvement of 0.1 % or more in 3 checkpoints in a row: the best score is 0.1499 at step 500"
    assert rules.check(seen(0.2, 0.15, 0.151, 0.152, 0.1498)) is None


def test_small_gains_add_up(rules: StopRules) -> None:
    creeping = [0.15 * 0.9995**n for n in range(20)]
    assert rules.check(seen(*creeping)) is None
    assert stale([{"score": s} for s in creeping], 0.1) < 3


def entry(*scores: float, **more: float) -> dict[str, Any]:
    """A checkpoint with the scores of its held-out pairs."""
    return {"step": 1, "score": sum(scores) / len(scores), "scores": list(scores), **more}


def test_differences_within_their_noise_decide_nothing() -> None:
    """A mean that rises or falls by chance neither counts as an improvement nor as none; a steady change does."""
    base = (0.10, 0.12, 0.14, 0.16)
    noisy = [
        tuple(s * f for s, f in zip(base, factors, strict=True))
        for factors in ((1.1, 0.9, 1.1, 0.88), (0.9, 1.1, 0.9, 1.12))
    ]
    waiting = [entry(*base), *(entry(*scores) for scores in noisy * 3)]
    assert stale(waiting, 0.1) == 0
    assert stale([{"score": e["score"]} for e in waiting], 0.1) >= 1  # without the pairs nothing is known of the noise
    assert stale([entry(*base), *[entry(*(1.01 * s for s in base))] * 3], 0.1) == 3  # 1 % worse in every pair
    assert stale([entry(*base), entry(*(1.01 * s for s in base)), entry(*(0.99 * s for s in base))], 0.1) == 0


def test_a_drop_above_the_line_by_less_than_its_noise_stops_nothing(rules: StopRules) -> None:
    line = rules.line_pct
    told, untold = (
        entry(0.1, 0.1, drop_pct=line + 2, drop_low=line + 1),
        entry(0.1, 0.1, drop_pct=line + 2, drop_low=line - 1),
    )
    assert rules.at_end(Progress(step=9, history=[told])) is not None
    assert rules.at_end(Progress(step=9, history=[untold])) is None
    assert untold_drop([told], line) is None
    assert "by less than its noise" in (untold_drop([untold], line) or "")


def test_drop_ends_no_run_that_still_improves(rules: StopRules) -> None:
    begun = seen(0.5, 0.3, 0.2, drops=(330, 160, 70))
    assert rules.check(begun) is None
    assert rules.check(seen(0.12, 0.119, 0.118, drops=(4.0, 3.1, 2.2), share=0.99)) is None
    ended = rules.at_end(begun)
    assert ended is not None and ended.kind == "drop" and ended.failed
    assert ended.why == ("the best checkpoint (step 300) drops 70 %, above the stop-loss line of 1.5 % (main line K→Q)")


def test_drop_and_no_improvement(rules: StopRules) -> None:
    scores, drops = (0.2, 0.118, 0.119, 0.1185, 0.12), (80, 2.6, 3.5, 3.0, 4.3)
    stop = rules.judge(seen(*scores, drops=drops))
    assert stop is not None and (stop.kind, stop.failed) == ("drop", True)
    assert "step 200" in stop.why and "2.6 %" in stop.why and "3 checkpoints in a row" in stop.why
    within = rules.judge(seen(*scores, drops=(80, 1.5, 3.5, 3.0, 4.3)))  # at the line is not above it
    assert within is not None and within.kind == "no_improvement"
    unknown = rules.judge(seen(*scores))
    assert unknown is not None and unknown.kind == "no_improvement"
    assert rules.at_end(seen(*scores)) is None


def test_divergence(rules: StopRules) -> None:
    for score in (math.nan, math.inf):
        stop = rules.judge(seen(0.2, score))
        assert stop is not None and stop.kind == "diverged" and stop.failed and "step 200" in stop.why
        assert rules.at_end(seen(0.2, score)) is not None
    stop = rules.judge(seen(0.2, 0.41))
    assert stop is not None and stop.why == (
        "diverged: the validation score 0.41 at step 200 is more than 2 times the first one, 0.2"
    )
    assert rules.check(seen(0.2, 0.4)) is None


def test_a_loss_that_is_not_finite_counts_at_a_checkpoint(rules: StopRules) -> None:
    stop = rules.judge(seen(0.2, 0.19, loss=math.nan))
    assert stop is not None and stop.why == "diverged: the loss is nan at step 200"
    assert rules.check(seen(0.2, 0.19, loss=math.nan, step=201)) is None  # one wild batch, which the loop leaves out
    assert rules.check(seen(0.2, 0.19, loss=math.nan, samples_per_second=0.0)) is None  # not read yet
    assert rules.check(Progress()) is None


def test_hours(evaluation: Evaluation) -> None:
    rules = StopRules.of(evaluation, 2.0, "P", spent_hours=1.0, devices=2)
    assert rules.check(Progress(seconds=0.7 * 3600)) is None  # 1 + 2 * 0.7 = 2.4 = 120 % of 2
    stop = rules.judge(Progress(seconds=0.71 * 3600))
    assert stop is not None and (stop.kind, stop.failed) == ("over_budget", True)
    assert stop.why == "2.42 GPU hours are above 120 % of the card's 2"
    assert rules.hours(Progress(seconds=3600)) == 3.0


def test_epochs(evaluation: Evaluation) -> None:
    rules = StopRules.of(evaluation, 100, "K", steps_per_epoch=7)
    assert rules.check(Progress(step=210, share=1.0)) is None  # exactly 30: such a run ends by itself
    stop = rules.judge(Progress(step=211, share=0.5))
    assert stop is not None and (stop.kind, stop.failed) == ("max_epochs", False) and "at most 30" in stop.why
    assert StopRules.of(evaluation, 100, "K").check(Progress(step=10**6)) is None


def test_warm_up(evaluation: Evaluation) -> None:
    rules = StopRules.of(evaluation, 1, "P", warmup=0.3)
    worse = (0.12, 0.14, 0.15, 0.16)
    assert rules.check(seen(*worse, share=0.29)) is None
    assert rules.check(seen(*worse, share=0.3)) is not None
    assert rules.check(seen(*worse, share=0.1, seconds=4000)) is None
    assert rules.check(seen(*worse, share=0.1, seconds=4400)) is not None  # hours and divergence count from the start
    assert rules.check(seen(*worse, 0.3, share=0.1)) is not None


def test_the_first_checkpoint_may_be_the_bad_one(rules: StopRules) -> None:
    assert best_checkpoint([]) is None
    assert best_checkpoint([{"score": math.nan}]) is None
    assert stale([{"score": math.nan}, {"score": 0.2}], 0.1) == 0


Scores = st.lists(st.floats(1e-3, 10), min_size=1, max_size=12)


@patient
@given(Scores, st.floats(0, 5), st.floats(1e-3, 1e3))
def test_staleness_knows_no_scale(scores: list[float], least: float, factor: float) -> None:
    power = 2.0 ** round(math.log2(factor))  # exact in floating point
    count = stale([{"score": s} for s in scores], least)
    assert count == stale([{"score": s * power} for s in scores], least)
    assert 0 <= count < len(scores)


@patient
@given(Scores, st.integers(1, 5), st.floats(0, 5), st.lists(st.floats(1, 2), max_size=4))
def test_more_stale_checkpoints_never_let_a_run_go_on(
    scores: list[float], patience: int, least: float, worse: list[float]
) -> None:
    rules = StopRules(1.5, "K", patience, least, 1e9, 120, 30)
    before = rules.check(seen(*scores))
    longer = [*scores, *(min(scores) * factor for factor in worse)]
    after = rules.check(seen(*longer))
    # a score back below twice the first one is no divergence any more; every other reason stays
    if before is not None and not before.startswith("diverged"):
        assert after is not None
    patient = replace(rules, no_improve_ckpt=patience + 1)
    if patient.check(seen(*longer)) is not None:
        assert after is not None


@patient
@given(Scores, st.floats(0, 1e5), st.floats(0, 1e5), st.integers(0, 50), st.integers(0, 50))
def test_later_is_never_better(scores: list[float], seconds: float, more: float, step: int, further: int) -> None:
    rules = StopRules(1.5, "K", 3, 0.1, 10, 120, 3, steps_per_epoch=10)
    if rules.check(seen(*scores, seconds=seconds, step=step)) is not None:
        assert rules.check(seen(*scores, seconds=seconds + more, step=step + further)) is not None


@patient
@given(Scores, st.lists(st.floats(-5, 100), min_size=12, max_size=12), st.floats(0, 20), st.floats(0, 20))
def test_a_looser_line_never_stops_what_a_tighter_lets_go(
    scores: list[float], drops: list[float], one: float, other: float
) -> None:
    tight, loose = sorted((one, other))
    progress = seen(*scores, drops=tuple(drops))
    strict, easy = (StopRules(line, "K", 3, 0.1, 1e9, 120, 30) for line in (tight, loose))
    if easy.at_end(progress) is not None:
        assert strict.at_end(progress) is not None
    # whether a run ends does not hang on the line, only what its end is worth
    assert (strict.judge(progress) is None) == (easy.judge(progress) is None)


@pytest.mark.skipif("stop" not in inspect.signature(Trainer.run).parameters, reason="this loop takes no stop rule")
@pytest.mark.parametrize(
    ("score_of", "kind", "steps"),
    [
        (lambda n: 0.12, "no_improvement", 40),
        (lambda n: 0.2, "drop", 40),
        (lambda n: 0.1 * 1.3**n, "diverged", 40),
        (lambda n: 0.13 - 0.001 * n, None, 120),
    ],
)
def test_a_real_loop_is_stopped(
    rules: StopRules, score_of: Callable[[int], float], kind: str | None, steps: int
) -> None:
    schedule = Schedule(steps=120, learning_rate=1e-3, final_rate=1e-5, warmup=0.05)
    trainer = Trainer(
        torch.nn.Linear(4, 1),
        schedule,
        device=torch.device("cpu"),
        weight_decay=0,
        clip_norm=1,
        ema=0.9,
        autocast=False,
    )

    def validate(_: object) -> dict[str, float]:
        score = score_of(len(trainer.progress.history) + 1)
        return {"score": score, "absrel": score, "drop_pct": 100 * (score / 0.12 - 1)}

    def loss_of(model: torch.nn.Module, step: int, share: float) -> torch.Tensor:
        loss: torch.Tensor = model(torch.ones(8, 4)).square().mean()
        return loss

    outcome = trainer.run(loss_of, validate=validate, every=10, patience=100, stop=rules.check)
    found = rules.judge(trainer.progress)
    assert (outcome, trainer.progress.step) == ("stopped" if kind else "done", steps)
    assert (found.kind if found else None) == kind
    if kind:
        assert found is not None and trainer.progress.reason == found.why
    assert (rules.at_end(trainer.progress) is None) == (kind in (None, "no_improvement"))


# --- rollback ---------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "quant.ptq.keep_list": ["LayerNorm", "Softmax", "AttentionScales"],
    "quant.qat.epochs": 12,
    "distill.loss.beta_start": 0.5,
    "distill.loss.beta_end": 0.7,
    "distill.loss.task_share": 0.7,
    "prune.rho": 0.3,
    "prune.train.epochs": 12,
    "reduce.tokens": 0.5,
    "reduce.tail": "quarter",
}
HOURS = {"P": 1.2, "K": 2.0, "T": 0.1, "Q": 0.5}


def state(stage: str, *recipe: str, **known: Any) -> State:
    named = {"attention": ATTENTION, "last_layers": LAST_LAYERS}
    return State(
        stage, recipe, **{"trouble": f"{stage} drops 3 %", "settings": SETTINGS, "hours": HOURS, **named, **known}
    )


def allowed(recipe: tuple[str, ...]) -> bool:
    try:
        return bool(check_stages(recipe))
    except ValueError:
        return False


def chain(begin: State) -> list[Move]:
    """Every move until none is left, each applied to what the next one sees."""
    moves: list[Move] = []
    now = begin
    while (move := next_move(now)) is not None:
        moves.append(move)
        assert len(moves) < 20, "the chain does not end"
        now = replace(
            now,
            settings={**now.settings, **move.settings},
            recipe=move.recipe or now.recipe,
            tried=(*now.tried, move.name),
        )
        if now.stage not in now.recipe:
            break
    return moves


def test_q_alone() -> None:
    moves = chain(state("Q", "Q"))
    assert [m.name for m in moves] == ["keep-attention", "keep-heads", "distil-first", "longer-qat"]
    assert moves[0].settings["quant.ptq.keep_list"][3:] == [*ATTENTION]
    assert moves[1].settings["quant.ptq.keep_list"][3:] == [*ATTENTION, *LAST_LAYERS]
    assert moves[2].recipe == ("K", "Q") and moves[2].hours == 2.5
    assert moves[3].settings == {"quant.qat.epochs": 17}
    assert moves[3].hours == pytest.approx(0.5 * 17 / 12)
    assert all(m.why.startswith("Q drops 3 %; ") for m in moves)
    nameless = chain(state("Q", "Q", last_layers=()))  # of a family that names no last layers
    assert [m.name for m in nameless] == ["keep-attention", "distil-first", "longer-qat"]
    assert chain(state("Q", "Q", attention=(), last_layers=(), trains=False)) == []


def test_the_worst_ranked_nodes_go_first() -> None:
    ranking = (("Softmax", 0.3), ("decoder:^/a$", 0.3), ("encoder:^/b$", 0.15), ("decoder:^/c$", 0.1), ("^/d$", 0.05))
    moves = chain(state("Q", "K", "Q", ranking=ranking))
    assert [m.name for m in moves] == ["keep-worst-nodes", "longer-qat"]
    added = moves[0].settings["quant.ptq.keep_list"][3:]
    assert added == ["decoder:^/a$", "encoder:^/b$", "decoder:^/c$"]  # half of the error; what is listed already is not
    assert "55 % of the quantization error" in moves[0].why
    many = tuple((f"^/{n}$", 0.01) for n in range(9))
    first = next_move(state("Q", "Q", ranking=many))
    assert first is not None and len(first.settings["quant.ptq.keep_list"]) == 3 + rollback.MOST_NODES
    useless = next_move(state("Q", "Q", ranking=(("^/a$", 0.0), ("^/b$", -0.2))))
    assert useless is not None and useless.name == "distil-first"


def test_p() -> None:
    moves = chain(state("P", "P", "Q"))
    assert [m.name for m in moves] == ["less-pruning", "distil-after", "undo-pruning"]
    assert moves[0].settings == {"prune.rho": 0.1, "prune.train.epochs": 8}
    assert moves[0].hours == pytest.approx(1.2 * 8 / 12)
    assert moves[1].recipe == ("P", "K", "Q") and moves[1].settings == {}
    assert moves[2].recipe == ("K", "Q")
    light = chain(state("P", "P", settings={**SETTINGS, "prune.rho": 0.1}))
    assert [m.name for m in light] == ["distil-after", "undo-pruning"]
    assert light[0].settings == {"prune.train.epochs": 8}  # the shorter fine-tune comes with the first of both
    assert light[1].recipe == ("K",)
    assert next_move(state("P", "P", tried=("less-pruning", "distil-after"))) is None


def test_k() -> None:
    moves = chain(state("K", "K"))
    assert [m.name for m in moves] == ["smaller-beta", "longer-task-phase"]
    assert moves[0].settings == {"distill.loss.beta_start": 0.25, "distill.loss.beta_end": 0.35}
    assert moves[1].settings == {"distill.loss.task_share": 0.85}
    after = [m.name for m in chain(state("K", "P", "K"))]
    assert after == ["smaller-beta", "longer-task-phase", "less-pruning", "undo-pruning"]
    assert [m.name for m in chain(state("K", "K", "P"))] == ["smaller-beta", "longer-task-phase"]
    assert chain(state("K", "P", "K"))[2].hours == pytest.approx(1.2 * 8 / 12 + 2.0)


def test_t() -> None:
    moves = chain(state("T", "T", "Q"))
    assert [m.name for m in moves] == ["fewer-merged", "none-merged", "finer-tail"]
    assert [m.settings for m in moves] == [{"reduce.tokens": 0.3}, {"reduce.tokens": 0.0}, {"reduce.tail": "half"}]
    assert moves[0].hours == pytest.approx(0.1)
    # a student learns with its tokens merged, so other ones mean another student
    assert [m.hours for m in chain(state("T", "K", "T"))] == [pytest.approx(2.1)] * 2 + [pytest.approx(0.1)]
    alone = {**SETTINGS, "reduce.tail": "full"}
    assert [m.name for m in chain(state("T", "T", settings=alone))] == ["fewer-merged"]  # something must become less
    tail = {**SETTINGS, "reduce.tokens": 0.0}
    assert [m.name for m in chain(state("T", "T", settings=tail))] == ["finer-tail"]
    (distilled,) = (m.recipe for m in chain(state("Q", "T", "Q")) if m.name == "distil-first")
    assert distilled == ("K", "T", "Q")


def test_pkq_falls_back_on_kq_and_joint_has_no_rung() -> None:
    assert chain(state("Q", "P", "K", "Q"))[-1].recipe == ("K", "Q")
    assert next_move(state("PQK", "PQK")) is None


def test_what_is_unknown_or_too_dear_is_passed_over() -> None:
    bare = state("Q", "Q", settings={}, hours={})
    (only,) = chain(bare)
    assert only.name == "distil-first" and only.hours is None
    assert [m.name for m in chain(state("Q", "Q", hours_left=0.6))] == ["keep-attention", "keep-heads"]
    assert next_move(state("K", "K", hours_left=1.9)) is None


def test_the_table_is_complete() -> None:
    assert set(TABLE) == set(STAGES)
    json.dumps([move.as_data() for stage in ("Q", "P", "K", "T") for move in chain(state(stage, stage))])


@patient
@given(
    st.sampled_from([recipe for n in range(1, 5) for recipe in permutations("PKTQ", n) if allowed(recipe)]),
    st.data(),
)
def test_every_chain_ends(recipe: tuple[str, ...], data: Any) -> None:
    stage = data.draw(st.sampled_from(recipe))
    left = data.draw(st.floats(0, 10))
    known = data.draw(st.dictionaries(st.sampled_from("PKTQ"), st.floats(0, 5)))
    values = {k: v for k, v in SETTINGS.items() if data.draw(st.booleans())}
    moves = chain(state(stage, *recipe, hours=known, hours_left=left, settings=values))
    assert len({move.name for move in moves}) == len(moves)
    for move in moves:
        assert move.hours is None or 0 <= move.hours <= left
        assert move.settings or move.recipe is not None
        assert move.recipe is None or allowed(move.recipe)


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_the_patterns_name_nodes_of_real_graphs(tmp_path: Path, head: str) -> None:
    """What rollback keeps in float is there in the exported graphs, and is what it says."""
    import onnx

    from backends.exchange import export
    from pqk.models import build_model

    load_quant(REPOSITORY / "configs" / "quant.yaml", {"ptq.keep_list": [*ATTENTION, *LAST_LAYERS]})
    widths = {"dpt": {"feature_dim": 16, "last_dim": 8, "layer_dims": [8, 12, 16, 24]}, "dec_depth": 3}
    model = build_model("dust3r", {**TINY, "head_type": head, **(widths if head == "dpt" else {})})
    for name, spec in model.graphs(64, 64).items():
        made = export(spec.module, spec.inputs, spec.output_names, tmp_path / f"{name}.onnx")
        nodes = {n.name: n.op_type for n in onnx.load(made.path).graph.node}
        attention = {n for n in nodes if re.search(*ATTENTION, n)}
        blocks = {n.rsplit("/", 1)[0] for n in nodes if n.endswith("attn/Softmax")}
        assert attention == {f"{block}/{m}" for block in blocks for m in ("MatMul", "MatMul_1")}
        of, pattern = split_entry(*LAST_LAYERS)
        assert of == "decoder"
        heavy = {n for n in nodes if re.search(pattern, n) and nodes[n] in ("Conv", "MatMul", "Gemm")}
        assert len(heavy) == (0 if name == "encoder" else 2 if head == "linear" else 6)


# --- run log ----------------------------------------------------------------------------------------------------------


def test_log_is_read_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "D1")
    assert log.read() == []
    first = log.append("stop", stage="K", why="2 % → too much\nüber", loss=math.nan, shares=(0.1, math.inf))
    assert first["loss"] is None and first["shares"] == [0.1, None]
    move = next_move(state("K", "K"))
    assert move is not None
    log.append("move", **move.as_data())
    entries = RunLog(tmp_path, "D1").read()
    assert entries[0] == first
    assert (entries[1]["event"], entries[1]["name"], entries[1]["recipe"]) == ("move", "smaller-beta", None)
    assert len(log.path.read_bytes().splitlines()) == 2
    assert log.path == tmp_path / "logs" / "runs" / "D1.jsonl"


def test_plain_data_only(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "D1")
    with pytest.raises(TypeError):
        log.append("stop", what=object())
    assert not log.path.exists()


@patient
@given(st.integers(1, 200))
def test_a_torn_line_costs_itself_alone(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    log = RunLog(tmp_path_factory.mktemp("torn"), "A1")
    log.append("begin", seed=0)
    log.append("stop", why="ü" * 90)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[: max(whole.index(b"\n") + 1, len(whole) - cut)])
    kept = len(log.read())
    assert kept == (2 if cut == 1 else 1)  # without its line break alone it is whole
    log.append("resume")
    assert [e["event"] for e in log.read()] == [*["begin", "stop"][:kept], "resume"]


def _write_many(root: Path, who: int) -> None:
    log = RunLog(root, "A1")
    for n in range(50):
        log.append("step", who=who, n=n, pad="x" * 5000)


def test_many_writers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, who)) for who in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    entries = RunLog(tmp_path, "A1").read()
    assert len(entries) == 150
    for who in range(3):
        assert [e["n"] for e in entries if e["who"] == who] == list(range(50))


def test_a_killed_writer_loses_nothing_it_returned_from(tmp_path: Path) -> None:
    script = "from pathlib import Path\nfrom pqk.record.runlog import RunLog\nlog = RunLog(Path('.'), 'A1')\n"
    script += "for n in range(10**9):\n    log.append('step', n=n)\n    print(n, flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(20):
        said = process.stdout.readline()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    said = (process.communicate()[0].split() or [said])[-1]
    numbers = [e["n"] for e in RunLog(tmp_path, "A1").read()]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= int(said)
    RunLog(tmp_path, "A1").append("resume")
    assert RunLog(tmp_path, "A1").read()[-1]["event"] == "resume"


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(PqkError, match=r"cannot write .*A1.jsonl: a parent of it is a file"):
        RunLog(tmp_path, "A1").append("begin")
    (tmp_path / "other" / "logs" / "runs" / "A1.jsonl").mkdir(parents=True)
    with pytest.raises(PqkError, match="cannot read"):
        RunLog(tmp_path / "other", "A1").read()
