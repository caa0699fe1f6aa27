"""Merging of tokens in cells, and kernels folded onto a coarser grid: letter T."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from backends import exchange
from backends.reference import OnnxRuntimeEngine
from pqk.errors import PqkError
from pqk.families.dust3r.reduce import keep, reduced
from pqk.families.layers import grid_rope, per_head
from pqk.families.merging import CELL, cells_to_merge, grid_cells
from pqk.families.reducing import folded
from pqk.models import build_model

SMALL = {
    "head_type": "dpt",
    "img_size": [64, 64],
    "landscape_only": False,
    "enc_embed_dim": 32,
    "enc_depth": 1,
    "enc_num_heads": 2,
    "dec_embed_dim": 32,
    "dec_depth": 3,
    "dec_num_heads": 2,
    "dpt": {"feature_dim": 16, "last_dim": 8, "layer_dims": [8, 8, 8, 8]},
}


def tokens(rows: int, cols: int, batch: int, seed: int, width: int = 8) -> torch.Tensor:
    return torch.randn(batch, rows * cols, width, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 9), st.integers(2, 9), st.floats(0, 0.6), st.integers(1, 3), st.integers(0, 9))
def test_every_token_is_merged_in_its_own_cell_or_stays(
    rows: int, cols: int, share: float, batch: int, seed: int
) -> None:
    cells = grid_cells(rows, cols, share, 8, 100.0)
    if cells is None:
        assert cells_to_merge(rows, cols, share) == 0
        return
    x = tokens(rows, cols, batch, seed)
    merged = cells(x)
    gone = rows * cols - merged.rope.tokens
    assert merged.tokens.shape == (batch, merged.rope.tokens, 8) and 0 < gone <= share * rows * cols
    own, weights = grid_rope(rows, cols, 8), merged.rope.bias[0, 0, 0].exp()
    for sample in range(batch):
        stands = merged.places[sample]
        assert torch.equal(stands.bincount(minlength=merged.rope.tokens).float(), weights.round())
        for place in range(merged.rope.tokens):
            members = (stands == place).nonzero()[:, 0]
            assert torch.allclose(merged.tokens[sample, place], x[sample, members].mean(dim=0), atol=1e-6)
            if len(members) == CELL:
                assert len({(int(i) // cols // 2, int(i) % cols // 2) for i in members}) == 1
            else:
                assert torch.equal(merged.rope.cos[sample, 0, place], own.cos[members[0]])


@given(st.integers(4, 8), st.integers(4, 8), st.integers(0, 9))
def test_the_cells_whose_tokens_are_most_alike_are_merged(rows: int, cols: int, seed: int) -> None:
    cells = grid_cells(rows, cols, 0.5, 8, 100.0)
    assert cells is not None
    x = tokens(rows, cols, 1, seed)
    merged = cells(x)
    scores = {}
    for row in range(rows // 2):
        for col in range(cols // 2):
            members = [(2 * row + i) * cols + 2 * col + j for i in (0, 1) for j in (0, 1)]
            cosines = F.normalize(x[0, members], dim=-1) @ F.normalize(x[0, members], dim=-1).T
            joined = len(set(merged.places[0, members].tolist())) == 1
            scores[float(cosines.mean())] = joined
    assert [scores[score] for score in sorted(scores, reverse=True)] == sorted(scores.values(), reverse=True)


def test_undone_each_token_has_its_own_value_and_the_change_of_what_stood_for_it() -> None:
    cells = grid_cells(5, 6, 0.5, 8, 100.0)
    assert cells is not None
    x = tokens(5, 6, 2, 0)
    merged = cells(x)
    assert torch.equal(merged.undo(merged.tokens), x)
    change = torch.randn(merged.tokens.shape, generator=torch.Generator().manual_seed(1))
    found = merged.undo(merged.tokens + change)
    for sample in range(2):
        assert torch.allclose(found[sample] - x[sample], change[sample, merged.places[sample]], atol=1e-5)


def test_a_merged_key_counts_as_the_four_equal_tokens_that_it_stands_for() -> None:
    """Attention to four equal keys and values at one place is that to their mean with log 4 added to its score."""
    cells = grid_cells(4, 4, 0.2, 8, 100.0)
    assert cells is not None and cells.merged == 1
    x = tokens(4, 4, 1, 3)
    x[0, [0, 1, 4, 5]] = x[0, 0].clone()
    merged = cells(x)
    assert merged.places[0, [0, 1, 4, 5]].tolist() == [0] * 4
    queries = tokens(2, 2, 1, 4)
    whole = F.scaled_dot_product_attention(queries, x, x)
    less = F.scaled_dot_product_attention(queries, merged.tokens, merged.tokens, attn_mask=merged.rope.bias[0])
    assert torch.allclose(whole, less, atol=1e-6) and merged.rope.bias.max() == pytest.approx(math.log(4))


def test_a_bias_has_a_row_for_each_head() -> None:
    """OpenVINO's fused attention in bf16 is wrong where one row serves all heads."""
    bias = torch.arange(5.0)[None, None, None]
    rows = per_head(bias, 3)
    assert rows is not None and rows.shape == (1, 3, 1, 5) and torch.equal(rows, bias.expand(1, 3, 1, 5))
    assert per_head(None, 3) is None


