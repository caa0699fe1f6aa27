"""A runtime may be wrong: OpenVINO's CPU plugin on the camera head of VGGT as it is usually written.

Attention over two frames that reshapes queries, keys and values together gives other poses there (seen with OpenVINO
2026.4 on AVX-512 and AMX), and right ones in ONNX Runtime. The float level of `pqk parity` sees it; the graph that pqk
exports splits the three first and agrees.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from backends.base import Graph, Precision
from backends.exchange import export
from pqk.engines.variant import Variant
from pqk.families.layers import apply_rope
from pqk.families.registry import family
from pqk.families.vggt.network.layers import Attention
from pqk.families.vggt.settings import load_workload
from pqk.measure.output_difference import compare
from pqk.models import build_model, load_model, save_model

REPOSITORY = Path(__file__).parents[2]
LIMIT = 1e-4  # parity.float_relative of eval.yaml
TOY = {
    "img_size": 56,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "init_values": 0.6,
    "dino": {"depth": 1},
    "camera": {"trunk_depth": 2},
    "dpt": {"features": 16, "out_channels": [8, 8, 8, 8]},
}


def together(self: Attention, x: Tensor, tokens: int, rope: Any, bias: None = None) -> Tensor:
    """Attention as it is usually written: one five-dimensional reshape of queries, keys and values."""
    parts = self.qkv(x).reshape(-1, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]
    if rope is not None:
        q, k = apply_rope(q, rope, self.head_dim), apply_rope(k, rope, self.head_dim)
    mixed = F.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
    return self.proj(mixed.transpose(1, 2).reshape(-1, tokens, self.inner))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = build_model("vggt", TOY, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.08 * torch.randn(parameter.shape, generator=generator)
    return save_model(net, tmp_path_factory.mktemp("parity") / "toy")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def exported(model: Path, workload: Any, folder: Path) -> dict[str, Graph]:
    specs = family("vggt").model_part().graphs(load_model(model), workload)
    return {
        name: export(spec.module, spec.inputs, spec.output_names, folder / f"{name}.onnx")
        for name, spec in specs.items()
    }


def worst(model: Path, photographs: Path, graphs: dict[str, Graph]) -> dict[str, float]:
    """The mean relative difference of the poses to torch, for each runtime, as the float level has it."""
    from pqk.families.contract import SampleSet

    workload = asked()
    where = {"folders": [str(photographs)]}
    found = SampleSet(where, {"views": None}, (photographs.name,), "0" * 64, truthful=False, own=True)
    plain = Variant("fp32", "reference", Precision.F32, graphs)
    sides = {"reference": plain, "openvino": replace(plain, backend="openvino")}
    request = {
        "family": "vggt",
        "workload": workload.model_dump(mode="json"),
        "samples": found.to_json(),
        "base": {"torch": str(model)},
        "others": [{"variant": side.to_json()} for side in sides.values()],
        "count": 2,
    }
    heads = compare(request)["heads"]
    return {name: of["pose_enc"]["relative"] for name, of in zip(sides, heads, strict=True)}


def asked() -> Any:
    return load_workload(REPOSITORY / "configs" / "vggt" / "workload.yaml", {"input.shape": [1, 3, 56, 56]})


def test_the_exported_graph_agrees_everywhere(model: Path, photographs: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    found = worst(model, photographs, exported(model, asked(), tmp_path))
    assert all(value < LIMIT for value in found.values()), found


def test_a_wrong_runtime_is_seen(
    model: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ov = pytest.importorskip("openvino")
    monkeypatch.setattr(Attention, "forward", together)
    graphs = exported(model, asked(), tmp_path)  # the export is right: it is checked in ONNX Runtime
    camera = graphs["camera"].path
    tokens = np.random.default_rng(0).standard_normal((1, 2, 48)).astype(np.float32)
    poses = []
    for mode in ({}, {"SNIPPETS_MODE": "DISABLE"}):
        settings = {"INFERENCE_PRECISION_HINT": "f32", **mode}
        poses.append(ov.Core().compile_model(camera, "CPU", settings)([tokens])[0])
    apart = np.abs(poses[0] - poses[1]).max() / np.abs(poses[1]).max()
    if apart < LIMIT:
        pytest.skip("the plugin of this processor computes it right")
    found = worst(model, photographs, graphs)
    assert found["reference"] < LIMIT < found["openvino"], found
