"""A smaller network made of a Teacher's own layers: fewer blocks, heads, MLP channels and DPT channels.

What is kept of a width is what matters most by size: a unit (a head, a channel) weighs `norm of the weights that write
it * norm of the weights that read it`, both L2. The product does not change when a unit's output is scaled up and its
readers are scaled down, which leaves the network's function as it is. The widths of the token streams are never cut, so
blocks can be left out and everything still fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.models import build_model
from pqk.models.configs import BlockSize, DptSize
from pqk.spec.distill import StudentCut

FEWEST_FOR_DPT = 3
"""Decoder blocks that a DPT head needs, see `dpt_hooks`."""
FFN_STEP, DPT_STEP = 16, 8
"""Cut widths are multiples of these where the Teacher's are: kernels waste the rest."""

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Axis:
    """One axis of one weight along which units lie: `copies` times all units, each `width` entries long."""

    key: str
    dim: int
    copies: int = 1
    width: int = 1

    def of(self, weights: Weights, units: int) -> Tensor:
        """The weight as (units, everything else)."""
        split = weights[self.key].movedim(self.dim, 0)
        return split.reshape(self.copies, units, -1).transpose(0, 1).reshape(units, -1)

    def cut(self, weights: Weights, units: int, kept: Tensor) -> None:
        """Keep only these units."""
        index = torch.arange(self.copies * units * self.width).reshape(self.copies, units, self.width)[:, kept]
        weights[self.key] = weights[self.key].index_select(self.dim, index.flatten())


@dataclass(frozen=True)
class Units:
    """Interchangeable units of a network: the weights that write them and those that read them.

    follows: weights without effect on any output; cut alike, but not asked.
    """

    count: int
    writes: tuple[Axis, ...]
    reads: tuple[Axis, ...]
    follows: tuple[Axis, ...] = ()

    def importance(self, weights: Weights) -> Tensor:
        """(count,): L2 norm of what writes a unit times L2 norm of what reads it."""
        written, read = (
            torch.stack([axis.of(weights, self.count).float().square().sum(1) for axis in axes]).sum(0)
            for axes in (self.writes, self.reads)
        )
        return (written * read).sqrt()

    def cut(self, weights: Weights, keep: int) -> None:
        """Leave the `keep` most important units, in their old order."""
        kept = self.importance(weights).argsort(descending=True, stable=True)[:keep].sort().values
        for axis in (*self.writes, *self.reads, *self.follows):
            axis.cut(weights, self.count, kept)


def remaining(count: int, share: float, step: int = 1, least: int = 1) -> int:
    """How many of `count` units stay when `share` is cut: the nearest multiple of `step` where count is one."""
    if share == 0:
        return count
    step = step if count % step == 0 else 1
    return min(count, max(least, step, step * int((1 - share) * count / step + 0.5)))


