"""Agreement of two predictions: closed forms and invariances."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.errors import PqkError
from pqk.families.dust3r.scoring import OUTPUTS
from pqk.measure.similarity import Agreement

HEADS = tuple(OUTPUTS)
POINTS = ("pts3d_1", "pts3d_2")


def prediction(seed=0, size=8):
    rng = np.random.default_rng(seed)
    found = {head: rng.normal(0, 1, (size, size, 3)) for head in POINTS}
    for head in POINTS:
        found[head][..., 2] = rng.uniform(1, 3, (size, size))
    return {**found, "conf_1": rng.uniform(1, 5, (size, size)), "conf_2": rng.uniform(1, 5, (size, size))}


def compare(*pairs):
    agreement = Agreement(OUTPUTS)
    for a, b in pairs:
        agreement.add(a, b)
    return agreement.result()


def test_equal_predictions_agree_in_everything():
    for head, got in compare((prediction(), prediction())).items():
        assert (got.max_abs, got.mean_abs, got.relative, got.p50, got.p99, got.max) == (0, 0, 0, 0, 0, 0), head
        assert got.cosine == pytest.approx(1)
        assert got.psnr_db is None
        assert got.moved == (0 if head in POINTS else None)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 10.0))
def test_a_shift_of_one_coordinate_is_found_exactly(shift):
    a = prediction()
    b = {**a, "pts3d_1": a["pts3d_1"] + np.array([0, 0, shift]), "conf_2": a["conf_2"] + shift}
    got = compare((a, b))
    points, conf = got["pts3d_1"], got["conf_2"]
    assert points.max_abs == pytest.approx(shift)
    assert points.mean_abs == pytest.approx(shift / 3)
    assert (points.p50, points.p99, points.max) == pytest.approx((shift, shift, shift), rel=1e-5)
    assert conf.mean_abs == pytest.approx(shift)
    span = a["conf_2"].max() - a["conf_2"].min()
    assert conf.psnr_db == pytest.approx(20 * math.log10(span / shift), rel=1e-6, abs=1e-6)
    depth = np.median(a["pts3d_1"][..., 2])
    if not math.isclose(shift, 0.01 * depth, rel_tol=1e-6):
        assert points.moved == float(shift > 0.01 * depth)
    assert got["pts3d_2"].max_abs == 0


def test_pairs_are_pooled_and_not_averaged():
    """One wrong pixel among two pairs: the quantiles see all pixels, the maximum sees the one."""
    a, b = prediction(1), prediction(2)
    wrong = {**b, "conf_1": b["conf_1"].copy()}
    wrong["conf_1"][0, 0] += 4
    got = compare((a, a), (b, wrong))["conf_1"]
    assert got.max_abs == got.max == pytest.approx(4)
    assert got.p50 == 0
    assert got.mean_abs == pytest.approx(4 / (2 * 64))


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 10))
def test_relative_error_and_cosine_do_not_depend_on_the_unit(scale):
    a, b = prediction(3), prediction(4)
    one = compare((a, b))
    two = compare(({h: scale * a[h] for h in HEADS}, {h: scale * b[h] for h in HEADS}))
    for head in HEADS:
        assert two[head].relative == pytest.approx(one[head].relative)
        assert two[head].cosine == pytest.approx(one[head].cosine)
        assert two[head].psnr_db == pytest.approx(one[head].psnr_db)
        assert two[head].moved == one[head].moved


def test_bad_input_is_refused():
    a = prediction()
    with pytest.raises(PqkError, match="has no conf_2"):
        compare((a, {h: a[h] for h in HEADS if h != "conf_2"}))
    with pytest.raises(PqkError, match="shapes"):
        compare((a, {**a, "conf_1": a["conf_1"][:-1]}))
    with pytest.raises(PqkError, match="NaN refused: conf_1 of the prediction holds 1"):
        broken = {**a, "conf_1": a["conf_1"].copy()}
        broken["conf_1"][0, 0] = np.nan
        compare((a, broken))
    with pytest.raises(PqkError, match="nothing to compare"):
        compare()
