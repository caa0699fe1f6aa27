import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from pqk.families.dust3r.settings import load_evaluation
from pqk.report.cells import row_label
from pqk.report.plots import SHOWN, ablation, draw_plots, latency, pareto_front, precision, tradeoff

ROOT = Path(__file__).parents[2]


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
    paths, left_out = draw_plots([make_record(absrel=0.1, main_metric="absrel"), failed], tmp_path)
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
    assert [text.get_text() for text in axes.texts] == ["1160.00", "466.00  1.13x own f32"]
    legend = tradeoff([teacher, candidate]).axes[0].get_legend()
    assert [text.get_text().endswith(", 1.13x own f32") for text in legend.get_texts()] == [False, True]
    assert "own run" in axes.get_xlabel()


def test_a_number_stands_behind_its_interval(make_record):
    row = make_record(backend="openvino", t_pair_p50_ms=700.0, intervals={"t_pair_p50_ms": [690.0, 790.0]})
    axes = latency([row]).axes[0]
    assert axes.texts[0].xy == (790.0, 0) and axes.get_xlim()[1] > 790.0


def test_labels_are_data_not_formulas(tmp_path, make_record):
    rows = [
        make_record(exp_id=name, absrel=0.1, main_metric="absrel", t_pair_p50_ms=3.0)
        for name in ("$\\frac{$", "_x", "实验\x1b", "y" * 300)
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


# Intervals, limits, axes


@pytest.fixture(scope="module")
def limits():
    return load_evaluation(ROOT / "configs" / "eval.yaml").thresholds


@pytest.fixture
def close(make_record):
    """The Teacher and a candidate that differ by 0.03 %, as B1 does."""
    known = {"backend": "openvino", "main_metric": "absrel", "measured": "engine", "combo": "Q-only"}
    teacher = make_record(
        **known,
        role="teacher",
        precision="f32",
        absrel=0.11494710657,
        quality_drop_pct=0.0,
        t_pair_p50_ms=1160.0,
        speedup_vs_own_f32=1.0,
        executed_precision={"f32": 1.0},
    )
    candidate = make_record(
        **known,
        quantizer="nncf",
        precision="int8",
        absrel=0.11491262244,
        quality_drop_pct=-0.03,
        t_pair_p50_ms=1159.9,
        speedup_vs_own_f32=2.47,
        speedup_vs_best_float=2.47,
        executed_precision={"int8": 0.83, "f32": 0.17},
        verdict="undecided",
    )
    return [teacher, candidate]


def ticks(figure, axis):
    FigureCanvasAgg(figure).draw()
    return [text.get_text() for text in axis.get_ticklabels() if text.get_text()], axis.get_offset_text().get_text()


def test_axes_have_no_offset_and_noise_does_not_fill_them(close, limits):
    """0.1149 beside the axis, not 1e-5 with 1.149e-1 in a corner."""
    for thresholds in (None, limits):
        figure = tradeoff(close, thresholds)
        axes = figure.axes[0]
        for axis in (axes.xaxis, axes.yaxis):
            labels, offset = ticks(figure, axis)
            assert offset == "" and len(set(labels)) == len(labels) >= 3
        low, high = axes.get_ylim()
        assert high - low > 0.01 * 0.1149  # 0.03 % is a small part of it
        assert axes.get_xlim()[1] - axes.get_xlim()[0] > 0.01 * 1160
    assert axes.get_ylim()[1] > 0.11494710657 * 1.01  # the limit is in the picture


def error_bars(axes):
    """The intervals drawn: [((x0, y0), (x1, y1)), ...]."""
    return [tuple(map(tuple, s)) for c in axes.collections for s in c.get_segments()]


def test_intervals_and_limits_are_drawn(close, limits):
    close[1]["intervals"] = {"quality_drop_pct": [-0.51, 0.45], "speedup_vs_own_f32": [2.44, 2.52]}
    axes = tradeoff(close, limits).axes[0]
    assert axes.get_ylabel() == "quality_drop_pct (%), lower is better"
    ((start, end),) = error_bars(axes)
    assert start == pytest.approx((1159.9, -0.51)) and end == pytest.approx((1159.9, 0.45))
    assert [t.get_text().strip() for t in axes.get_legend().get_texts()][-1] == "limit: drop of 1 % (Q-only)"
    assert 1.0 in [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() not in ("-", "None")]
    low, high = axes.get_ylim()
    assert low < -0.51 and high > 1.0
    (marker,) = [line for line in axes.lines if line.get_fillstyle() == "bottom"]  # undecided
    assert marker.get_ydata()[0] == -0.03

    speeds = latency(close, limits).axes[1]
    ((start, end),) = error_bars(speeds)
    assert (start[0], end[0]) == pytest.approx((2.44, 2.52)) and speeds.get_xlim()[0] < 1.0
    names = [t.get_text().strip() for t in speeds.get_legend().get_texts()]
    assert names == ["x own f32", "limit: 50 % below own f32", "x float", "limit: not slower than best float"]
    assert {line.get_xdata()[0] for line in speeds.lines if len(set(line.get_xdata())) == 1} >= {2.0, 1.0}

    shares = precision(close, limits).axes[0]
    assert [t.get_text().strip() for t in shares.get_legend().get_texts()] == ["int8", "f32"]
    assert list(shares.lines) == []  # as planned or not is no share of all FLOPs

    ablated = ablation([{**close[1], "combo": "H"}], limits).axes[0]
    assert [(a[0], b[0]) for a, b in error_bars(ablated)] == [pytest.approx((-0.51, 0.45))]
    assert ablated.texts[0].get_text() == "-0.03 ±0.48" and ablated.get_xlim()[1] > 1.0


def test_the_interval_of_a_time_is_drawn_and_widens_the_axis(close):
    """Two medians a thousandth apart, each known to a tenth: the axis shows the tenth."""
    close[1]["intervals"] = {"t_pair_p50_ms": [1050.0, 1270.0]}
    axes = tradeoff(close).axes[0]
    ((start, end),) = error_bars(axes)
    assert (start[0], end[0]) == pytest.approx((1050.0, 1270.0))
    assert axes.get_xlim()[0] < 1050.0 and axes.get_xlim()[1] > 1270.0 and "95 % interval" in axes.get_title(loc="left")


@pytest.mark.parametrize("draw", [tradeoff, latency, precision, ablation])
def test_no_text_overlaps_with_intervals(twelve, limits, draw):
    for number, record in enumerate(twelve):
        drop = record["quality_drop_pct"]
        record["speedup_vs_own_f32"] = 1 + 0.1 * number
        record["intervals"] = {"quality_drop_pct": [drop - 0.7, drop + 1.1], "speedup_vs_own_f32": [1.0, 1.5]}
    test_no_text_overlaps_for_twelve_records(twelve, lambda rows: draw(rows, limits))


def test_an_interval_beside_its_value_and_extreme_numbers(tmp_path, close, limits):
    """Ends in the wrong order, or that do not hold the value, and numbers that no measurement has."""
    close[1]["intervals"] = {"quality_drop_pct": [3.0, 2.0], "t_pair_p50_ms": [1e-3, 1e-3], "absrel": [0.0, 1e300]}
    close.append({**close[1], "quality_drop_pct": 1e300, "t_pair_p50_ms": 1e200, "intervals": None})
    paths, _ = draw_plots(close, tmp_path, limits)
    assert [path.name for path in paths] == ["tradeoff.png", "latency.png", "precision.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width < 4000 and picture.height < 4000


def test_many_records_are_named_in_part(tmp_path, twelve, limits):
    """1,500 records: bounded pictures, and a sentence on what they leave out; the newest are shown."""
    many = []
    for number in range(1500):
        day = f"2025-{1 + number // 140:02d}-{1 + number % 28:02d}T00:00:{number // 28 % 60:02d}Z"
        time = 100.0 + (number * 7919) % 1500
        changes = {"exp_id": f"H{number}", "datetime": day, "t_pair_p50_ms": time, "absrel": 0.1 + 1 / time}
        many.append({**twelve[number % 12], **changes})
    paths, said = draw_plots(many, tmp_path, limits)
    assert [path.name for path in paths] == ["tradeoff.png", "latency.png", "precision.png", "ablation.png"]
    assert sum(path.stat().st_size for path in paths) < 2_000_000
    assert said[0].startswith(f"tradeoff.png names {SHOWN} of 1500 records")
    assert said[1:] == [
        f"{name}.png shows the {SHOWN} newest of 1500 records; --logs FOLDER draws others"
        for name in ("latency", "precision", "ablation")
    ]
    newest = {record["exp_id"] for record in sorted(many, key=lambda record: record["datetime"])[-SHOWN:]}
    labels = [text.get_text() for text in latency(many).axes[0].get_yticklabels()]
    assert {label.split()[0] for label in labels} == newest
    dots = [line for line in tradeoff(many, limits).axes[0].lines if line.get_marker() == "."]
    assert len(dots[0].get_xdata()) == 1500 - SHOWN
