"""The surface: samples of the quantization guides as they stand, mixed precision, QAT, PyTorch dynamic, errors."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weight_toys import IMAGE, layers, mixed, relative

import pqk.compress
from pqk.compress import (
    Activations,
    AdvancedQuantConfig,
    QuantizationConfig,
    Training,
    quantize_model_advanced,
    quantize_model_weights,
    size_bytes,
)
from pqk.compress.weights.files import load_weights, save_weights
from pqk.compress.weights.layers import IntegerLinear, PackedConv2d, PackedConvTranspose2d, PackedLinear, PackedWeight
from pqk.compress.weights.model import matches, quantize_weights, quantized_model, targets
from pqk.compress.weights.schemes import SCHEMES, Scheme
from pqk.errors import PqkError
from pqk.models import load_model

REPOSITORY = Path(__file__).resolve().parents[3]

ADVANCED = """
from pqk.compress import quantize_model_advanced, AdvancedQuantConfig

# INT8 对称量化
config = AdvancedQuantConfig(quant_type="int8_symmetric", bits=8)
quant_model = quantize_model_advanced(model, config)
made.append(quant_model)

# INT8 非对称量化
config = AdvancedQuantConfig(quant_type="int8_asymmetric", bits=8)
quant_model = quantize_model_advanced(model, config)
made.append(quant_model)

