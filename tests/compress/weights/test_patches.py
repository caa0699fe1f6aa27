"""What a convolution is fed, as rows: a product with its weight matrix is what the convolution computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pqk.compress.weights.methods.inputs import capture
from pqk.compress.weights.methods.method import Method, pack_weight
from pqk.compress.weights.methods.patches import POSITIONS, features_of, rows_of
from pqk.compress.weights.quantizers import as_matrix
from pqk.compress.weights.schemes import SCHEMES

W4 = SCHEMES["INT4_Group_32"]


def smooth_images(*shape: int, seed: int = 0) -> Tensor:
    """Images whose neighbouring pixels are alike, as those of a network are."""
    small = torch.randn(*shape[:2], shape[2] // 4, shape[3] // 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, shape[2:], mode="bilinear")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(5, 7, 3, padding=1),
        nn.Conv2d(5, 7, (3, 1), stride=(2, 1), padding=(0, 2), dilation=(2, 1), bias=False),
        nn.Conv2d(5, 7, 4, stride=4),
        nn.Conv2d(5, 7, (3, 5), padding="same"),
        nn.Conv2d(5, 7, 3, padding="valid"),
        nn.Conv2d(5, 7, 3, padding=2, padding_mode="reflect"),
        nn.Conv2d(5, 7, 3, padding=1, padding_mode="circular"),
    ],
    ids=lambda layer: str(layer).removeprefix("Conv2d"),
)
def test_rows_times_the_weight_are_the_convolution(layer: nn.Conv2d) -> None:
    images = smooth_images(2, 5, 16, 12)
    rows, expected = rows_of(layer, images), layer(images)
    assert rows.shape == (expected.shape[0] * expected.shape[2] * expected.shape[3], features_of(layer))
    found = rows @ as_matrix(layer.weight).T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).reshape(-1, 7))
    torch.testing.assert_close(rows_of(layer, images[0]), rows[: len(rows) // 2])


def test_of_many_positions_some_are_taken() -> None:
    layer, images = nn.Conv2d(1, 1, 3, padding=1), smooth_images(2, 1, 200, 120)
    rows = rows_of(layer, images)
    assert POSITIONS / 2 < len(rows) / 2 <= POSITIONS
    every = layer(images)[:, :, ::3, ::3]
    torch.testing.assert_close(rows @ as_matrix(layer.weight).T + layer.bias, every.permute(0, 2, 3, 1).reshape(-1, 1))


def test_inputs_of_a_transposed_convolution_are_those_of_its_columns() -> None:
    """Each output sees one place of the kernel: rows with the input there and zeros elsewhere."""
    layer, images = nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False), smooth_images(1, 6, 8, 4)
    found = capture(nn.Sequential(layer), [images])["0"]
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 6)
    rows = torch.zeros(len(pixels), 4, 6, 4)
    for place in range(4):
        rows[:, place, :, place] = pixels
    rows = rows.reshape(-1, 24)
    torch.testing.assert_close(found.gram, rows.T @ rows)
    torch.testing.assert_close(found.largest, rows.abs().amax(0))
    own = (rows @ as_matrix(layer.weight, 1).T).square().sum()
    torch.testing.assert_close(own, layer(images).square().sum())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, groups=3),
        nn.Conv1d(6, 6, 3),
        nn.ConvTranspose2d(6, 6, 3, stride=2),
        nn.ConvTranspose2d(6, 6, 2, stride=2, padding=1),
    ],
    ids=lambda layer: str(layer),
)
def test_other_convolutions_are_left_out(layer: nn.Module) -> None:
    assert features_of(layer) == 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["gptq", "hadamard+gptq"])
def test_gptq_loses_less_of_a_convolution(name: str, transposed: bool) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(48, 24, 2, stride=2) if transposed else nn.Conv2d(12, 24, 3, padding=1)
    images = smooth_images(4, 12, 16, 16) + 0.05 * torch.randn(4, 12, 16, 16)
    if transposed:  # no position sees a neighbour: what can be made up for lies in other channels
        images = torch.einsum("oc,bchw->bohw", torch.randn(48, 12), images)
    inputs, axis = capture(nn.Sequential(layer), [images])["0"], int(transposed)
    expected, lost = layer(images).detach(), {}
    for method in (name, name.replace("gptq", "rtn")):
        packed = pack_weight(layer.weight, W4, axis, Method(method), inputs)
        made = type(layer)(*(layer.in_channels, 24, layer.kernel_size), stride=layer.stride, padding=layer.padding)
        made.load_state_dict({"weight": packed.dequantized(), "bias": layer.bias})
        lost[method] = float((made(images).detach() - expected).square().sum() / expected.square().sum())
        assert packed.method == method
    assert lost[name] < 0.5 * lost[name.replace("gptq", "rtn")]


def test_words_that_scale_features_are_left_out() -> None:
    """A factor of one value under the kernel cannot be divided out of the input."""
    layer = nn.Conv2d(16, 8, 3)
    inputs = capture(nn.Sequential(layer), [smooth_images(1, 16, 16, 16)])["0"]
    for name, left in (("smooth", "rtn"), ("awq", "rtn"), ("smooth+hadamard+gptq", "hadamard+gptq")):
        packed = pack_weight(layer.weight, W4, 0, Method(name), inputs)
        assert (packed.method, packed.smooth) == (left, None)
