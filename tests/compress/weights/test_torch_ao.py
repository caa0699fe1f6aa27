"""torchao's packed weights: which schemes it follows, and that its layers multiply floats with floats on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import profile
from weight_toys import IMAGE, layers, mixed, relative

pytest.importorskip("torchao")

from pqk.compress.weights.model import quantize_weights, quantized_model
from pqk.compress.weights.schemes import SCHEMES, Scheme
from pqk.compress.weights.torch_ao import torchao_follows, torchao_model
from pqk.errors import PqkError

FOLLOWED = [name for name, scheme in SCHEMES.items() if torchao_follows(scheme)]


def test_one_zero_point_per_tensor_is_all_that_it_lacks() -> None:
    assert set(SCHEMES) - set(FOLLOWED) == {"INT8_Per_Tensor_Asymmetric"}
    with pytest.raises(PqkError, match="torchao rounds no weight as INT8_Per_Tensor_Asymmetric does"):
        torchao_model(layers(), SCHEMES["INT8_Per_Tensor_Asymmetric"])


@pytest.mark.parametrize("name", FOLLOWED)
def test_its_error_is_that_of_the_scheme_and_the_model_stays(name: str) -> None:
    model, inputs = layers(128), torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    made = torchao_model(model, SCHEMES[name])
    own = quantized_model(model, quantize_weights(model, SCHEMES[name]), "dequantized")
    errors = [relative(found(inputs), model(inputs)) for found in (made, own)]
    assert 0.8 * errors[1] < errors[0] < 1.25 * errors[1]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", FOLLOWED)
def test_codes_are_bytes_that_become_floats_in_every_call(name: str) -> None:
    """Fails when torchao gets a kernel for packed weights: the words of the study about it are wrong then."""
    made, inputs = torchao_model(layers(128), SCHEMES[name]), torch.randn(16, 128)
    weight: Any = made[0].weight  # type: ignore[index]
    assert weight.qdata.dtype == torch.int8 and weight.qdata.numel() == 128 * 256
    plain = nn.functional.linear(inputs, weight.dequantize(), made[0].bias)  # type: ignore[index]
    with profile() as seen, torch.no_grad():
        found = made[0](inputs)  # type: ignore[index]
    names = {event.key for event in seen.key_averages()}
    assert "aten::_to_copy" in names and names & {"aten::mm", "aten::addmm"}
    assert not any("int4pack" in key or "int8pack" in key for key in names)
    assert relative(found, plain) < 1e-5


def test_attention_and_layers_that_no_group_divides_stay_in_float() -> None:
    made = torchao_model(mixed(), SCHEMES["INT4_Group_64"])  # of its layers only the two from 64 to 32
    assert relative(made(IMAGE), mixed()(IMAGE)) > 1e-4
    assert type(made.up.weight) is nn.Parameter  # type: ignore[union-attr]
    with pytest.raises(PqkError, match="the model has none for INT4_Group_48"):
        torchao_model(layers(), Scheme(4, True, "group", 48))
