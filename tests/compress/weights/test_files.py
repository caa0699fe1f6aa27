"""Files of quantized weights: small as promised, equal byte for byte, whole or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weight_toys import IMAGE, Mixed, layers, mixed

from pqk.compress.weights.files import load_weights, save_weights
from pqk.compress.weights.methods.inputs import capture
from pqk.compress.weights.methods.method import Method
from pqk.compress.weights.model import quantize_weights, quantized_model
from pqk.compress.weights.schemes import SCHEMES, Scheme
from pqk.errors import PqkError

EVERY = [*SCHEMES.values(), Scheme(4, False, "group", 32)]


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.name)
def test_a_model_of_random_weights_becomes_the_saved_one(scheme: Scheme, tmp_path: Path) -> None:
    model = mixed()
    weights = quantize_weights(model, scheme, about={"name": "toy"})
    found = load_weights(save_weights(weights, tmp_path / "toy.safetensors"))
    assert found.about == {"name": "toy"} and found.tied == {"again.weight": "down.weight"}
    assert found.nbytes == weights.nbytes == weights.theory and found.ratio == weights.ratio
    expected = quantized_model(model, weights, "dequantized")(IMAGE)
    for compute in ("dequantized", "packed"):
        assert torch.equal(quantized_model(mixed(1), found, compute)(IMAGE), expected)  # type: ignore[arg-type]
    plain = Mixed().eval()
    plain.load_state_dict(found.state_dict())
    assert torch.equal(plain(IMAGE), expected)


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.name)
def test_a_file_has_the_size_of_the_theory(scheme: Scheme, tmp_path: Path) -> None:
    """Within 1 %, the header of the container included."""
    model = nn.Sequential(*[nn.Linear(1024, 512), nn.Linear(512, 1024)])
    weights = quantize_weights(model, scheme)
    size = save_weights(weights, tmp_path / "w.safetensors").stat().st_size
    assert weights.theory < size < 1.01 * weights.theory
    assert weights.float_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert weights.ratio == pytest.approx(weights.float_bytes / weights.theory)


def test_smoothing_and_rotation_are_kept(tmp_path: Path) -> None:
    model = layers()
    batches = [torch.randn(8, 64) * torch.linspace(0.1, 5, 64)]
    weights = quantize_weights(
        model, SCHEMES["INT4_Group_32"], method=Method("smooth+hadamard", seed=3), inputs=capture(model, batches)
    )
    found = load_weights(save_weights(weights, tmp_path / "w.safetensors"))
    assert found.packed["0.weight"].rotation == 3 and found.packed["0.weight"].smooth is not None
    assert found.packed["0.weight"].method == "smooth+hadamard"
    for name, packed in weights.packed.items():
        assert torch.equal(found.packed[name].dequantized(), packed.dequantized())


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (
        save_weights(quantize_weights(mixed(), SCHEMES["INT4_Group_64"], about={"b": 1, "a": 2}), tmp_path / name)
        for name in ("one", "two")
    )
    assert one.read_bytes() == two.read_bytes()


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = save_weights(quantize_weights(layers(32), SCHEMES["INT4_Group_32"]), tmp_path / "w.safetensors")
    good = path.read_bytes()
    for place in (*range(0, 600, 23), *range(600, len(good), 211), len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(PqkError, match=str(path)):
            load_weights(path)
    for length in (0, 7, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(PqkError, match="damaged or no safetensors file"):
            load_weights(path)
    path.write_bytes(good)
    load_weights(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    with pytest.raises(PqkError, match=str(path)):
        load_weights(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(PqkError, match="holds no quantized weights of pqk"):
        load_weights(path)
    for text in ("[]", "{}", "no JSON", '{"format": "pqk quantized weights", "version": 2}'):
        save_file({"a": torch.zeros(2)}, path, metadata={"pqk": text})
        with pytest.raises(PqkError, match=str(path)):
            load_weights(path)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    weights = quantize_weights(layers(), SCHEMES["INT4_Group_32"], about={"x": float("nan")})
    with pytest.raises(PqkError, match="no JSON"):
        save_weights(weights, tmp_path / "w")
    weights.about.clear()
    weights.rest["a::b"] = torch.zeros(1)
    with pytest.raises(PqkError, match="holds '::'"):
        save_weights(weights, tmp_path / "w")
    del weights.rest["a::b"]
    (tmp_path / "file").touch()
    with pytest.raises(PqkError, match="file"):
        save_weights(weights, tmp_path / "file" / "w")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
