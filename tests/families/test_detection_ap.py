"""AP against pycocotools' answers, against its algorithm written plainly, and where it is known; its intervals."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.data.detection.sample import DetectionSample
from pqk.errors import PqkError
from pqk.families.metrics.detection_ap import (
    AREAS,
    MAX_FOUND,
    METRICS,
    RECALLS,
    THRESHOLDS,
    Detections,
    ap_differences,
    ap_intervals,
    average_precision,
    match_image,
    overlaps,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "coco_metric"
NAMES = ("box", "ball", "cone")


def sample(id, boxes, labels, crowd=None, areas=None, ignored=None, **lvis):
    """An image with objects; boxes as float64, so that none is rounded on its way to the other implementations."""
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    count = len(boxes)
    return DetectionSample(
        id,
        Path("none.jpg"),
        320,
        240,
        boxes,
        np.array(labels, np.int64),
        np.prod(boxes[:, 2:] - boxes[:, :2], 1) if areas is None else np.array(areas, np.float64),
        np.zeros(count, bool) if crowd is None else np.array(crowd, bool),
        np.zeros(count, bool) if ignored is None else np.array(ignored, bool),
        **lvis,
    )


def found(boxes, scores, labels):
    return Detections(np.array(boxes, np.float64).reshape(-1, 4), np.array(scores, float), np.array(labels, np.int64))


def score(truths, detections, classes=NAMES):
    return average_precision([match_image(*each) for each in zip(truths, detections, strict=True)], classes)


def perfect(truth):
    single = ~truth.crowd
    return Detections(truth.boxes[single], np.full(single.sum(), 0.9), truth.labels[single])


def random_set(random, images=12, objects=6, extra=6, jitter=6.0, ties=False):
    """Truths with crowds, and detections near them, of the wrong class, and anywhere; some scores are equal."""
    truths, detections = [], []
    for id in random.permutation(1000)[:images].tolist():
        count = int(random.integers(0, objects + 1))
        corner = random.uniform(0, 180, (count, 2))
        boxes = np.concatenate([corner, corner + np.exp(random.uniform(1.5, 5, (count, 2)))], 1)
        labels = random.integers(0, 2, count)  # the third class has no object
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], 1) * random.uniform(0.5, 1, count)
        truths.append(sample(id, boxes, labels, random.uniform(size=count) < 0.15, areas))
        copies = np.repeat(np.arange(count), random.integers(0, 3, count))
        near = boxes[copies] + random.normal(0, jitter, (len(copies), 4))
        corner = random.uniform(0, 180, (int(random.integers(0, extra)), 2))
        near = np.concatenate([near, np.concatenate([corner, corner + 40], 1)])
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2])
        guessed = np.concatenate([labels[copies], random.integers(0, 3, len(corner))])
        scores = random.uniform(size=len(near)) + 0.4 * (np.arange(len(near)) < len(copies))
        detections.append(found(near, scores.round(1) if ties else scores, guessed))
    return truths, detections


# Known answers


@pytest.fixture(scope="module")
def official():
    """The images, detections and class names of the case that pycocotools answered."""
    truth, boxes = (json.loads((GOLDEN / name).read_text()) for name in ("gt.json", "dt.json"))
    categories = sorted(truth["categories"], key=lambda each: each["id"])
    label = {each["id"]: k for k, each in enumerate(categories)}

    def corners(entries):
        return [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in entries)]

    truths, detections = [], []
    for image in truth["images"]:
        mine = [each for each in truth["annotations"] if each["image_id"] == image["id"]]
        theirs = [each for each in boxes if each["image_id"] == image["id"]]
        crowd, areas = [each["iscrowd"] for each in mine], [each["area"] for each in mine]
        truths.append(sample(image["id"], corners(mine), [label[each["category_id"]] for each in mine], crowd, areas))
        labels = [label[each["category_id"]] for each in theirs]
        detections.append(found(corners(theirs), [each["score"] for each in theirs], labels))
    return truths, detections, tuple(each["name"] for each in categories)


def test_the_answers_of_pycocotools(official):
    answers = json.loads((GOLDEN / "answers.json").read_text())
    scores = score(*official)
    assert scores.values == pytest.approx({name: answers["stats"][name] for name in METRICS}, abs=1e-9)
    expected = {name: math.nan if value is None else value for name, value in answers["per_class_AP"].items()}
    assert scores.per_class == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert sum(map(math.isnan, scores.per_class.values())) == 1  # a class without objects is no failure


@pytest.mark.parametrize("seed", range(6))
def test_pycocotools_itself(seed):
    coco = pytest.importorskip("pycocotools.coco")
    evaluator = pytest.importorskip("pycocotools.cocoeval")
    truths, detections = random_set(np.random.default_rng(seed), images=30, ties=seed % 2 == 1)
    entries = [
        (truth.id, int(label), box, float(area), int(crowd))
        for truth in truths
        for label, box, area, crowd in zip(truth.labels, truth.boxes, truth.areas, truth.crowd, strict=True)
    ]

    def rectangle(box):
        return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {
            "images": [{"id": each.id} for each in truths],
            "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES)],
            "annotations": [
                {"id": i, "image_id": id, "category_id": label, "bbox": rectangle(box), "area": area, "iscrowd": crowd}
                for i, (id, label, box, area, crowd) in enumerate(entries, 1)
            ],
        }
        truth.createIndex()
        results = [
            {"image_id": each.id, "category_id": int(label), "bbox": rectangle(box), "score": float(value)}
            for each, boxes in zip(truths, detections, strict=True)
            for label, box, value in zip(boxes.labels, boxes.boxes, boxes.scores, strict=True)
        ]
        evaluation = evaluator.COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    mine = score(truths, detections)
    expected = np.where(evaluation.stats[:6] < 0, np.nan, 100 * evaluation.stats[:6])  # -1: no object
    assert list(mine.values.values()) == pytest.approx(expected.tolist(), abs=1e-9, nan_ok=True)
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    for k, name in enumerate(NAMES):
        known = precision[:, :, k] > -1
        ap = 100 * precision[:, :, k].mean() if known.any() else math.nan
        assert mine.per_class[name] == pytest.approx(ap, abs=1e-9, nan_ok=True)


def plainly(truths, detections, label, low, high, threshold):
    """AP of one class, range of areas and threshold, as the evaluation is described, step by step in plain Python."""
    rows, objects = [], 0
    for truth, boxes in sorted(zip(truths, detections, strict=True), key=lambda pair: pair[0].id):
        mine = [i for i in range(len(truth.labels)) if truth.labels[i] == label]
        skipped = {i: bool(truth.crowd[i]) or not low <= truth.areas[i] <= high for i in mine}
        objects += sum(not skip for skip in skipped.values())
        order = sorted(
            (d for d in range(len(boxes.labels)) if boxes.labels[d] == label), key=lambda d: -boxes.scores[d]
        )
        used: set[int] = set()
        for d in order[:MAX_FOUND]:
            x1, y1, x2, y2 = map(float, boxes.boxes[d])
            own, best = (x2 - x1) * (y2 - y1), None
            for group in (False, True):  # those that count come first
                if best is not None:
                    break
                least = threshold
                for i in mine:
                    if skipped[i] != group or (i in used and not truth.crowd[i]):
                        continue
                    a1, b1, a2, b2 = map(float, truth.boxes[i])
                    across, down = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
                    shared = across * down if across > 0 and down > 0 else 0.0
                    whole = own if truth.crowd[i] else own + (a2 - a1) * (b2 - b1) - shared
                    if shared > 0 and shared / whole >= least:
                        least, best = shared / whole, i
            if best is not None:
                used.add(best)
            ignored = skipped[best] if best is not None else not low <= own <= high
            rows.append((float(boxes.scores[d]), best is not None, ignored))
    if objects == 0:
        return math.nan
    kept = [right for _, right, ignored in sorted(rows, key=lambda row: -row[0]) if not ignored]
    points = [(sum(kept[: n + 1]) / objects, sum(kept[: n + 1]) / (n + 1)) for n in range(len(kept))]
    best_at = [max((p for r, p in points if r >= recall), default=0.0) for recall in RECALLS]
    return 100 * sum(best_at) / len(RECALLS)


@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_the_evaluation_step_by_step(seed, ties):
    truths, detections = random_set(np.random.default_rng(seed), images=5, ties=ties)
    mine = score(truths, detections)
    table = np.full((3, len(AREAS), len(THRESHOLDS)), np.nan)
    for k, a, t in np.ndindex(*table.shape):
        if a == 0 or t in (0, 5):  # the others are as good, and slow
            table[k, a, t] = plainly(truths, detections, k, *AREAS[a], THRESHOLDS[t])
    per_class = table[:, 0].mean(1)
    assert list(mine.per_class.values()) == pytest.approx(per_class.tolist(), abs=1e-9, nan_ok=True)
    known = ~np.isnan(per_class)
    for name, values in (("AP", per_class), ("AP50", table[:, 0, 0]), ("AP75", table[:, 0, 5])):
        assert mine.values[name] == pytest.approx(values[known].mean() if known.any() else math.nan, nan_ok=True)
    matches = [match_image(*each) for each in zip(truths, detections, strict=True)]
    from pqk.families.metrics.detection_ap import _curves

    every = np.stack([curve.precision(np.ones((1, len(matches))))[0] for curve in _curves(matches, 3)])
    assert every[:, :, [0, 5]] == pytest.approx(table[:, :, [0, 5]], abs=1e-9, nan_ok=True)


# Properties


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_ranges_perfection_and_order(seed, ties):
    random = np.random.default_rng(seed)
    truths, detections = random_set(random, ties=ties)
    scores = score(truths, detections)
    everything = [*scores.values.values(), *scores.per_class.values()]
    assert all(math.isnan(value) or 0 <= value <= 100 for value in everything)
    shuffled = random.permutation(len(truths))
    again = score([truths[i] for i in shuffled], [detections[i] for i in shuffled])
    assert again.values == pytest.approx(scores.values, abs=0, rel=0, nan_ok=True)
    ideal = score(truths, [perfect(truth) for truth in truths])
    known = [ideal.values[name] for name in ("AP", "AP50", "AP75") if not math.isnan(ideal.values[name])]
    assert known == pytest.approx([100] * len(known))
    nothing = score(truths, [found([], [], []) for _ in truths])
    assert all(math.isnan(value) or value == 0 for value in nothing.values.values())
    assert math.isnan(nothing.per_class["cone"])
    assert [math.isnan(v) for v in ideal.values.values()] == [math.isnan(v) for v in nothing.values.values()]


def test_one_of_two_found_and_a_wrong_one_before_it():
    """Precision 1/2 up to recall 1/2: 51 of 101 recalls. With the wrong box last, precision 1."""
    truth = sample(1, [[0, 0, 50, 50], [100, 100, 150, 150]], [0, 0])
    boxes = [[200, 0, 250, 50], [0, 0, 50, 50]]
    assert score([truth], [found(boxes, [0.9, 0.8], [0, 0])]).values["AP"] == pytest.approx(50 * 51 / 101)
    assert score([truth], [found(boxes, [0.7, 0.8], [0, 0])]).values["AP"] == pytest.approx(100 * 51 / 101)


def test_a_box_of_half_overlap_counts_at_one_threshold():
    truth = sample(1, [[0, 0, 60, 60]], [0])
    scores = score([truth], [found([[0, 0, 60, 30]], [1], [0])])
    assert scores.values["AP50"] == pytest.approx(100) and scores.values["AP75"] == 0
    assert scores.values["AP"] == pytest.approx(10) and scores.values["APm"] == pytest.approx(10)
    assert math.isnan(scores.values["APs"]) and math.isnan(scores.values["APl"])


def test_crowds_and_ignored_objects_count_neither_way():
    truth = sample(1, [[0, 0, 20, 20], [100, 100, 300, 200]], [0, 0], crowd=[False, True])
    inside = [[110, 110, 140, 140], [150, 150, 180, 180], [0, 0, 20, 20]]
    assert score([truth], [found(inside, [0.9, 0.8, 0.1], [0] * 3)]).values["AP"] == pytest.approx(100)
    alone = sample(1, [[0, 0, 20, 20], [100, 100, 200, 200]], [0, 0], ignored=[False, True])
    twice = [[100, 100, 200, 200], [0, 0, 20, 20], [100, 100, 200, 199]]
    assert score([alone], [found(twice[:2], [0.9, 0.1], [0] * 2)]).values["AP"] == pytest.approx(100)
    assert score([alone], [found(twice, [0.9, 0.1, 0.5], [0] * 3)]).values["AP"] == pytest.approx(50)  # the second one


def test_lvis_counts_only_what_is_annotated():
    boxes, wrong = [[0, 0, 20, 20]], [[100, 100, 150, 150]]
    detection = found(boxes + wrong, [0.5, 0.9], [0, 0])

    def ap(**lvis):
        return score([sample(1, boxes, [0], **lvis)], [detection], ("box",)).values["AP"]

    assert [ap(), ap(absent=frozenset())] == pytest.approx([50, 50])
    assert ap(absent=frozenset(), partial=frozenset({0})) == pytest.approx(100)
    elsewhere = [sample(1, boxes, [0], absent=frozenset()), sample(2, [], [], absent=frozenset())]
    surely = [elsewhere[0], sample(2, [], [], absent=frozenset({0}))]
    both = [found(boxes, [0.5], [0]), found(wrong, [0.9], [0])]
    assert score(elsewhere, both, ("box",)).values["AP"] == pytest.approx(100)
    assert score(surely, both, ("box",)).values["AP"] == pytest.approx(50)


def test_only_the_best_hundred_of_a_class_count():
    truth = sample(1, [[0, 0, 20, 20]], [0])
    wrong = [[100 + k, 100, 150 + k, 150] for k in range(100)]
    detection = found([*wrong, [0, 0, 20, 20]], [*([0.9] * 100), 0.5], [0] * 101)
    assert score([truth], [detection]).values["AP"] == 0
    more = average_precision([match_image(truth, detection, 300)], NAMES)
    assert more.values["AP"] == pytest.approx(100 / 101)


def test_overlaps_of_boxes():
    boxes = np.array([[0, 0, 10, 10], [5, 5, 5, 5], [10, 0, 20, 10.0]])
    truths = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 40, 10], [5, 5, 5, 5.0]])
    expected = [[1, 0.5, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert overlaps(boxes, truths, np.array([False, False, True, False])).tolist() == expected
    assert overlaps(boxes, np.zeros((0, 4)), np.zeros(0, bool)).shape == (3, 0)


# Intervals


def matched(truths, detections):
    return [match_image(*each) for each in zip(truths, detections, strict=True)]


def test_a_resample_is_scored_as_if_its_images_were_copied():
    """Weights of the curves against copies of images under new ids."""
    from pqk.families.metrics.detection_ap import _curves, _metrics

    random = np.random.default_rng(5)
    truths, detections = random_set(random, images=9)
    matches = matched(truths, detections)
    ordered = sorted(range(9), key=lambda i: truths[i].id)
    weights = random.multinomial(9, np.full(9, 1 / 9), 5).astype(float)
    table = np.stack([curve.precision(weights) for curve in _curves(matches, 3)], 1)
    for row, copies in enumerate(weights.astype(int)):
        chosen = [i for i, times in zip(ordered, copies, strict=True) for _ in range(times)]
        renamed = [
            sample(n, truths[i].boxes, truths[i].labels, truths[i].crowd, truths[i].areas) for n, i in enumerate(chosen)
        ]
        plain = score(renamed, [detections[i] for i in chosen])
        drawn = {name: float(values[row]) for name, values in _metrics(table).items()}
        assert drawn == pytest.approx(plain.values, nan_ok=True)


def test_intervals_hold_the_value_and_narrow_with_more_images():
    random = np.random.default_rng(2)
    widths = []
    for images in (16, 144):
        matches = matched(*random_set(random, images=images, jitter=1.5))
        intervals = ap_intervals(matches, NAMES, resamples=128)
        assert intervals == ap_intervals(matches[::-1], NAMES, resamples=128)
        for name in ("AP", "AP50", "AP75"):
            assert intervals[name].value == average_precision(matches, NAMES).values[name]
            assert intervals[name].low < intervals[name].value < intervals[name].high
            assert intervals[name].groups == images
        widths.append(intervals["AP"].half)
    assert 1.8 < widths[0] / widths[1] < 6  # 3 is the root of 9
    assert intervals != ap_intervals(matches, NAMES, resamples=128, seed=1)


def test_an_interval_covers_what_more_images_show():
    """Of 16 sets of 25 images, most intervals of AP hold the AP of 400; fewer than 12 would be odd."""
    random = np.random.default_rng(7)
    truths, detections = random_set(random, images=400, jitter=1.5)
    matches = matched(truths, detections)
    whole = average_precision(matches, NAMES).values["AP"]
    parts = [ap_intervals(matches[i : i + 25], NAMES, resamples=64)["AP"] for i in range(0, 400, 25)]
    assert sum(part.low <= whole <= part.high for part in parts) >= 12


def test_differences_are_paired():
    random = np.random.default_rng(3)
    truths, detections = random_set(random, images=60, jitter=1.5)
    one = matched(truths, detections)
    same = ap_differences(one, one, NAMES, resamples=50)
    assert all((each.value, each.low, each.high) == (0, 0, 0) for each in same.values())
    worse = []
    for each in detections:
        moved = each.boxes + random.normal(0, 1.5, each.boxes.shape)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2])
        worse.append(Detections(moved, each.scores, each.labels))
    other = matched(truths, worse)
    difference = ap_differences(one, other[::-1], NAMES, resamples=128)["AP"]
    apart = [ap_intervals(each, NAMES, resamples=128)["AP"] for each in (one, other)]
    assert difference.value == pytest.approx(apart[0].value - apart[1].value)
    assert difference.half < 0.7 * apart[0].half  # what the images have in common cancels
    back = ap_differences(other, one, NAMES, resamples=128)["AP"]
    assert (back.low, back.high) == pytest.approx((-difference.high, -difference.low))


def test_intervals_that_are_unknown():
    truths = [sample(1, [[0, 0, 20, 20]], [0]), sample(2, [], [])]
    one = ap_intervals(matched(truths[:1], [perfect(truths[0])]), NAMES, resamples=20)["AP"]
    assert (one.value, one.low, one.high, one.groups) == (pytest.approx(100), None, None, 1)
    none = ap_intervals(matched(truths, [perfect(each) for each in truths]), NAMES, resamples=20)["APl"]
    assert math.isnan(none.value) and none.low is None


# Input that is wrong


@pytest.mark.parametrize(
    ("boxes", "scores", "labels", "said"),
    [
        ([[0, 0, 1, math.nan]], [1], [0], "NaN refused"),
        ([[0, 0, 1, 1]], [math.inf], [0], "NaN refused"),
        ([[0, 0, 1, 1]], [1, 2], [0], r"found boxes \(1, 4\), scores \(2,\) and labels \(1,\)"),
        ([[0, 0, 1, 1]], [1], [0, 1], "do not belong together"),
        ([[5, 0, 1, 1]], [1], [0], "negative size"),
    ],
)
def test_detections_that_cannot_be(boxes, scores, labels, said):
    with pytest.raises(PqkError, match=said):
        match_image(sample(7, [], []), found(boxes, scores, labels))


def test_sets_that_do_not_fit():
    truth = sample(7, [[0, 0, 20, 20]], [2])
    matches = matched([truth], [perfect(truth)])
    with pytest.raises(PqkError, match="label 2 is none of the 2 classes"):
        average_precision(matches, NAMES[:2])
    with pytest.raises(PqkError, match="nothing to score"):
        average_precision([], NAMES)
    with pytest.raises(PqkError, match="given twice"):
        average_precision(matches * 2, NAMES)
    with pytest.raises(PqkError, match="not scored on the same images: 1 are only among the 1 of the first"):
        ap_differences(matches, matched([sample(8, [], [])], [found([], [], [])]), NAMES)
