"""Scores of detections: the columns of images against AP of the set, what joins, what is refused, Teacher as truth."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusiondet_toys import TINY, sentence_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.data.detection.sample import DetectionSample
from pqk.families.contract import Sample
from pqk.families.detection import scoring
from pqk.families.detection.scoring import COLUMNS, MATCHES, Truth
from pqk.families.diffusiondet.settings import METRICS
from pqk.families.metrics.detection_ap import (
    Detections,
    ap_differences,
    ap_intervals,
    average_precision,
    leave_one_out,
    match_image,
)
from pqk.families.registry import family
from pqk.measure.scores import drop_of, rise_of, together
from pqk.measure.scoring import Scorer, scored
from pqk.stats.intervals import drop_interval, mean_interval
from pqk.stats.jackknife import set_values

CLASSES = ("box", "ball", "cone")
AP = METRICS[0]


def truth_of(id, boxes, labels, crowd=None, side=640):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    none = np.zeros(len(boxes), bool)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], 1, dtype=np.float64)
    labels = np.array(labels, np.int64)
    return DetectionSample(
        id, Path("none.jpg"), side, side, boxes, labels, areas, none if crowd is None else crowd, none
    )


def image_of(random, id, classes=3, most=6):
    """An image with objects of all sizes."""
    count = int(random.integers(0, most + 1))
    corner = random.uniform(0, 400, (count, 2))
    boxes = np.concatenate([corner, corner + np.exp(random.uniform(2.2, 5.3, (count, 2)))], 1)
    return truth_of(id, boxes, random.integers(0, classes, count), random.uniform(size=count) < 0.1)


def found_in(random, truth, noise=0.12, hit=0.8, wrong=3, classes=3):
    """A detector's answer: most objects, some twice, shifted by a share of their sides, and boxes of nothing."""
    copies = np.repeat(np.arange(len(truth.labels)), random.binomial(2, hit, len(truth.labels)))
    sides = truth.boxes[copies, 2:] - truth.boxes[copies, :2]
    near = truth.boxes[copies] + np.tile(sides, 2) * random.normal(0, noise, (len(copies), 4))
    corner = random.uniform(0, 400, (int(random.integers(0, wrong + 1)), 2))
    near = np.concatenate([near, np.concatenate([corner, corner + np.exp(random.uniform(2.2, 5.3, corner.shape))], 1)])
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2])
    scores = random.uniform(size=len(near)) + 0.5 * (np.arange(len(near)) < len(copies))
    labels = np.concatenate([truth.labels[copies], random.integers(0, classes, len(corner))])
    return {"boxes": near, "scores": scores.astype(np.float32).round(2), "labels": labels.astype(np.int64)}


def evidence_of(truth, prediction, classes=CLASSES):
    return scoring.score(prediction, Sample(0, str(truth.id), None, Truth(truth, classes)), {}, 0)


def matched(truths, predictions):
    return [
        match_image(truth, Detections(found["boxes"], found["scores"], found["labels"]))
        for truth, found in zip(truths, predictions, strict=True)
    ]


def case(seed, images=9, **how):
    random = np.random.default_rng(seed)
    truths = [image_of(random, int(id)) for id in random.permutation(500)[:images]]
    return truths, [found_in(random, truth, **how) for truth in truths]


def rows_of(truths, predictions):
    both = zip(truths, predictions, strict=True)
    return [{"group": place, "sample": "0", **evidence_of(*each)} for place, each in enumerate(both)]


def columns(rows, name="ap"):
    return [row[name] for row in rows]


def close(one, other):
    return one == pytest.approx(other, abs=1e-9)


