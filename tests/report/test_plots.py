import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from pqk.report.plots import ablation, draw_plots, latency, pareto_front, precision, tradeoff
from pqk.report.table import row_label


@pytest.fixture
def twelve(make_record):
    return [
        make_record(
            exp_id=f"H{i}-no-softmax",
            combo="H",
            precision="int8",
            backend="openvino",
            quantizer="nncf",
            main_metric="absrel",
            absrel=0.06 + 0.001 * i,
            quality_drop_pct=i - 3.0,
            t_pair_p50_ms=100.0 + 37 * i,
            t_pair_p95_ms=110.0 + 41 * i,
            executed_precision={"int8": 0.9, "bf16": 0.07, "f32": 0.03},
            verdict="fail" if i % 2 else "pass",
        )
        for i in range(12)
    ]


def test_four_pictures(tmp_path, twelve):
    paths, left_out = draw_plots(twelve, tmp_path / "plots")
    assert [p.name for p in paths] == [
        "tradeoff.png",
        "latency.png",
        "precision.png",
        "ablation.png",
    ] and left_out == []
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 900
            colours = picture.convert("RGB").getcolors(2**24)
            assert colours is not None and len(colours) > 20
    before = [p.read_bytes() for p in paths]
    draw_plots(twelve, tmp_path / "plots")
    assert before == [p.read_bytes() for p in paths]


def test_plots_without_data_are_left_out_and_removed(tmp_path, twelve, make_record):
    draw_plots(twelve, tmp_path)
    failed = {**twelve[0], "status": "failed"}
    paths, left_out = draw_plots([make_record(absrel=0.1), failed], tmp_path)
    assert paths == [] and list(tmp_path.iterdir()) == []
    assert left_out == [
        "tradeoff.png is left out: no record has both t_pair_p50_ms and absrel",
        "latency.png is left out: no record has t_pair_p50_ms",
        "precision.png is left out: no record has executed_precision",
        "ablation.png is left out: no record of an ablation (combo H or Ablation)",
    ]


@pytest.mark.parametrize("draw", [tradeoff, latency, precision, ablation])
def test_no_text_overlaps_for_twelve_records(twelve, draw):
    figure = draw(twelve)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = []
    for axis in figure.axes:
        legend = axis.get_legend()
        texts += [*axis.texts, *axis.get_yticklabels(), *axis.get_xticklabels(), axis.title, axis.xaxis.label]
        texts += [axis.yaxis.label, *(legend.get_texts() if legend else [])]
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts if t.get_text().strip()]
    assert len(boxes) > 12
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (first, second)


def test_tradeoff_shows_each_record_and_the_front(twelve):
    axes = tradeoff(twelve).axes[0]
    assert [t.get_text().strip() for t in axes.get_legend().get_texts()] == [row_label(r) for r in twelve]
    markers = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in markers] == [
        (r["t_pair_p50_ms"], r["absrel"]) for r in twelve
    ]
    assert len({(line.get_marker(), line.get_color()) for line in markers}) == 12
    assert axes.get_xlabel() == "t_pair_p50_ms (ms), lower is better" and axes.get_ylabel() == "absrel, lower is better"


def test_tradeoff_follows_the_main_metric(make_record):
    rows = [make_record(main_metric="delta1", delta1=0.9, t_pair_p50_ms=t) for t in (5.0, 500.0)]
    axes = tradeoff(rows).axes[0]
    assert axes.get_ylabel() == "delta1, higher is better" and axes.get_xscale() == "log"


def test_bars_show_times_and_whiskers(twelve):
    axes = latency(twelve).axes[0]
    assert [patch.get_width() for patch in axes.patches] == [r["t_pair_p50_ms"] for r in twelve]
    ends = [segment[1][0] for segment in axes.collections[0].get_segments()]
    assert ends == pytest.approx([r["t_pair_p95_ms"] for r in twelve])


def test_speed_is_told_as_the_ratio_of_one_run(make_record):
    """Milliseconds of two runs must not be divided by each other: the ratio of the interleaved run stands beside."""
    known = {"backend": "openvino", "absrel": 0.1, "main_metric": "absrel"}
    teacher = make_record(**known, role="teacher", precision="f32", t_pair_p50_ms=1160.0, speedup_vs_own_f32=1.0)
    candidate = make_record(**known, precision="int8", t_pair_p50_ms=466.0, speedup_vs_own_f32=1.13)
    axes = latency([teacher, candidate]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1160.00", "466.00  1.13x f32"]
    legend = tradeoff([teacher, candidate]).axes[0].get_legend()
    assert [text.get_text().endswith(", 1.13x f32") for text in legend.get_texts()] == [False, True]
    assert "own run" in axes.get_xlabel()


def test_labels_are_data_not_formulas(tmp_path, make_record):
    rows = [
        make_record(exp_id=name, absrel=0.1, t_pair_p50_ms=3.0) for name in ("$\\frac{$", "_x", "实验\x1b", "y" * 300)
    ]
    paths, _ = draw_plots(rows, tmp_path)
    assert [p.name for p in paths] == ["tradeoff.png", "latency.png"]
    with Image.open(paths[0]) as picture:
        assert picture.width < 3000
    assert tradeoff(rows).axes[0].get_legend().get_texts()[1].get_text() == " _x candidate"


points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12)


@given(points, st.booleans())
def test_front_is_what_none_dominates(cloud, higher):
    sign = -1 if higher else 1

    def dominates(a, b):
        return a[0] <= b[0] and sign * a[1] <= sign * b[1] and a != b

    want = {i for i, b in enumerate(cloud) if not any(dominates(a, b) for a in cloud)}
    front = pareto_front(cloud, higher)
    assert set(front) == want and len(front) == len(want)
    assert [cloud[i][0] for i in front] == sorted(cloud[i][0] for i in front)
