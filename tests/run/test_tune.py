"""The search for mixed precision on made-up measurements, the quant.yaml it writes, and its plot."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pqk.errors import PqkError
from pqk.settings.keep import keep_patterns
from pqk.settings.quant import load_quant
from pqk.tune.report import draw_pareto
from pqk.tune.search import SAME_TIME, TuneResult, search, write_quant_yaml, write_without

REPOSITORY = Path(__file__).resolve().parents[2]
QUANT = REPOSITORY / "configs" / "quant.yaml"

gains = st.lists(st.floats(0.0, 1.0), min_size=0, max_size=40)
costs = st.floats(0.01, 5.0)


class Model:
    """Each node in float takes its gain off the drop and adds its cost to the time; counts what was asked."""

    def __init__(self, gains, costs, rest=0.2):
        order = sorted(range(len(gains)), key=lambda k: -gains[k])
        self.ranked = [f"/block.{k}/MatMul" for k in order]
        self.gain = {f"/block.{k}/MatMul": gain for k, gain in enumerate(gains)}
        self.cost = {f"/block.{k}/MatMul": cost for k, cost in enumerate(costs)}
        self.rest = rest
        self.asked = []

    def __call__(self, names):
        self.asked.append(names)
        drop = self.rest + sum(self.gain.values()) - sum(self.gain[name] for name in names)
        return drop, 50 + sum(self.cost[name] for name in names)


@given(gains, st.data(), st.floats(0, 10), st.integers(2, 60))
def test_what_always_holds(gains, data, limit, evaluations):
    """Any measurements at all, even ones that do not follow the ranking."""
    model = Model(gains, [1.0] * len(gains))
    measured = {}

    def evaluate(names):
        assert names not in measured
        measured[names] = (data.draw(st.floats(-1, 12)), data.draw(st.floats(1, 100)))
        return measured[names]

    result = search(model.ranked, evaluate, limit, evaluations)
    assert 1 <= len(result.points) <= evaluations
    assert {p.names: (p.drop_pct, p.t_pair_p50_ms) for p in result.points} == measured
    assert all(set(p.names) <= set(model.ranked) for p in result.points)
    within = [p for p in result.points if p.drop_pct <= limit]
    if within:
        assert result.winner in within
        fastest = min(p.t_pair_p50_ms for p in within)
        assert result.winner.t_pair_p50_ms <= fastest * (1 + SAME_TIME)
        as_fast = [p for p in within if p.t_pair_p50_ms <= fastest * (1 + SAME_TIME)]
        assert len(result.winner.names) == min(len(p.names) for p in as_fast)
        assert any(p.drop_pct <= result.winner.drop_pct for p in result.front)
    else:
        assert result.winner is None
    for p in result.points:
        beaten = any(
            q.drop_pct <= p.drop_pct and q.t_pair_p50_ms <= p.t_pair_p50_ms and q != p
            and (q.drop_pct < p.drop_pct or q.t_pair_p50_ms < p.t_pair_p50_ms)
            for q in result.points
        )  # fmt: skip
        assert (p in result.front) is not beaten
    times = [p.t_pair_p50_ms for p in result.front]
    assert times == sorted(times)


@given(gains, st.data(), st.floats(0, 20))
def test_additive_models_get_the_fewest_worst_nodes_or_something_faster(gains, data, limit):
    costs_ = data.draw(st.lists(costs, min_size=len(gains), max_size=len(gains)))
    model = Model(gains, costs_)
    result = search(model.ranked, model, limit, max_evaluations=200)
    counts = [k for k in range(len(gains) + 1) if Model(gains, costs_)(tuple(model.ranked[:k]))[0] <= limit]
    if not counts:
        assert result.winner is None
        assert tuple(model.ranked) in model.asked
        return
    fewest = model(tuple(model.ranked[: min(counts)]))
    assert result.winner is not None
    assert result.winner.t_pair_p50_ms <= fewest[1] * (1 + SAME_TIME)
    assert result.winner.drop_pct <= limit
    if result.winner.names:  # no node of the winner can be left out
        for name in result.winner.names:
            fewer = tuple(other for other in result.winner.names if other != name)
            assert model(fewer)[0] > limit or model(fewer)[1] > result.winner.t_pair_p50_ms


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=200), st.floats(0.25, 5))
def test_few_measurements_are_enough(gains, limit):
    model = Model(gains, [1.0] * len(gains))
    result = search(model.ranked, model, limit)
    assert len(model.asked) == len(set(model.asked)) <= 24
    assert result.winner is not None  # all nodes in float leave 0.2 %, and that is always tried when needed


def test_nothing_to_do_is_one_measurement():
    model = Model([0.1, 0.2], [1.0, 1.0])
    result = search(model.ranked, model, 1.0)
    assert model.asked == [()]
    assert result.winner == result.points[0] == result.front[0]


def test_one_bad_node_among_a_hundred():
    model = Model([0.0] * 57 + [3.0] + [0.0] * 42, [0.5] * 100)
    result = search(model.ranked, model, 1.0)
    assert result.winner.names == ("/block.57/MatMul",)
    assert len(model.asked) <= 3


def test_a_wrong_ranking_is_repaired():
    """The node that matters is ranked last but one of eight: the others go back to int8."""
    model = Model([0.0] * 7 + [2.0], [1.0] * 8)
    ranked = [name for name in model.ranked if name != "/block.7/MatMul"]
    ranked.insert(6, "/block.7/MatMul")
    assert search(ranked, model, 1.0).winner.names == ("/block.7/MatMul",)


def test_noise_in_the_time_does_not_keep_a_node_in_float():
    """The second node gains nothing, and without it the time seems 1 % longer; 3 % longer would be a difference."""
    measured = {(): (2.0, 50.0), ("a",): (0.5, 60.6), ("a", "b"): (0.5, 60.0), ("b",): (2.0, 55.0)}
    assert search(["b", "a"], lambda names: measured[tuple(sorted(names))], 1.0).winner.names == ("a",)
    measured["a",] = (0.5, 61.8)
    assert search(["b", "a"], lambda names: measured[tuple(sorted(names))], 1.0).winner.names == ("b", "a")


def test_a_drop_that_is_no_number_never_wins(tmp_path):
    result = search(["a/b"], lambda names: (math.nan, 5.0) if not names else (0.5, 9.0), 1.0)
    assert result.winner.names == ("a/b",)
    assert result.points[0].drop_pct == math.inf
    draw_pareto(result, tmp_path / "p.png")


@pytest.mark.parametrize(
    ("ranked", "limit", "evaluations", "says"),
    [
        (["a", "a"], 1.0, 9, "ranked twice"),
        (["a"], math.nan, 9, "must be a number"),
        (["a"], 1.0, 1, "at least 2 evaluations"),
    ],
)
def test_bad_questions(ranked, limit, evaluations, says):
    with pytest.raises(PqkError, match=says):
        search(ranked, lambda names: (0.0, 1.0), limit, evaluations)


NAMES = ["/dec_blocks.0/attn/proj/MatMul", "ConvolutionBackpropData.845", "/it's (odd) [name] + $/MatMul"]


def test_patterns_match_the_node_and_no_other():
    for name, pattern in zip(NAMES, keep_patterns(NAMES), strict=True):
        assert re.search(pattern, name)
        assert not re.search(pattern, name + "_1")
        assert not re.search(pattern, "/x" + name)
    assert not re.search(keep_patterns(NAMES)[0], "/dec_blocks10/attn/proj/MatMul")


def test_the_winner_becomes_a_quant_yaml(tmp_path):
    out = tmp_path / "new" / "quant.yaml"
    written = write_quant_yaml(QUANT, NAMES, out)
    before = load_quant(QUANT)
    assert written.ptq.keep_list == (*before.ptq.keep_list, *keep_patterns(NAMES))
    assert load_quant(out) == written
    changed = before.model_dump(mode="json")
    changed["ptq"]["keep_list"] = list(written.ptq.keep_list)
    assert written.model_dump(mode="json") == changed
    old, new = QUANT.read_text(encoding="utf-8").splitlines(), out.read_text(encoding="utf-8").splitlines()
    assert len(new) == len(old) + len(NAMES)
    comments = [line.partition("#")[2] for line in old if "#" in line]
    assert [line.partition("#")[2] for line in new if "#" in line] == comments
    assert max(map(len, new)) <= 140


@pytest.mark.parametrize(
    "listed",
    [
        "[]",
        "[LayerNorm]  # why",
        "[LayerNorm, 'a.*b',]",
        "[\n    LayerNorm,  # norms\n    Softmax  # probabilities\n  ]",
        "\n    - LayerNorm  # norms\n    # and\n    - 'x.y'  # odd",
        "\n  - LayerNorm\n",
    ],
)
def test_every_way_to_write_the_list(listed, tmp_path):
    text = re.sub(r"\[LayerNorm, Softmax, AttentionScales\].*", lambda _: listed, QUANT.read_text(encoding="utf-8"))
    base = tmp_path / "base.yaml"
    base.write_text(text, encoding="utf-8")
    before = yaml.safe_load(text)["ptq"]["keep_list"]
    written = write_quant_yaml(base, NAMES, tmp_path / "out.yaml")
    assert written.ptq.keep_list == (*before, *keep_patterns(NAMES))
    made = (tmp_path / "out.yaml").read_text(encoding="utf-8")
    assert made.count("#") == text.count("#")
    again = write_quant_yaml(tmp_path / "out.yaml", NAMES, tmp_path / "again.yaml")
    assert again.ptq.keep_list == written.ptq.keep_list
    assert (tmp_path / "again.yaml").read_text(encoding="utf-8") == made


def test_a_wrong_base_leaves_the_target_alone(tmp_path):
    base, out = tmp_path / "base.yaml", tmp_path / "out.yaml"
    base.write_text("version: '1.0'\n", encoding="utf-8")
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(PqkError, match="missing"):
        write_quant_yaml(base, NAMES, out)
    assert out.read_text(encoding="utf-8") == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.yaml", "out.yaml"]


@pytest.mark.parametrize("limit", [1.0, 0.1])
def test_the_plot(limit, tmp_path):
    """With a winner and without one; the same data gives the same bytes."""
    model = Model([0.5, 0.4, 0.3, 0.2, 0.1], [1.0, 2.0, 3.0, 4.0, 5.0])
    result = search(model.ranked, model, limit)
    assert isinstance(result, TuneResult)
    assert (result.winner is None) == (limit < 0.2)
    path = draw_pareto(result, tmp_path / "plots" / "pareto.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 900
    assert path.read_bytes() == draw_pareto(result, tmp_path / "again.png").read_bytes()


PLAIN_LIST = " [LayerNorm, Softmax, AttentionScales]"


@pytest.mark.parametrize(
    ("listed", "left", "kept"),
    [
        (" [LayerNorm, Softmax, AttentionScales]  # why", " [LayerNorm]  # why", ("LayerNorm",)),
        (" [Softmax, LayerNorm, AttentionScales]", " [LayerNorm]", ("LayerNorm",)),
        (" [Softmax,\n    AttentionScales, 'a/b']", " [\n    'a/b']", ("a/b",)),
        (" [Softmax]", " []", ()),
        (" [LayerNorm]", " [LayerNorm]", ("LayerNorm",)),
        ("\n    - Softmax  # one\n    # two\n    - LayerNorm", "\n    # two\n    - LayerNorm", ("LayerNorm",)),
        ("\n    - LayerNorm  # one\n    - 'Softmax'", "\n    - LayerNorm  # one", ("LayerNorm",)),
    ],
)
def test_entries_are_taken_out_of_a_list_in_any_style(
    listed: str, left: str, kept: tuple[str, ...], tmp_path: Path
) -> None:
    text = QUANT.read_text().replace(PLAIN_LIST, listed)
    base, out = tmp_path / "base.yaml", tmp_path / "out.yaml"
    base.write_text(text)
    assert write_without(base, ("Softmax", "AttentionScales"), out).ptq.keep_list == kept
    assert out.read_text() == QUANT.read_text().replace(PLAIN_LIST, left)


def test_a_list_that_would_be_none_without_its_entries_is_refused(tmp_path: Path) -> None:
    base, out = tmp_path / "base.yaml", tmp_path / "out.yaml"
    base.write_text(QUANT.read_text().replace("[LayerNorm, Softmax, AttentionScales]", "\n    - Softmax"))
    with pytest.raises(PqkError, match=r"keep_list"):
        write_without(base, ("Softmax",), out)
    assert not out.exists()