# INT4 分组量化
config = AdvancedQuantConfig(quant_type="int4_group", bits=4, group_size=128)
quant_model = quantize_model_advanced(model, config)
made.append(quant_model)
"""
CONFIGS = [
    """QuantizationConfig(
    name="INT8_Per_Tensor_Symmetric",
    quant_type="int8_per_tensor_sym",
    bits=8,
    symmetric=True,
    per_channel=False
)""",
    """QuantizationConfig(
    name="INT8_Per_Tensor_Asymmetric",
    quant_type="int8_per_tensor_asym",
    bits=8,
    symmetric=False,
    per_channel=False
)""",
    """QuantizationConfig(
    name="INT8_Per_Channel_Symmetric",
    quant_type="int8_per_channel_sym",
    bits=8,
    symmetric=True,
    per_channel=True  # 关键
)""",
    """QuantizationConfig(
    name="INT4_Group_128",
    quant_type="int4_group",
    bits=4,
    group_size=128  # 可调整为64或32
)""",
    """QuantizationConfig(
    name="INT4_Group_128",
    bits=4,
    group_size=128
)""",
]
SENSITIVE = """
# 敏感层用INT8，其他用INT4
config.sensitive_layers = ["attention", "head"]
config.sensitive_bits = 8
config.normal_bits = 4
"""
QAT = """
# 重新训练模型以适应量化
config.quantization_type = "qat"
"""


def test_the_sample_of_three_schemes_runs() -> None:
    model, made = mixed(), list[Any]()
    before = copy.deepcopy(model.state_dict())
    exec(ADVANCED, {"model": model, "made": made})
    assert [next(m for m in of.modules() if isinstance(m, PackedLinear)).packed.scheme for of in made] == [
        Scheme(8, True, "tensor"),
        Scheme(8, False, "tensor"),
        Scheme(4, True, "group", 128),
    ]
    with torch.no_grad():
        lost = [relative(of(IMAGE), model(IMAGE)) for of in made]
    assert max(lost[:2]) < 0.03 < lost[2] < 0.3
    sizes = [size_bytes(of) for of in made]
    assert sizes[2] < sizes[0] < size_bytes(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("sample", CONFIGS)
def test_the_samples_of_configurations_are_their_schemes(sample: str) -> None:
    config = eval(sample, {"QuantizationConfig": QuantizationConfig})
    assert config.scheme() == SCHEMES[config.name]
    weights = quantize_model_weights(mixed(), config)
    assert weights.about == {"name": config.name}
    assert {packed.scheme for packed in weights.packed.values()} == {SCHEMES[config.name]}


def test_the_sample_of_mixed_precision_runs() -> None:
    config = QuantizationConfig(name="INT4_Group_128", quant_type="int4_group", bits=4, group_size=32)
    exec(SENSITIVE, {"config": config})
    found = {name: packed.scheme for name, packed in quantize_model_weights(mixed(), config).packed.items()}
    eight, four = Scheme(8, True, "channel"), Scheme(4, True, "group", 32)
    assert found == {
        "patch.weight": four,
        "attention.in_proj_weight": eight,
        "attention.out_proj.weight": eight,
        "up.weight": four,
        "down.weight": four,
        "head.weight": eight,
    }
    config.sensitive_bits = 16
    assert set(quantize_model_weights(mixed(), config).packed) == {"patch.weight", "up.weight", "down.weight"}
    config.sensitive_layers = ["atention"]
    with pytest.raises(PqkError, match=r"matches 'atention' \(did you mean 'attention'\?\)"):
        quantize_model_weights(mixed(), config)


def test_the_sample_of_qat_asks_for_data_and_then_trains() -> None:
    config = AdvancedQuantConfig(quant_type="int4_group", group_size=32)
    exec(QAT, {"config": config})
    model = layers(32)
    with pytest.raises(PqkError, match=r"'qat' trains the model and needs config.training = Training\(batches, loss\)"):
        quantize_model_advanced(model, config)
    batches = [torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    with torch.no_grad():
        aims = {id(batch): model(batch) for batch in batches}

    def loss(of: nn.Module, batch: Tensor) -> Tensor:
        return (of(batch) - aims[id(batch)]).square().mean()

    plain = quantize_model_advanced(model, AdvancedQuantConfig(quant_type="int4_group", group_size=32))
    before = copy.deepcopy(model.state_dict())
    config.training = Training(batches, loss, steps=60, learning_rate=1e-4)
    trained = quantize_model_advanced(model, config)
    unseen = torch.randn(256, 32, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        assert relative(trained(unseen), model(unseen)) < 0.85 * relative(plain(unseen), model(unseen))
    assert isinstance(trained[0], PackedLinear)  # type: ignore[index]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_qat_keeps_shared_weights_and_refuses_what_cannot_train() -> None:
    def loss(of: nn.Module, batch: Tensor) -> Tensor:
        return of(batch).square().mean()

    config = AdvancedQuantConfig(quant_type="int8_per_channel_sym", quantization_type="qat", compute="dequantized")
    config.training = Training([IMAGE], loss, steps=2)
    found = quantize_model_advanced(mixed(), config)
    assert found.again.weight is found.down.weight and type(found.again) is nn.Linear
    assert not any("parametrizations" in name for name in found.state_dict())
    config.training = Training([], loss)
    with pytest.raises(PqkError, match="there is none"):
        quantize_model_advanced(mixed(), config)
    config.training = Training([IMAGE], lambda of, batch: of(batch).mean() * float("nan"))
    with pytest.raises(PqkError, match="loss of step 1 is not finite"):
        quantize_model_advanced(mixed(), config)
    with pytest.raises(PqkError, match="above 0"):
        Training([IMAGE], loss, steps=0)


def test_pytorch_dynamic_computes_in_integers_and_is_small() -> None:
    model = layers(256)
    found = quantize_model_advanced(model, AdvancedQuantConfig(quant_type="pytorch_dynamic"))
    assert type(found[0]).__module__.startswith("torch.ao.nn.quantized.dynamic")  # type: ignore[index]
    inputs = torch.randn(8, 256)
    with torch.no_grad():
        assert 1e-4 < relative(found(inputs), model(inputs)) < 0.05
    assert 3.8 < size_bytes(model) / size_bytes(found) < 4
    with pytest.raises(PqkError, match="takes no method"):
        quantize_model_advanced(model, AdvancedQuantConfig(quant_type="pytorch_dynamic", method="gptq"))
    with pytest.raises(PqkError, match="the model has none"):
        quantize_model_advanced(nn.Conv2d(3, 3, 3), AdvancedQuantConfig(quant_type="pytorch_dynamic"))
    with pytest.raises(PqkError, match="float32 on the CPU"):
        quantize_model_advanced(layers(8).double(), AdvancedQuantConfig(quant_type="pytorch_dynamic"))


def test_methods_with_calibration_batches() -> None:
    model, batches = layers(), [torch.randn(64, 64, generator=torch.Generator().manual_seed(2))]
    config = AdvancedQuantConfig(quant_type="int4_group", method="gptq", group_size=32)
    with pytest.raises(PqkError, match="method gptq needs calibration batches"):
        quantize_model_advanced(model, config)
    found = quantize_model_advanced(model, config, batches)
    config.method = "rtn"
    with torch.no_grad():
        expected = model(batches[0])
        better, nearest = (relative(of(batches[0]), expected) for of in (found, quantize_model_advanced(model, config)))
    assert better < 0.8 * nearest


def test_every_kind_of_layer_is_packed_or_dequantized() -> None:
    model = mixed()
    weights = quantize_weights(model, SCHEMES["INT8_Per_Channel_Asymmetric"])
    packed, plain = quantized_model(model, weights), quantized_model(model, weights, "dequantized")
    assert isinstance(packed.patch, PackedConv2d) and isinstance(packed.head, PackedConvTranspose2d)
    assert packed.down.weight_codes is packed.again.weight_codes  # a shared weight is packed once
    assert not isinstance(packed.attention.out_proj, PackedWeight)
    assert torch.equal(packed(IMAGE), plain(IMAGE))
    integer = quantized_model(model, weights, "integer")
    assert isinstance(integer.up, IntegerLinear) and isinstance(integer.patch, PackedConv2d)
    assert relative(integer(IMAGE), model(IMAGE)) < 0.02
    assert "float" in packed.up.compute and packed.up.weight.shape == (64, 32)


def test_a_packed_model_is_copied_moved_and_kept_like_any_other(tmp_path: Path) -> None:
    model = layers()
    made = quantized_model(model, quantize_weights(model, SCHEMES["INT4_Group_32"]))
    inputs = torch.randn(3, 64)
    torch.save(made, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(inputs), made(inputs)) and torch.equal(copy.deepcopy(made)(inputs), made(inputs))
    half = copy.deepcopy(made).to(torch.bfloat16)
    assert half(inputs.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half[0].weight_scale, made[0].weight_scale)  # type: ignore[index]
    eight = quantized_model(model, quantize_weights(model, SCHEMES["INT8_Per_Channel_Symmetric"])).bfloat16()
    assert eight[0].weight_scale.dtype == torch.float32 and eight[0].weight.dtype == torch.bfloat16  # type: ignore[index]
    assert json.dumps(sorted(made.state_dict()))  # plain tensors by name


def test_the_fused_layer_of_torch_does_not_pass_packed_weights_by() -> None:
    """In eval mode it reads the weights of its linear layers, and calls none of them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    inputs = torch.randn(2, 5, 32)
    weights = quantize_weights(model, SCHEMES["INT8_Per_Channel_Symmetric"])
    with torch.no_grad():
        plain = quantized_model(model, weights, "dequantized")(inputs)
        torch.testing.assert_close(quantized_model(model, weights)(inputs), plain, atol=1e-5, rtol=1e-5)
        rounded = quantized_model(model, weights, activations=Activations(4))(inputs)
        assert relative(rounded, plain) > 0.01
        dynamic = quantize_model_advanced(model, AdvancedQuantConfig(quant_type="pytorch_dynamic"))
        assert 0 < relative(dynamic(inputs), model(inputs)) < 0.05