@pytest.mark.parametrize(("coarser", "every"), [(1, 1), (2, 1), (4, 1), (1.75, 4), (3.5, 2)])
def test_a_folded_kernel_reads_the_coarse_map_as_the_kernel_reads_the_resized_one(coarser: float, every: int) -> None:
    """At every coarse point that lies on a fine one."""
    generator = torch.Generator().manual_seed(0)
    coarse, kernel = torch.randn(1, 3, 13, 9, generator=generator), torch.randn(5, 3, 3, 3, generator=generator)
    sides, apart = [round(coarser * (side - 1)) + 1 for side in coarse.shape[2:]], round(coarser * every)
    fine = F.interpolate(coarse, size=sides, mode="bilinear", align_corners=True)
    want = F.conv2d(fine, kernel, padding=1)[:, :, ::apart, ::apart]
    got = F.conv2d(coarse, folded(kernel, coarser), padding=1)[:, :, ::every, ::every]
    assert torch.allclose(want[:, :, 1:-1, 1:-1], got[:, :, 1:-1, 1:-1], atol=1e-4)


def test_a_reduced_network_keeps_its_weights_but_for_the_folded_kernels() -> None:
    model = build_model("dust3r", SMALL, generator=torch.Generator().manual_seed(0))
    before = model.state_dict()
    config, weights = reduced(model.config, before, "quarter", 0.5)
    changed = {name for name in before if not torch.equal(before[name], weights[name])}
    assert changed == {f"downstream_head{n}.dpt.head.{k}.weight" for n in (1, 2) for k in (0, 2)}
    _, half = reduced(model.config, before, "half", 0.0)
    changed = {name for name in before if not torch.equal(before[name], half[name])}
    assert changed == {f"downstream_head{n}.dpt.head.2.weight" for n in (1, 2)}
    assert build_model("dust3r", config, weights).sizes.tail == 4
    assert keep(config) and not keep(model.config)
    with pytest.raises(PqkError, match="folded already"):
        reduced(config, weights, "half", 0.5)
    with pytest.raises(PqkError, match="nothing becomes less"):
        reduced(model.config, before, "full", 0.0)
    for wrong in ({"tail": "eighth"}, {"tokens": 0.7}, {"tokens": True}, {"tale": "half"}):
        with pytest.raises(PqkError, match="reduce"):
            build_model("dust3r", {**SMALL, "reduce": wrong})
    with pytest.raises(PqkError, match="linear head has no tail"):
        build_model("dust3r", {**SMALL, "head_type": "linear", "dpt": None, "reduce": {"tail": "half"}})


@pytest.mark.parametrize(("height", "width"), [(64, 64), (80, 112)])
def test_the_graphs_of_a_reduced_network_agree_with_torch(tmp_path: Path, height: int, width: int) -> None:
    """Of a whole model too, and of two pairs at once, which no graph has."""
    model = build_model("dust3r", SMALL, generator=torch.Generator().manual_seed(0))
    model = build_model("dust3r", *reduced(model.config, model.state_dict(), "quarter", 0.5)).eval()
    graphs = {
        name: exchange.export(spec.module, spec.inputs, spec.output_names, tmp_path / f"{name}.onnx")
        for name, spec in model.graphs(height, width).items()
    }
    text = (tmp_path / "decoder.onnx").read_bytes()
    assert b"TopK" in text and b"ScatterElements" in text and b"Random" not in text and b"ScatterND" not in text
    images = torch.rand(2, 2, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.inference_mode():
        want = model(images[0], images[1])
    with OnnxRuntimeEngine(graphs["encoder"]) as encoder, OnnxRuntimeEngine(graphs["decoder"]) as decoder:
        for sample in range(2):
            seen = [encoder.infer({"image": views[sample : sample + 1].numpy()})["tokens"] for views in images]
            got = decoder.infer({"tokens_1": seen[0], "tokens_2": seen[1]})
            for name, value in got.items():
                found = want[name][sample].numpy()
                assert np.abs(value[0] - found).max() <= 1e-4 * np.abs(found).max()
