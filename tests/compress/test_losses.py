"""The properties that the training losses promise (their numbers: tests/families/test_vectors.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pqk.errors import PqkError
from pqk.families.dust3r.losses import (
    confidence_loss,
    regression_loss,
    scale_shift_invariant_error,
    to_camera1,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def load(case: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    with np.load(GOLDEN / case / "io.npz") as stored:
        io = {key: torch.from_numpy(stored[key]) for key in stored.files}
    pred = {}
    for view in (1, 2):
        pred[f"pts3d_{view}"] = io[f"in_pred_pts{view}"].clone().requires_grad_()
        pred[f"conf_{view}"] = io[f"in_pred_conf{view}"].clone().requires_grad_()
    truth = [to_camera1(io[f"in_gt_pts{view}"], io["in_pose1"]) for view in (1, 2)]
    return pred, [*truth, io["in_valid1"].bool(), io["in_valid2"].bool()]


def test_invalid_pixels_have_no_value_and_no_gradient_even_when_nan():
    pred, (gt1, gt2, valid1, valid2) = load("dust3r_loss_a")
    expected = {name: f(pred, gt1, gt2, valid1, valid2)[0].item() for name, f in LOSSES.items()}
    dirty = {key: value.detach().clone() for key, value in pred.items()}
    for view, gt, valid in ((1, gt1, valid1), (2, gt2, valid2)):
        assert not valid.all()
        dirty[f"pts3d_{view}"][~valid] = float("inf")
        dirty[f"conf_{view}"][~valid] = float("nan")
        gt[~valid] = float("nan")
    for tensor in dirty.values():
        tensor.requires_grad_()
    for name, function in LOSSES.items():
        loss, _ = function(dirty, gt1, gt2, valid1, valid2)
        assert loss.item() == pytest.approx(expected[name], rel=1e-6)
    confidence_loss(dirty, gt1, gt2, valid1, valid2)[0].backward()
    for view, valid in ((1, valid1), (2, valid2)):
        for key in (f"pts3d_{view}", f"conf_{view}"):
            grad = dirty[key].grad
            assert torch.isfinite(grad[valid]).all() and grad[valid].abs().max() > 0
            assert (grad[~valid] == 0).all()


LOSSES = {
    "confidence": confidence_loss,
    "regression": regression_loss,
    "validation": scale_shift_invariant_error,
}


@pytest.mark.parametrize("function", LOSSES.values(), ids=LOSSES)
def test_a_view_without_valid_pixels_contributes_nothing(function):
    pred, (gt1, gt2, valid1, valid2) = load("dust3r_loss_b")
    nothing = torch.zeros_like(valid2)
    loss, details = function(pred, gt1, gt2, valid1, nothing)
    assert details["regr_2"] == 0
    assert loss.item() == pytest.approx(details.get("conf_loss_1", details["regr_1"]).item())
    loss, _ = function(pred, gt1, gt2, torch.zeros_like(valid1), nothing)
    assert loss.item() == 0
    loss.backward()
    assert all(torch.isfinite(t.grad).all() for t in pred.values() if t.grad is not None)


def test_scale_of_either_side_does_not_matter():
    pred, (gt1, gt2, *valid) = load("dust3r_loss_a")
    base = confidence_loss(pred, gt1, gt2, *valid)[0].item()
    scaled = dict(pred, pts3d_1=pred["pts3d_1"] * 7.5, pts3d_2=pred["pts3d_2"] * 7.5)
    assert confidence_loss(scaled, gt1 * 0.2, gt2 * 0.2, *valid)[0].item() == pytest.approx(base, rel=1e-5)


def test_validation_criterion_forgives_scale_and_depth_shift_only():
    _, (gt1, gt2, *valid) = load("dust3r_loss_a")
    shift = torch.tensor([0.0, 0.0, 0.4])
    pred = {"pts3d_1": 3.0 * (gt1 + shift), "pts3d_2": 3.0 * (gt2 + shift)}
    assert scale_shift_invariant_error(pred, gt1, gt2, *valid)[0].item() == pytest.approx(0.0, abs=1e-4)
    sideways = {key: points + torch.tensor([0.4, 0.0, 0.0]) for key, points in pred.items()}
    assert scale_shift_invariant_error(sideways, gt1, gt2, *valid)[0].item() > 0.1


def test_closed_form():
    """One valid pixel per view: normalised distances are known by hand."""
    gt1, gt2 = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)
    gt1[..., 2], gt2[..., 2] = 1.0, 3.0  # factor 2 -> z of 0.5 and 1.5
    pred = {
        "pts3d_1": gt2.clone(),  # factor 2 -> z of 1.5 and 0.5
        "pts3d_2": gt1.clone(),
        "conf_1": torch.full((1, 1, 1), 2.0),
        "conf_2": torch.full((1, 1, 1), 4.0),
    }
    valid = torch.ones(1, 1, 1)
    loss, details = confidence_loss(pred, gt1, gt2, valid, valid, alpha=0.5)
    assert details["regr_1"].item() == pytest.approx(1.0)
    assert loss.item() == pytest.approx(2.0 + 4.0 - 0.5 * np.log(8.0), rel=1e-6)


def test_float32_under_autocast_and_for_half_inputs():
    pred, truth = load("dust3r_loss_a")
    expected = confidence_loss(pred, *truth)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = confidence_loss(pred, *truth)[0]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    half = {key: value.bfloat16() for key, value in pred.items()}
    assert confidence_loss(half, *truth)[0].dtype == torch.float32


def test_wrong_input_is_one_sentence():
    pred, (gt1, gt2, valid1, valid2) = load("dust3r_loss_b")
    with pytest.raises(PqkError, match="conf_2"):
        confidence_loss({key: pred[key] for key in ("pts3d_1", "conf_1", "pts3d_2")}, gt1, gt2, valid1, valid2)
    with pytest.raises(PqkError, match="view 1"):
        confidence_loss(pred, gt2, gt1, valid1, valid2)
    with pytest.raises(PqkError, match="mask"):
        regression_loss(pred, gt1, gt2, valid1[:1], valid2)
    with pytest.raises(PqkError, match="poses"):
        to_camera1(gt1, torch.eye(4))