def evenly(count: int, keep: int) -> list[int]:
    """`keep` of `count` layers, evenly spaced, the first and the last among them (one alone: the last)."""
    if keep == 1:
        return [count - 1]
    return [(2 * i * (count - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]  # rounded to the nearest


def kept_blocks(teacher: Any, cut: StudentCut) -> tuple[list[int], list[int]]:
    """Which of the Teacher's encoder blocks and of its decoder blocks (the same of both decoders) a student keeps."""
    sizes = teacher.sizes
    encoder, decoder = len(sizes.enc_blocks), len(sizes.dec_blocks)
    least = 1 if sizes.dpt is None else FEWEST_FOR_DPT
    return (
        evenly(encoder, remaining(encoder, cut.depth)),
        evenly(decoder, remaining(decoder, cut.depth, least=least)),
    )


@torch.no_grad()
def make_student(teacher: Any, cut: StudentCut) -> nn.Module:
    """A smaller model on the CPU, in eval mode, made of the Teacher's kept layers; the Teacher stays as it is.

    Depth: evenly spaced blocks, first and last among them, the same ones of both decoders, and never fewer than three
    decoder blocks under a DPT head. Heads of self- and cross-attention, MLP channels and DPT channels: the most
    important ones of each block or layer by themselves (see the module's text). Numbers are rounded to the nearest;
    at least one head and one block stay. `cut.dpt` has no meaning for a linear head and does nothing there.
    Raises PqkError for a family other than DUSt3R.
    """
    if getattr(teacher, "family", None) != "dust3r":
        raise PqkError(f"students are made of DUSt3R models, not of {getattr(teacher, 'family', type(teacher))!r}")
    sizes = teacher.sizes
    weights = {key: value.detach().cpu() for key, value in teacher.state_dict().items() if ".layer_rn." not in key}
    config = dict(teacher.config)
    enc_kept, dec_kept = kept_blocks(teacher, cut)
    for name, part, blocks, kept in (
        ("enc_blocks", "enc", sizes.enc_blocks, enc_kept),
        ("dec_blocks", "dec", sizes.dec_blocks, dec_kept),
        ("dec_blocks2", "dec", sizes.dec_blocks2, dec_kept),
    ):
        config[name] = _cut_blocks(weights, name, [blocks[i] for i in kept], kept, cut)
        config[f"{part}_depth"], config[f"{part}_head_dim"] = len(kept), blocks[0].head_dim
    if sizes.dpt is not None:
        wanted = DptSize(
            remaining(sizes.dpt.feature_dim, cut.dpt, DPT_STEP, least=2) // 2 * 2,
            remaining(sizes.dpt.last_dim, cut.dpt, DPT_STEP),
            tuple(remaining(dim, cut.dpt, DPT_STEP) for dim in sizes.dpt.layer_dims),  # type: ignore[arg-type]
        )
        for head in ("downstream_head1.dpt.", "downstream_head2.dpt."):
            for units, keep in _dpt_units(head, sizes.dpt, wanted):
                units.cut(weights, keep)
        config["dpt"] = {
            "feature_dim": wanted.feature_dim,
            "last_dim": wanted.last_dim,
            "layer_dims": list(wanted.layer_dims),
        }
    student: nn.Module = build_model("dust3r", config, weights).eval()
    return student


def _cut_blocks(
    weights: Weights, name: str, sizes: list[BlockSize], kept: list[int], cut: StudentCut
) -> list[dict[str, int]]:
    """Replace a stack's weights by those of the kept blocks, cut and renumbered; returns the blocks' new sizes."""
    start = f"{name}."
    old = {key: weights.pop(key) for key in list(weights) if key.startswith(start)}
    blocks = []
    for new, (index, size) in enumerate(zip(kept, sizes, strict=True)):
        prefix = f"{start}{index}."
        block = {key.removeprefix(prefix): value for key, value in old.items() if key.startswith(prefix)}
        heads, ffn = remaining(size.heads, cut.heads), remaining(size.ffn, cut.ffn, FFN_STEP)
        for units in _head_units(block, size):
            units.cut(block, heads)
        _mlp_units(size).cut(block, ffn)
        weights.update({f"{start}{new}.{key}": value for key, value in block.items()})
        blocks.append({"heads": heads, "ffn": ffn})
    return blocks


def _head_units(block: Iterable[str], size: BlockSize) -> list[Units]:
    """The heads of self-attention, whose projection is fused (q | k | v, each head by head), and of cross-attention."""

    def units(writes: list[tuple[str, int]], read: str) -> Units:
        axes = tuple(Axis(f"{key}.{w}", 0, copies, size.head_dim) for key, copies in writes for w in ("weight", "bias"))
        return Units(size.heads, axes, (Axis(f"{read}.weight", 1, 1, size.head_dim),))

    found = [units([("attn.qkv", 3)], "attn.proj")]
    if "cross_attn.proj.weight" in set(block):
        found.append(units([(f"cross_attn.proj{x}", 1) for x in "qkv"], "cross_attn.proj"))
    return found


def _mlp_units(size: BlockSize) -> Units:
    return Units(size.ffn, (Axis("mlp.fc1.weight", 0), Axis("mlp.fc1.bias", 0)), (Axis("mlp.fc2.weight", 1),))


def _dpt_units(head: str, old: DptSize, new: DptSize) -> list[tuple[Units, int]]:
    """Every width of one DPT head with what is to stay of it; see `pqk/models/dpt.py` for the layers."""

    def writes(*layers: str) -> tuple[Axis, ...]:
        return tuple(Axis(f"{head}{layer}.{w}", 0) for layer in layers for w in ("weight", "bias"))

    def reads(*layers: str) -> tuple[Axis, ...]:
        return tuple(Axis(f"{head}{layer}.weight", 1) for layer in layers)

    found: list[tuple[Units, int]] = []
    for level, (had, keep) in enumerate(zip(old.layer_dims, new.layer_dims, strict=True)):
        project, resize, last = (
            f"act_postprocess.{level}.0",
            f"act_postprocess.{level}.1",
            f"scratch.layer{level + 1}_rn",
        )
        if level == 2:  # keeps the size of the token grid: nothing between the two projections
            found.append((Units(had, writes(project), reads(last)), keep))
            continue
        if level == 3:
            between, after = reads(resize), writes(resize)
        else:  # transposed convolutions store (in, out, ...)
            between = (Axis(f"{head}{resize}.weight", 0),)
            after = (Axis(f"{head}{resize}.weight", 1), Axis(f"{head}{resize}.bias", 0))
        found.append((Units(had, writes(project), between), keep))
        found.append((Units(had, after, reads(last)), keep))
    # The maps of all levels are added up: one choice of channels for the whole head.
    used = [("scratch.refinenet4", (2,)), *((f"scratch.refinenet{n}", (1, 2)) for n in (3, 2, 1))]
    residual = [f"{name}.resConfUnit{n}" for name, numbers in used for n in numbers]
    dead = "scratch.refinenet4.resConfUnit1"
    out = [f"{name}.out_conv" for name, _ in used]
    levels = tuple(Axis(f"{head}scratch.layer{n}_rn.weight", 0) for n in (1, 2, 3, 4))
    found.append(
        (
            Units(
                old.feature_dim,
                (*levels, *writes(*(f"{unit}.conv2" for unit in residual), *out)),
                reads(*(f"{unit}.conv1" for unit in residual), *out, "head.0"),
                (*writes(f"{dead}.conv2"), *reads(f"{dead}.conv1")),
            ),
            new.feature_dim,
        )
    )
    for unit in (*residual, dead):
        found.append((Units(old.feature_dim, writes(f"{unit}.conv1"), reads(f"{unit}.conv2")), new.feature_dim))
    found.append((Units(old.feature_dim // 2, writes("head.0"), reads("head.2")), new.feature_dim // 2))
    found.append((Units(old.last_dim, writes("head.2"), reads("head.4")), new.last_dim))
    return found