# Columns and the set


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_the_mean_of_the_columns_is_the_metric_of_the_set(seed, images):
    truths, predictions = case(seed, images)
    evidence = [evidence_of(*each) for each in zip(truths, predictions, strict=True)]
    wanted = average_precision(matched(truths, predictions), CLASSES)
    completed, summary = scoring.complete(evidence), scoring.summarise(evidence)
    for name, key in COLUMNS.items():
        value = wanted.values[key]
        if math.isnan(value):
            assert columns(completed, name) == [None] * images and summary[name] is None
        else:
            assert close(math.fsum(columns(completed, name)) / images, value) and summary[name] == value
    assert {name: summary[f"ap_{name}"] for name in CLASSES} == {
        name: None if math.isnan(value) else value for name, value in wanted.per_class.items()
    }
    assert scoring.complete(completed) == completed and scoring.summarise(completed) == summary
    assert json.loads(json.dumps(completed, allow_nan=False)) == completed


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_one_image_less_is_the_set_without_it(seed, images):
    matches = matched(*case(seed, images))
    found = leave_one_out(matches, CLASSES)
    for place in range(images):
        rest = matches[:place] + matches[place + 1 :]
        wanted = average_precision(rest, CLASSES).values if rest else dict.fromkeys(found, math.nan)
        assert {key: values[place] for key, values in found.items()} == pytest.approx(wanted, abs=1e-9, nan_ok=True)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_the_order_of_images_plays_no_part(seed, order):
    truths, predictions = case(seed)
    if seed % 2:  # sets that were joined may count their images alike
        truths = [replace(truth, id=place % 3) for place, truth in enumerate(truths)]
    evidence = [evidence_of(*each) for each in zip(truths, predictions, strict=True)]
    places = list(range(len(evidence)))
    order.shuffle(places)
    shuffled = [evidence[place] for place in places]
    assert scoring.summarise(shuffled) == scoring.summarise(evidence)
    before, after = scoring.complete(evidence), scoring.complete(shuffled)
    for name in COLUMNS:
        wanted = [columns(before, name)[place] for place in places]
        assert columns(after, name) == (wanted if None in wanted else pytest.approx(wanted, abs=1e-9))


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_joined_sets_are_the_whole_set(seed, first):
    rows = rows_of(*case(seed))
    names = [f"image {row['group']}" for row in rows]
    rows = [{**row, "group": name} for row, name in zip(rows, names, strict=True)]
    whole = {**scored(scoring, rows), "groups": names}
    halves = [
        {**scored(scoring, rows[place]), "groups": names[place], "measured": "engine"}
        for place in (slice(first), slice(first, None))
    ]
    assert together(halves, scoring) == {**whole, "measured": "engine"}


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 2**32))
def test_differences_of_two_detectors_are_those_of_their_sets(seed):
    truths, one = case(seed, 12)
    random = np.random.default_rng(seed + 1)
    other = [found_in(random, truth, noise=0.2) for truth in truths]
    wanted = ap_differences(matched(truths, one), matched(truths, other), CLASSES, resamples=2)
    mine, theirs = (scored(scoring, rows_of(truths, each)) for each in (one, other))
    for name, key in COLUMNS.items():
        found = rise_of(name, mine, theirs)
        if found is None:
            assert math.isnan(wanted[key].value)
        else:
            assert close(found.value, wanted[key].value)
    base = theirs["summary"]["ap"]
    if base:
        drop = drop_of(AP, mine, theirs, truthful=True)
        assert drop is not None and close(drop.value, 100 * (base - mine["summary"]["ap"]) / base)


def test_an_image_that_has_the_only_object_of_a_kind_counts_for_it_as_one_that_changes_nothing():
    small, large = truth_of(1, [[0, 0, 20, 20]], [0]), truth_of(2, [[0, 0, 200, 200]], [0])
    found = [
        {"boxes": [[0, 0, 20, 20]], "scores": [0.9], "labels": [0]},
        {"boxes": [[0, 0, 200, 150]], "scores": [0.8], "labels": [0]},
    ]
    rows = scoring.complete([evidence_of(*each) for each in zip((small, large), found, strict=True)])
    assert columns(rows, "ap_small") == pytest.approx([100, 100])  # without the first nothing is left, and no change
    assert columns(rows, "ap_medium") == [None, None]
    summary = scoring.summarise(rows)
    assert summary["ap_medium"] is None and summary["ap_ball"] is None and summary["ap_small"] == pytest.approx(100)


# Intervals


