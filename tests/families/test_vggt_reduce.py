"""Letter T on VGGT: patches merged in encoder and rounds, and the folded tail of the dense heads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends import exchange
from backends.reference import OnnxRuntimeEngine
from pqk.errors import PqkError
from pqk.families.vggt.graphs import graphs_of, parts_of
from pqk.families.vggt.learning import forward
from pqk.families.vggt.network.dpt import place_waves
from pqk.families.vggt.network.layers import LayerScale
from pqk.families.vggt.network.model import Vggt
from pqk.families.vggt.reduce import keep, reduced
from pqk.models import build_model

TOY: dict[str, Any] = {
    "img_size": 56,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "init_values": 0.5,
    "dino": {"depth": 1},
    "camera": {"trunk_depth": 1},
    "dpt": {"features": 16, "out_channels": [16, 16, 16, 16]},
}
FRAMES, HEIGHT, WIDTH = 3, 56, 70


@pytest.fixture(scope="module")
def model() -> Vggt:
    return build_model("vggt", TOY, generator=torch.Generator().manual_seed(0)).eval()


def images(batch: int) -> torch.Tensor:
    return torch.rand(batch, FRAMES, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def spared(model: Vggt, tail: str, tokens: float) -> Vggt:
    return build_model("vggt", *reduced(model.config, model.state_dict(), tail, tokens)).eval()


def test_weights_stay_but_for_the_folded_kernels(model: Vggt) -> None:
    before = model.state_dict()
    for tail, layers in (("half", ("output_conv2.0",)), ("quarter", ("output_conv1", "output_conv2.0"))):
        config, weights = reduced(model.config, before, tail, 0.3)
        changed = {name for name in before if not torch.equal(before[name], weights[name])}
        assert changed == {f"{head}_head.scratch.{layer}.weight" for head in ("depth", "point") for layer in layers}
        assert config["reduce"] == {"tail": tail, "tokens": 0.3}
        assert len(keep(config)) == 2 and not keep(model.config)
        with pytest.raises(PqkError, match="folded already"):
            reduced(config, weights, "half", 0.5)
    with pytest.raises(PqkError, match="nothing becomes less"):
        reduced(model.config, before, "full", 0.0)
    for wrong in ({"tail": "eighth"}, {"tokens": 0.7}, {"tokens": True}, {"tale": "half"}):
        with pytest.raises(PqkError, match="reduce"):
            build_model("vggt", {**TOY, "reduce": wrong})


def test_blocks_that_change_nothing_give_every_patch_its_own_value(model: Vggt) -> None:
    """Merged and undone, each patch keeps its value; what its representative gains is nothing here."""
    still = build_model("vggt", TOY, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for name, part in still.named_modules():
            if isinstance(part, LayerScale) and "camera_head" not in name:
                part.gamma.zero_()
        whole, less = still(images(2)), spared(still, "full", 0.5)(images(2))
    for name, values in whole.items():
        assert torch.allclose(values, less[name], rtol=1e-4, atol=1e-5), name


def test_every_block_sees_fewer_patches_and_all_special_tokens(model: Vggt) -> None:
    less = spared(model, "full", 0.5)
    seen: dict[str, tuple[int, ...]] = {}
    blocks = {"encoder": less.aggregator.patch_embed.blocks[0], "frame": less.aggregator.frame_blocks[1],
              "global": less.aggregator.global_blocks[1]}  # fmt: skip
    for name, block in blocks.items():
        block.register_forward_hook(lambda module, args, out, name=name: seen.update({name: tuple(out.shape)}))
    with torch.no_grad():
        found = less(images(2))
    left = 4 * 5 - 3 * 3  # three of the four whole cells of a grid of 4 x 5 are merged
    assert seen == {
        "encoder": (2 * FRAMES, 5 + left, 32),
        "frame": (2 * FRAMES, 5 + left, 32),
        "global": (2, FRAMES * (5 + left), 32),
    }
    assert found["world_points"].shape == (2, FRAMES, HEIGHT, WIDTH, 3)


def test_a_folded_tail_says_what_the_whole_one_says_of_smooth_maps(model: Vggt) -> None:
    """Of a map that only the coarsest level feeds, so that it is smooth, away from the zeros around it."""
    weights = model.state_dict()
    weights |= {name: torch.zeros_like(weights[name]) for name in weights if re.search(r"layer[123]_rn\.weight", name)}
    generator = torch.Generator().manual_seed(2)
    levels = [torch.randn(1, 1, 64, generator=generator).expand(1, 16 * 16, 64) for _ in range(4)]
    inside = (..., slice(84, -84), slice(84, -84))
    with torch.no_grad():
        head = build_model("vggt", TOY, weights).point_head
        whole = head(levels, (16, 16))[inside]
        for tail in ("half", "quarter"):
            less = build_model("vggt", *reduced(TOY, weights, tail, 0.0)).point_head
            off = (less(levels, (16, 16))[inside] - whole).abs().max() / whole.std()
            less.load_state_dict(head.state_dict())  # the kernels of the fine grid, on the coarse one
            wrong = (less(levels, (16, 16))[inside] - whole).abs().max() / whole.std()
            assert off < 0.02 and wrong > 5 * off, (tail, float(off), float(wrong))


def test_places_of_a_coarse_map_end_where_those_of_the_image_end() -> None:
    fine, coarse = place_waves(15, 8, 1.5, 8), place_waves(8, 8, 1.5, 8, (15, 8))
    assert np.allclose(fine[0][::2], coarse[0], atol=1e-6) and np.array_equal(fine[1], coarse[1])


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize(("tail", "tokens"), [("quarter", 0.5), ("half", 0.0)])
def test_the_graphs_agree_with_torch(tmp_path: Path, model: Vggt, frames: int, tail: str, tokens: float) -> None:
    less = spared(model, tail, tokens)
    shown = images(1)[:, :frames]
    with torch.no_grad():
        whole = less(shown)
    call, names = {}, {}
    for name, spec in graphs_of(less, frames, HEIGHT, WIDTH).items():
        graph = exchange.export(spec.module, spec.inputs, spec.output_names, tmp_path / f"{name}.onnx")
        call[name] = OnnxRuntimeEngine(graph).infer
        names[name] = graph
    encoded = [call["encoder"]({"image": frame[None].numpy()}) for frame in shown[0]]
    tokens_of = {f"tokens_{index}": one["tokens"] for index, one in enumerate(encoded)}
    seen = call["aggregator"]({"special": encoded[0]["special"], **tokens_of})
    levels = {name: values for name, values in seen.items() if name.startswith("level_")}
    found = {**call["camera"]({"camera_tokens": seen["camera_tokens"]}), **call["depth"](levels)}
    found |= call["points"](levels)
    for name, want in whole.items():
        got = found[name] if name == "pose_enc" else found[name][None]
        assert np.abs(got - want.numpy()).max() <= 1e-4 * want.abs().max(), name


def test_the_kept_nodes_are_the_resizes_of_the_raw_maps(tmp_path: Path, model: Vggt) -> None:
    import onnx

    less = spared(model, "quarter", 0.0)
    graphs = graphs_of(less, 1, HEIGHT, WIDTH)
    for entry in keep(less.config):
        graph, _, pattern = entry.partition(":")
        spec = graphs[graph]
        exchange.export(spec.module, spec.inputs, spec.output_names, tmp_path / f"{graph}.onnx")
        network = onnx.load(str(tmp_path / f"{graph}.onnx")).graph
        (resize,) = [node for node in network.node if re.search(pattern, node.name)]
        after = [node.op_type for node in network.node if resize.output[0] in node.input]
        assert resize.op_type == "Resize" and "Conv" not in after


def test_it_learns_at_another_size_than_it_is_exported_for(model: Vggt) -> None:
    from types import SimpleNamespace

    less = spared(model, "quarter", 0.4)
    parts = parts_of(less, (1, 1), 1, training=True)
    batch: Any = SimpleNamespace(images=images(2), mapped=None, gain=1.0)
    out = forward(parts, batch)
    with torch.no_grad():
        whole = less(images(2))
    assert torch.allclose(out["depth"], whole["depth"][..., 0], rtol=1e-4, atol=1e-5)
    out["pose_enc"].sum().backward()
    assert less.aggregator.global_blocks[0].attn.qkv.weight.grad.abs().max() > 0
