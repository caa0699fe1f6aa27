"""The properties of the DUSt3R network that its callers count on (its numbers: test_vectors.py)."""

import subprocess
import sys

import pytest
import torch

from pqk.errors import PqkError
from pqk.families.dust3r.configs import Mode
from pqk.families.dust3r.model import OUTPUTS, activate
from pqk.models import build_model

UNBOUNDED = (float("-inf"), float("inf"))


def test_a_real_size_that_does_not_fit_is_refused(golden):
    case = golden("dust3r_linear_landscape_only_b3")
    model = build_model("dust3r", case.need("config"), case.weights())
    image = torch.zeros(2, 3, 48, 80)
    with pytest.raises(PqkError, match="does not fit images stored as 48x80"):
        model(image, image, true_shape1=torch.tensor([[48, 80], [64, 80]]))


@pytest.mark.parametrize("length", [1e-12, 1e-7, 1e-3, 0.5, 3.0, 40.0, 80.0])
def test_exp_activation_is_exact_at_every_length(length):
    """(e^d + 1) tanh(d / 2) equals e^d - 1 in float32, for tiny and huge d, and has a finite gradient."""
    raw = torch.zeros(1, 4, 1, 1)
    raw[0, 0] = length
    raw.requires_grad_(True)
    points, _ = activate(raw, Mode("exp", *UNBOUNDED), Mode("exp", 1, float("inf")))
    exact = torch.expm1(torch.tensor(length, dtype=torch.float64))
    if length > 1e-8:  # below, the direction is damped by the floor of the length
        assert abs(points[0, 0, 0, 0].double() - exact) <= 1e-5 * exact
    points.sum().backward()
    assert raw.grad is not None and raw.grad.isfinite().all()


def test_a_zero_map_has_a_finite_gradient():
    raw = torch.zeros(1, 4, 2, 2, requires_grad=True)
    points, conf = activate(raw, Mode("exp", *UNBOUNDED), Mode("exp", 1, float("inf")))
    (points.sum() + conf.sum()).backward()
    assert torch.equal(points, torch.zeros(1, 2, 2, 3))
    assert raw.grad is not None and raw.grad.isfinite().all()


def test_encode_and_decode_are_forward(small_config):
    torch.manual_seed(1)
    model = build_model("dust3r", small_config)
    first, second = torch.rand(2, 3, 64, 48) * 2 - 1, torch.rand(2, 3, 32, 80) * 2 - 1
    with torch.no_grad():
        for img1, img2 in ((first, second), (first, first.flip(0))):
            whole = model(img1, img2)
            hw1, hw2 = tuple(img1.shape[2:]), tuple(img2.shape[2:])
            parts = model.decode(model.encode(img1), model.encode(img2), hw1, hw2)
            assert whole["pts3d_1"].shape == (2, *hw1, 3)
            assert whole["conf_2"].shape == (2, *hw2)
            for name in OUTPUTS:
                assert torch.allclose(whole[name], parts[name], rtol=1e-5, atol=1e-6)


def test_pruned_sizes_run_and_train(small_config):
    config = {
        **small_config,
        "enc_head_dim": 8,
        "dec_head_dim": 4,
        "enc_blocks": [{"heads": 1, "ffn": 10}, {"heads": 5, "ffn": 3}],
        "dec_blocks": [{"heads": 1, "ffn": 6}, {"heads": 3, "ffn": 1}, {"heads": 2, "ffn": 9}],
        "dec_blocks2": [{"heads": 2, "ffn": 2}, {"heads": 1, "ffn": 7}, {"heads": 4, "ffn": 5}],
    }
    model = build_model("dust3r", config)
    assert model.enc_blocks[1].attn.qkv.weight.shape == (3 * 5 * 8, 32)
    assert model.dec_blocks2[2].cross_attn.proj.weight.shape == (16, 4 * 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))
    assert all(value.dtype == torch.float32 for value in out.values())
    sum(value.mean() for value in out.values()).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all("mask_token" in name or "refinenet4.resConfUnit1" in name for name in without)
    assert len(without) == 9


def test_inference_mode_does_not_poison_later_training(small_config):
    model = build_model("dust3r", small_config)
    image = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        model(image, image)
    model(image, image)["conf_1"].mean().backward()
    assert model.patch_embed.proj.weight.grad is not None


@pytest.mark.parametrize(
    ("shape1", "shape2", "sentence"),
    [
        ((1, 3, 40, 32), (1, 3, 32, 32), "multiples of 16, got 40x32"),
        ((1, 3, 32, 32), (1, 4, 32, 32), r"\(B, 3, H, W\)"),
        ((2, 3, 32, 32), (1, 3, 32, 32), "same batch size"),
        ((1, 3, 32, 32), (1, 3, 0, 32), "multiples of 16"),
    ],
)
def test_bad_images_give_one_sentence(small_config, shape1, shape2, sentence):
    model = build_model("dust3r", small_config)
    with pytest.raises(PqkError, match=sentence):
        model(torch.zeros(shape1), torch.zeros(shape2))
    with pytest.raises(PqkError, match="has 4 tokens, got 5"):
        model.decode(torch.zeros(1, 5, 32), torch.zeros(1, 4, 32), (32, 32), (32, 32))


def test_importing_the_package_does_not_import_torch():
    code = "import sys, pqk.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