def test_targets_are_large_weights_of_linear_layers_and_convolutions() -> None:
    assert [target.name for target in targets(mixed(), 0)] == [
        "patch.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "up.weight",
        "down.weight",
        "head.weight",
    ]
    tied = nn.ModuleDict({"words": nn.Embedding(50, 32), "head": nn.Linear(32, 50, bias=False)})
    tied["head"].weight = tied["words"].weight
    weights = quantize_weights(tied, SCHEMES["INT4_Group_32"])
    assert list(weights.packed) == ["words.weight"] and weights.tied == {"head.weight": "words.weight"}
    made = quantized_model(tied, weights)
    assert torch.equal(made["head"].weight, weights.packed["words.weight"].dequantized())  # type: ignore[index]
    with pytest.raises(PqkError, match="no linear layer or convolution of 1024 or more weights"):
        quantize_weights(nn.Linear(8, 8), SCHEMES["INT4_Group_32"])
    with pytest.raises(PqkError, match="every layer is to stay in float"):
        quantize_weights(nn.Sequential(nn.Linear(64, 64)), SCHEMES["INT4_Group_32"], overrides=[("*", None)])
    single = nn.Linear(64, 64)
    assert isinstance(quantized_model(single, quantize_weights(single, SCHEMES["INT4_Group_32"])), PackedLinear)
    assert matches("blocks.3.attention", "attention") and matches("blocks.3.attn", "blocks.?.attn")
    assert not matches("blocks.3.attn.qkv", "blocks.?.attn") and not matches("head", "*.head")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"quant_type": "int8_symetric"}, "did you mean 'int8_symmetric'"),
        ({"quant_type": "int8_per_tensor_sym", "bits": 4}, "has bits 8, and bits says 4"),
        ({"quant_type": "int8_per_tensor_sym", "per_channel": True}, "has per_channel False"),
        ({"quant_type": "int8_asymmetric", "symmetric": True}, "has symmetric False"),
        ({"bits": 3}, "4 or 8 bits, not to 3"),
        ({"bits": 8, "group_size": 64}, "group_size 64 is about 4 bits"),
        ({"bits": 4, "group_size": 0}, "group_size must be"),
        ({"quantization_type": "qta"}, "did you mean 'qat'"),
        ({"method": "gtpq"}, "did you mean 'gptq'"),
        ({"compute": "integr"}, "did you mean 'integer'"),
        ({"quant_type": "int4_group", "compute": "integer"}, "integer products need weights of 8 bits"),
        ({"compute": "integer", "activations": Activations(8)}, "emulated with compute 'packed'"),
        ({"sensitive_layers": "head"}, "is a list of names"),
        ({"sensitive_layers": ["up"], "sensitive_bits": 5}, "4 or 8 bits, not to 5"),
    ],
)
def test_settings_that_are_wrong(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(PqkError, match=said):
        quantize_model_advanced(mixed(), AdvancedQuantConfig(**wrong))


def test_weights_of_another_model_are_refused() -> None:
    weights = quantize_weights(layers(64), SCHEMES["INT4_Group_32"])
    with pytest.raises(PqkError, match=r"0\.bias has the shape \[64\] in the model, quantized \[128\]"):
        quantized_model(layers(32), weights)
    with pytest.raises(PqkError, match="another model"):
        quantized_model(mixed(), weights)
    broken = layers(64)
    broken[0].weight.data[3, 3] = float("nan")  # type: ignore[index]
    with pytest.raises(PqkError, match=r"0\.weight: a weight is NaN"):
        quantize_weights(broken, SCHEMES["INT4_Group_32"])


def test_importing_the_room_imports_no_torch() -> None:
    code = "import sys, pqk.compress\nprint('torch' in sys.modules, *pqk.compress.__all__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded, *names = done.stdout.split()
    assert loaded == "False" and names == sorted(
        names, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    assert all(
        getattr(pqk.compress, name).__module__.startswith("pqk.compress") for name in names if not name.isupper()
    )
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        pqk.compress.nothing  # noqa: B018


def test_a_shipped_model_keeps_its_predictions(tmp_path: Path) -> None:
    model = load_model(REPOSITORY / "models" / "dust3r-tiny")
    pictures = [torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1)]
    weights = quantize_weights(
        model, SCHEMES["INT4_Group_64"], overrides=[("head", SCHEMES["INT8_Per_Channel_Symmetric"])]
    )
    assert 6 < weights.ratio < 7.6 and 0.05 < weights.error(model) < 0.12
    found = load_weights(save_weights(weights, tmp_path / "w.safetensors"))
    with torch.no_grad():
        expected, rounded = model(*pictures), quantized_model(model, found)(*pictures)
    for name, value in expected.items():
        assert 0 < relative(rounded[name], value) < 0.3
