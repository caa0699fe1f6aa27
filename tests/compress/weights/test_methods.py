"""Rotation, smoothing, AWQ and GPTQ: exact in float, better than rounding to nearest where they should be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from weight_toys import layers, relative

from pqk.compress.weights.activations import Activations, fake_rounded, per_position
from pqk.compress.weights.layers import IntegerLinear, PackedLinear, integer_product, packed_layer
from pqk.compress.weights.methods.gptq import gptq
from pqk.compress.weights.methods.inputs import Inputs, capture
from pqk.compress.weights.methods.method import Method, pack_weight
from pqk.compress.weights.methods.scaling import awq_factors, smooth_factors
from pqk.compress.weights.model import quantize_weights, quantized_model
from pqk.compress.weights.quantizers import decode
from pqk.compress.weights.rotation import rotate, unrotate
from pqk.compress.weights.schemes import SCHEMES, Scheme
from pqk.errors import PqkError

W4 = SCHEMES["INT4_Group_32"]
W8 = SCHEMES["INT8_Per_Channel_Symmetric"]
COARSE = Scheme(4, True, "channel")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fed(features: int = 96, count: int = 512, seed: int = 1) -> Tensor:
    """Correlated inputs; every sixteenth feature is 30 times larger than the others."""
    inputs = random(count, features, seed=seed) @ (
        torch.eye(features) + 0.3 * random(features, features, seed=seed + 1)
    )
    inputs[:, ::16] *= 30
    return inputs


def summed(inputs: Tensor) -> Inputs:
    found = Inputs.none(inputs.shape[-1], inputs.device)
    found.add(inputs)
    return found


def output_error(weight: Tensor, scheme: Scheme, name: str, inputs: Tensor, **more: object) -> float:
    packed = pack_weight(weight, scheme, 0, Method(name, **more), summed(inputs))  # type: ignore[arg-type]
    return relative(inputs @ packed.dequantized().T, inputs @ weight.T)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 96, 147, 588, 768])
def test_a_rotation_is_orthogonal(size: int) -> None:
    eye = torch.eye(size, dtype=torch.float64)
    turned = rotate(eye, 5)
    torch.testing.assert_close(turned @ turned.T, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(unrotate(turned, 5), eye, atol=1e-12, rtol=0)
    assert torch.equal(rotate(eye, 5), turned) and (size < 16 or not torch.equal(rotate(eye, 6), turned))
    if size > 8:
        assert float(turned.abs().max()) < 1.5 * (2 / size) ** 0.5 + 1e-9  # every column is spread over all


def test_a_rotated_layer_computes_the_same_in_float() -> None:
    weight, inputs = random(40, 96), fed()
    there = rotate(inputs.double(), 0) @ rotate(weight.double(), 0).T
    torch.testing.assert_close(there, inputs.double() @ weight.double().T)


def test_rotation_tames_a_column_that_stands_out() -> None:
    weight = random(64, 96)
    weight[:, 7] *= 40
    errors = {name: pack_weight(weight, COARSE, 0, Method(name)).error(weight) for name in ("rtn", "hadamard")}
    assert errors["hadamard"] < 0.7 * errors["rtn"]


def test_smoothing_is_the_formula() -> None:
    weight, inputs = random(8, 96), fed()
    for alpha in (0.0, 0.5, 1.0):
        factors = smooth_factors(weight, summed(inputs), alpha).float()
        expected = inputs.abs().amax(0) ** alpha / weight.abs().amax(0) ** (1 - alpha)
        torch.testing.assert_close(factors / factors[0], expected / expected[0], rtol=2e-3, atol=0)
    inputs[:, 3] = 0
    assert float(smooth_factors(weight, summed(inputs), 0.5)[3]) == 1


@pytest.mark.parametrize("scheme", [W4, COARSE, W8, SCHEMES["INT8_Per_Tensor_Asymmetric"]], ids=lambda s: s.name)
def test_awq_and_gptq_lose_less_than_rounding_to_nearest(scheme: Scheme) -> None:
    weight, inputs = random(48, 96), fed()
    nearest = output_error(weight, scheme, "rtn", inputs)
    assert output_error(weight, scheme, "awq", inputs) < 0.95 * nearest
    for by_activation in (True, False):
        assert output_error(weight, scheme, "gptq", inputs, by_activation=by_activation, block=32) < 0.85 * nearest
    assert output_error(weight, scheme, "awq+gptq", inputs) < 0.85 * nearest
    assert output_error(weight, scheme, "hadamard+gptq", inputs) < output_error(weight, scheme, "hadamard", inputs)


def test_awq_keeps_the_weight_where_scaling_does_not_help() -> None:
    weight = random(32, 64)
    inputs = torch.ones(100, 64) * random(100, 1).abs()
    assert awq_factors(weight, summed(inputs), W4, 10) is None


@pytest.mark.parametrize("by_activation", [True, False])
@pytest.mark.parametrize("scheme", [W4, W8, Scheme(4, False, "group", 32), Scheme(4, True, "group", 40)])
def test_gptq_of_uncorrelated_inputs_is_rounding_to_nearest(scheme: Scheme, by_activation: bool) -> None:
    weight = random(12, 96)
    codes, scale, zero = gptq(weight, torch.eye(96), scheme, by_activation=by_activation, block=48)
    found = decode(codes, scale, zero, scheme)
    assert torch.equal(found, pack_weight(weight, scheme).dequantized())


def test_gptq_follows_the_inverse_of_the_inputs() -> None:
    """One row, two columns, by hand: the second column takes over the error of the first."""
    weight = torch.tensor([[0.4, 7.0]])
    gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    codes, scale, _ = gptq(weight, gram, Scheme(4, True, "tensor"), damping=1e-6, by_activation=False)
    step = float(scale)
    first = round(0.4 / step) * step
    moved = 7.0 + 0.9 * (0.4 - first)  # the least squares of what is left
    assert int(codes[0, 0]) == round(0.4 / step) and int(codes[0, 1]) == max(-8, min(7, round(moved / step)))


def test_gptq_with_inputs_that_are_always_zero_or_equal() -> None:
    inputs = fed(64, 200)
    inputs[:, 5] = 0
    inputs[:, 6] = inputs[:, 7]
    weight = random(16, 64)
    codes, scale, zero = gptq(weight, inputs.T @ inputs, W4)
    nearest = pack_weight(weight, W4).dequantized()
    assert torch.equal(decode(codes, scale, zero, W4)[:, 5], nearest[:, 5])
    with pytest.raises(PqkError, match="more calibration inputs"):
        gptq(weight, torch.full((64, 64), float("nan")), W4)


def test_capture_adds_up_what_layers_are_fed() -> None:
    model, batches = layers(32), [random(2, 5, 32), random(1, 5, 32, seed=3)]
    found = capture(model, batches)
    assert list(found) == ["0", "3"] and found["0"].count == 15
    every = torch.cat([batch.reshape(-1, 32) for batch in batches])
    torch.testing.assert_close(found["0"].gram, every.T @ every)
    torch.testing.assert_close(found["0"].largest, every.abs().amax(0))
    torch.testing.assert_close(found["0"].mean, every.abs().mean(0))
    inner = model[:3](every)
    torch.testing.assert_close(found["3"].gram, inner.T @ inner)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_capture_in_parts_is_the_same() -> None:
    model, batches = layers(32), [random(4, 32)]
    whole, parts = capture(model, batches), capture(model, batches, memory=1)
    for name, inputs in whole.items():
        assert torch.equal(parts[name].gram, inputs.gram) and parts[name].count == inputs.count
    assert list(capture(model, batches, layers=["3"])) == ["3"]
    with pytest.raises(PqkError, match="give them as a list"):
        capture(model, iter(batches), memory=1)


def test_a_mask_leaves_positions_out() -> None:
    """Special tokens at the head of a sequence, with values of another size."""
    model, batch = layers(32), random(2, 6, 32)
    batch[:, :2] *= 100

    def patches(layer: str, inputs: Tensor) -> Tensor | None:
        if layer != "0":
            return None
        kept = torch.ones(inputs.shape[:-1], dtype=torch.bool)
        kept[:, :2] = False
        return kept

    found = capture(model, [batch], mask=patches)
    rest = batch[:, 2:].reshape(-1, 32)
    assert found["0"].count == 8 and found["3"].count == 12
    torch.testing.assert_close(found["0"].gram, rest.T @ rest)
    assert float(found["0"].largest.max()) < 10
    with pytest.raises(PqkError, match="the mask of 0 must be bool of shape"):
        capture(model, [batch], mask=lambda layer, inputs: torch.ones(3))


def test_capture_takes_arguments_by_name_and_keeps_the_mode() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.never, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5).eval()

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.one(input=left + right)

    model = Two().train()
    model.drop.eval()
    for batch in ({"left": torch.ones(3, 4), "right": torch.ones(3, 4)}, (torch.ones(3, 4), torch.ones(3, 4))):
        found = capture(model, [batch])
        assert list(found) == ["one"] and float(found["one"].largest[0]) == 2
    assert model.training and not model.drop.training
    assert capture(model, [3], run=lambda of, batch: of(torch.ones(batch, 4), 0))["one"].count == 3


def test_what_cannot_be_captured() -> None:
    model = layers(32)
    with pytest.raises(PqkError, match="no calibration batch"):
        capture(model, [])
    with pytest.raises(PqkError, match="0: a calibration input is NaN"):
        capture(model, [torch.full((2, 32), float("nan"))])
    with pytest.raises(PqkError, match="no linear layer or convolution is named '1'"):
        capture(model, [random(2, 32)], layers=["1"])


@pytest.mark.parametrize("name", ["rtn", "smooth", "awq", "hadamard", "gptq", "smooth+hadamard+gptq"])
@pytest.mark.parametrize("scheme", [W4, W8], ids=["W4A16", "W8A16"])
def test_a_packed_model_is_near_the_float_one(scheme: Scheme, name: str) -> None:
    model, batches = layers(), [fed(64, 64)]
    inputs = capture(model, batches)
    weights = quantize_weights(model, scheme, method=Method(name), inputs=inputs)
    expected = model(batches[0])
    with torch.no_grad():
        packed, plain = (quantized_model(model, weights, compute)(batches[0]) for compute in ("packed", "dequantized"))  # type: ignore[arg-type]
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)
    assert relative(packed, expected) < (0.16 if scheme is W4 else 0.01)


def test_inputs_of_a_layer_are_rounded_per_position_or_call() -> None:
    inputs = random(4, 10, 32)
    inputs[0, 0] *= 50
    by_token, by_tensor = (fake_rounded(inputs, Activations(8, per)) for per in ("token", "tensor"))  # type: ignore[arg-type]
    assert relative(by_token[1:], inputs[1:]) < 0.01 < relative(by_tensor[1:], inputs[1:])
    steps = inputs.abs().amax(-1, keepdim=True) / 127
    assert float(((by_token - inputs) / steps).abs().max()) <= 0.501
    skewed = inputs.abs() + 1
    assert relative(fake_rounded(skewed, Activations(4, symmetric=False)), skewed) < relative(
        fake_rounded(skewed, Activations(4)), skewed
    )
    assert torch.equal(fake_rounded(torch.zeros(2, 3), Activations(4, "tensor", False)), torch.zeros(2, 3))
    with pytest.raises(PqkError, match="8 or 4 bits"):
        Activations(16)


def test_w8a8_and_w4a4_are_emulated_and_say_so() -> None:
    model, inputs = layers(), fed(64, 64)
    model[2] = nn.Identity()
    captured, expected = capture(model, [inputs]), model(inputs)
    lost: dict[str, float] = {}
    for name, scheme, bits in (("rtn", W8, 8), ("smooth", W8, 8), ("rtn", W4, 4), ("hadamard", W4, 4)):
        weights = quantize_weights(model, scheme, method=Method(name), inputs=captured)
        made = quantized_model(model, weights, activations=Activations(bits))
        assert isinstance(made[0], PackedLinear) and "emulated" in made[0].compute  # type: ignore[index]
        lost[f"{name} W{scheme.bits}A{bits}"] = relative(made(inputs), expected)
    assert lost["smooth W8A8"] < lost["rtn W8A8"] < 0.1
    assert lost["hadamard W4A4"] < lost["rtn W4A4"]


@pytest.mark.parametrize(
    "scheme", [scheme for name, scheme in SCHEMES.items() if name.startswith("INT8")], ids=lambda s: s.name
)
def test_integer_products_are_the_emulated_ones(scheme: Scheme) -> None:
    layer, inputs = nn.Linear(96, 40), fed()
    packed = pack_weight(layer.weight, scheme, 0, Method("smooth"), summed(inputs))
    integer, emulated = packed_layer(layer, packed, integer=True), packed_layer(layer, packed, Activations(8))
    assert isinstance(integer, IntegerLinear) and integer.compute.startswith("integers")
    with torch.no_grad():
        torch.testing.assert_close(integer(inputs), emulated(inputs), rtol=1e-4, atol=1e-3)
        assert integer(inputs.reshape(2, 256, 96)).shape == (2, 256, 40)


def test_integer_products_do_not_saturate() -> None:
    """The largest numbers everywhere: a CPU that added two products in 16 bits would give others."""
    layer = nn.Linear(256, 8, bias=False)
    layer.weight.data = torch.where(torch.arange(8)[:, None] % 2 == 0, 1.0, -1.0).expand(8, 256).clone()
    inputs = torch.full((5, 256), 3.0)
    for scheme in (W8, SCHEMES["INT8_Per_Channel_Asymmetric"]):
        made = packed_layer(layer, pack_weight(layer.weight, scheme), integer=True)
        torch.testing.assert_close(made(inputs), F.linear(inputs, layer.weight), rtol=1e-5, atol=0)
    for count in (1024, 1500):
        left, right = torch.full((2, count), 127, dtype=torch.int8), torch.full((3, count), -128, dtype=torch.int8)
        left[1, ::3] = -5
        exact = (left.long() @ right.long().T).int()
        assert torch.equal(integer_product(left, right), exact) and torch.equal(torch._int_mm(left, right.T), exact)
    codes, scale = per_position(torch.zeros(2, 4))
    assert not codes.any() and bool((scale == 1).all())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "gtpq"}, "did you mean 'gptq'"),
        ({"name": "smooth+awq"}, "at most one of smooth and awq"),
        ({"name": "rtn+gptq"}, "one of rtn and gptq"),
        ({"alpha": 1.5}, "alpha is 1.5; allowed is 0..1"),
        ({"damping": 0.0}, "damping is 0.0"),
    ],
)
def test_methods_that_are_none(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(PqkError, match=said):
        Method(**wrong)  # type: ignore[arg-type]


def test_a_method_without_its_inputs_says_so() -> None:
    with pytest.raises(PqkError, match="method gptq needs inputs"):
        quantize_weights(layers(), W4, method=Method("gptq"))
    weights = quantize_weights(layers(), W4, method=Method("hadamard+gptq"), inputs={"0": summed(fed(64))})
    assert {name: packed.method for name, packed in weights.packed.items()} == {
        "0.weight": "hadamard+gptq",
        "3.weight": "hadamard",
    }
    with pytest.raises(PqkError, match=r"0.weight: inputs of 96 features do not fit a weight of 64 columns"):
        quantize_weights(layers(), W4, method=Method("awq"), inputs={"0": summed(fed(96))})