@pytest.fixture(scope="module")
def many():
    """The matches of a detector and of a compressed one in many images of one class: small sets are drawn from them."""
    random = np.random.default_rng(0)
    truths = [image_of(random, id, classes=1, most=4) for id in range(600)]
    one = [found_in(random, truth, 0.1, classes=1) for truth in truths]
    other = []
    for found in one:  # the other is what is left of the first where its weights are rounded
        sides = np.tile(found["boxes"][:, 2:] - found["boxes"][:, :2], 2)
        boxes = found["boxes"] + 0.04 * sides * random.normal(size=sides.shape)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
        other.append({**found, "boxes": boxes, "scores": found["scores"] + 0.05 * random.normal(size=len(boxes))})
    return [matched(truths, each) for each in (one, other)]


def drawn(many, images, seed):
    """The same images of both."""
    some = np.random.default_rng(seed).choice(len(many[0]), images, replace=False)
    return [[each[place] for place in some] for each in many]


def values_of(matches, key="AP"):
    return set_values(average_precision(matches, ("box",)).values[key], leave_one_out(matches, ("box",))[key])


def test_widths_are_those_of_the_bootstrap_and_of_sets_drawn_anew(many):
    """Of few images the bootstrap's are about a tenth narrower, and miss the set's own metric more often."""
    jackknife, bootstrap, values = [], [], []
    for seed in range(60):
        matches = drawn(many, 60, seed)[0]
        values.append(average_precision(matches, ("box",)).values["AP"])
        if seed < 12:
            jackknife.append(mean_interval(values_of(matches), range(60)).half)
            bootstrap.append(ap_intervals(matches, ("box",), resamples=200)["AP"].half)
    one, other = (float(np.sqrt(np.mean(np.square(halves)))) for halves in (jackknife, bootstrap))
    assert 0.85 < one / other < 1.2, (one, other)
    assert 0.75 < one / (2 * np.std(values, ddof=1)) < 1.33


def test_a_paired_difference_covers_the_true_one(many):
    """Of sets drawn from many images, about 95 % of the intervals hold the difference of all."""
    one, other = (average_precision(each, ("box",)).values["AP"] for each in many)
    covered, halves, alone = 0, [], []
    for seed in range(60):
        mine, theirs = (values_of(each) for each in drawn(many, 60, seed))
        found = mean_interval([a - b for a, b in zip(mine, theirs, strict=True)], range(60))
        covered += found.low <= one - other <= found.high
        halves.append(found.half)
        alone.append(mean_interval(mine, range(60)).half)
    assert covered >= 54, covered
    assert np.mean(halves) < 0.9 * np.mean(alone)  # what images have in common cancels


def test_the_drop_of_a_row_is_that_of_a_ledger():
    """Drops are ratios of sums of columns, wherever they are computed."""
    truths, one = case(3, 30)
    other = case(3, 30, noise=0.2)[1]
    mine, teacher = (scored(scoring, rows_of(truths, each)) for each in (other, one))
    drop = drop_of(AP, mine, teacher, truthful=True)
    again = drop_interval(columns(mine["samples"]), columns(teacher["samples"]), range(30), True)
    assert drop == again and drop.low < drop.value < drop.high


# Evidence


def test_images_without_objects_count():
    truths = [truth_of(1, [[0, 0, 50, 50]], [0]), truth_of(2, [], [])]
    right = {"boxes": [[0, 0, 50, 50]], "scores": [0.5], "labels": [0]}
    for score, wanted in ((0.4, 100), (0.9, 50)):
        wrong = {"boxes": [[0, 0, 50, 50]], "scores": [score], "labels": [0]}
        evidence = [evidence_of(*each) for each in zip(truths, (right, wrong), strict=True)]
        assert scoring.summarise(evidence)["ap"] == pytest.approx(wanted)
    empty = {"boxes": np.zeros((0, 4)), "scores": [], "labels": []}
    (row,) = scoring.complete([evidence_of(truths[1], empty)])
    assert [row[name] for name in COLUMNS] == [None] * 6
    assert scoring.score(right, Sample(0, "0", None), {}, 0) is None and scoring.complete([]) == []


def test_evidence_is_small_and_quick_to_complete():
    random = np.random.default_rng(0)
    names = tuple(f"a class of things {k}" for k in range(80))
    truths = [image_of(random, id, classes=80, most=14) for id in range(100)]
    found = []
    for truth in truths:
        one = found_in(random, truth, classes=80, wrong=0)
        more = 100 - len(one["labels"])
        corner = random.uniform(0, 400, (more, 2))
        boxes = np.concatenate([one["boxes"], np.concatenate([corner, corner + 60], 1)])
        labels = np.concatenate([one["labels"], random.integers(0, 80, more)])
        scores = np.concatenate([one["scores"], random.uniform(0, 0.7, more)]).astype(np.float32)
        found.append({"boxes": boxes, "scores": scores, "labels": labels})
    evidence = [evidence_of(*each, names) for each in zip(truths, found, strict=True)]
    began = time.perf_counter()
    rows = scoring.complete(evidence)
    assert time.perf_counter() - began < 20
    assert len(json.dumps({"samples": rows}, indent=1)) < 1e6  # 10 kB for an image
    assert sum(len(row[MATCHES]["labels"]) for row in rows) > 9_500


def test_names_of_class_metrics():
    names = ("Traffic Light", "traffic-light", "small", "船", "x" * 60, "")
    found = scoring.class_metrics(names)
    assert found == (
        "ap_traffic_light",
        "ap_traffic_light_1",
        "ap_small_2",
        "ap_class_3",
        f"ap_{'x' * 29}",
        "ap_class_5",
    )
    many = scoring.class_metrics(["x" * 60] * 12)
    assert len(set(many)) == 12 and max(map(len, many)) == 32


def test_what_cannot_be_scored_is_refused():
    truth = truth_of("street", [[0, 0, 50, 50]], [0])
    good = {"boxes": np.array([[0, 0, 50, 50.0]]), "scores": np.array([0.5]), "labels": np.array([0])}
    for changes, words in (
        ({"boxes": np.array([[0, 0, np.nan, 50]])}, "NaN refused: a found box or score of image 'street'"),
        ({"scores": np.array([np.nan])}, "NaN refused: a found box or score of image 'street'"),
        ({"boxes": np.array([[9, 0, 5, 50.0]])}, "a found box has a negative size"),
        ({"labels": np.array([3])}, "the prediction has the label 3, expected a class from 0 to 2"),
        ({"labels": np.array([0.5])}, "the prediction has the label 0.5"),
        ({"labels": np.array([0, 1])}, r"expected (D, 4), (D,) and (D,)"),
        ({"scores": np.array(0.5)}, r"expected (D, 4), (D,) and (D,)"),
    ):
        assert words in sentence_of(evidence_of, truth, {**good, **changes})
    assert "has no labels; it has boxes, scores" in sentence_of(
        evidence_of, truth, {key: good[key] for key in ("boxes", "scores")}
    )
    one, other = evidence_of(truth, good), evidence_of(truth, good, ("box", "ball", "ring"))
    assert "the same classes" in sentence_of(scoring.complete, [one, other])
    assert "no image was scored" in sentence_of(scoring.summarise, [])


def test_a_scorer_completes_its_rows_and_names_what_it_refuses(monkeypatch):
    monkeypatch.setattr("pqk.measure.scoring.family", lambda _: SimpleNamespace(scoring_part=lambda: scoring))
    truths, predictions = case(1, 5)
    samples = {"where": {}, "how": {}, "groups": [f"image {k}" for k in range(5)], "sha256": "", "truthful": True}
    request = {"family": "diffusiondet", "name": "f32", "samples": samples, "quality": {}, "seed": 0}
    with Scorer(request, 2) as scorer:
        for place, (truth, found) in enumerate(zip(truths, predictions, strict=True)):
            scorer.add(Sample(place, "0", None, Truth(truth, CLASSES)), found, None)
        assert scorer.result() == scored(scoring, rows_of(truths, predictions))
    with Scorer(request, 1) as scorer:
        scorer.add(Sample(3, "0", None, Truth(truths[0], CLASSES)), {**predictions[0], "labels": []}, None)
        assert sentence_of(scorer.result).startswith("f32 on image 3, 0: the prediction has boxes (")
    with Scorer(request, 1) as scorer:
        scorer.add(Sample(0, "0", None), predictions[0], None)
        assert sentence_of(scorer.result).endswith("has annotated boxes")


# The Teacher as the truth, and the floor


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**32))
def test_the_teacher_against_itself_is_perfect_and_another_drops(seed):
    truths, predictions = case(seed)
    random, config = np.random.default_rng(seed), {**TINY, "family": "diffusiondet"}

    def rows(mine):
        made = []
        for place, (found, taught) in enumerate(zip(mine, predictions, strict=True)):
            taught = {**taught, scoring.LOGITS: np.zeros((1, 3))}
            sample = scoring.as_truth(taught, Sample(place, str(place), None), config)
            made.append({"group": place, "sample": str(place), **scoring.score(found, sample, {}, 0)})
        return scored(scoring, made)

    own = rows(predictions)
    sure = sum(int((found["scores"] >= 0.5).sum()) for found in predictions)
    if sure == 0:
        assert own["summary"]["ap"] is None
        return
    assert own["summary"]["ap"] == pytest.approx(100) and own["summary"]["ap_large"] in (None, pytest.approx(100))
    assert set(own["summary"]) == {*COLUMNS, "ap_class_0", "ap_class_1", "ap_class_2"}
    assert drop_of(AP, own, own, truthful=False).value == pytest.approx(0, abs=1e-9)
    other = rows([found_in(random, truth, noise=0.3) for truth in truths])
    drop = drop_of(AP, other, own, truthful=False)
    assert drop.value == pytest.approx(100 - other["summary"]["ap"]) and drop.value >= 0


def test_what_a_teacher_finds_as_truth():
    found = {
        "boxes": np.array([[0, 0, 4, 5], [1, 1, 9, 9], [3, 3, 3, 8], [0, 0, 2, 2.0]]),
        "scores": np.array([0.5, 0.49, 0.9, 0.7], np.float32),
        "labels": np.array([2, 0, 1, 0]),
        scoring.LOGITS: np.zeros((4, 3)),
    }
    truth = scoring.as_truth(found, Sample(0, "street", None), TINY).truth
    assert truth.classes == ("class 0", "class 1", "class 2")
    assert truth.sample.boxes.tolist() == [[0, 0, 2, 2], [0, 0, 4, 5]]  # sure ones of some area, by class
    assert truth.sample.labels.tolist() == [0, 2] and truth.sample.areas.tolist() == [4, 20]
    assert not truth.sample.crowd.any() and truth.sample.id == "street"
    many = {"boxes": np.tile([0, 0, 9.0, 9], (120, 1)), "scores": np.full(120, 0.9), "labels": np.zeros(120, int)}
    many[scoring.LOGITS] = np.zeros((120, 3))
    assert len(scoring.as_truth(many, Sample(0, "a", None), TINY).truth.sample.labels) == 100
    broken = {**found, "boxes": np.full((4, 4), np.nan)}
    assert sentence_of(scoring.as_truth, broken, Sample(0, "a", None), TINY).startswith("NaN refused")
    fewer = {**found, scoring.LOGITS: np.zeros((4, 2))}
    assert "label 2" in sentence_of(scoring.as_truth, fewer, Sample(0, "a", None), TINY)


def test_the_floor_looks_at_nothing():
    truths = [truth_of(1, [[160, 160, 480, 480]], [0]), truth_of(2, [[0, 0, 40, 40]], [1])]
    rows = scoring.complete([scoring.floor(Sample(0, "0", None, Truth(truth, CLASSES)), {}) for truth in truths])
    summary = scoring.summarise(rows)
    assert summary["ap_box"] == pytest.approx(100)  # in the middle, before the wrong one of the second image
    assert summary["ap_ball"] == 0 and summary["ap_cone"] is None and summary["ap"] == pytest.approx(50)
    assert scoring.floor(Sample(0, "0", None), {}) is None
    truths, predictions = case(5, 30)
    floor = [scoring.floor(Sample(0, "0", None, Truth(truth, CLASSES)), {}) for truth in truths]
    found = [evidence_of(*each) for each in zip(truths, predictions, strict=True)]
    assert scoring.summarise(floor)["ap"] < 5 < scoring.summarise(found)["ap"]


def test_the_family_scores():
    assert family("diffusiondet").scoring == "pqk.families.detection.scoring"
    assert set(COLUMNS) == {metric.name for metric in METRICS} and scoring.OUTPUTS.keys() == {"logits", "refined"}
