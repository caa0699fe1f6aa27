"""A smaller network made of a Teacher's own layers: fewer blocks, heads, MLP channels and DPT channels.

What is kept of a width is what matters most by size: a unit (a head, a channel) weighs `norm of the weights that write
it * norm of the weights that read it`, both L2. What goes is not lost altogether: on a few rendered pairs, every layer
that read a unit learns by least squares to take its values from the kept ones. The widths of the token streams are
never cut, so blocks can be left out and everything still fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pqk.data.render.stream import training_pairs
from pqk.data.render.synthetic import texture_bank
from pqk.errors import PqkError
from pqk.families.dust3r.configs import BlockSize, DptSize
from pqk.families.dust3r.learning import SymmetricPairs
from pqk.models import build_model
from pqk.settings.distill import StudentCut
from pqk.settings.seeds import INDICES, LIMIT, split_seed

FEWEST_FOR_DPT = 3
"""Decoder blocks that a DPT head needs, see `dpt_hooks`."""
FFN_STEP, DPT_STEP = 16, 8
"""Cut widths are multiples of these where the Teacher's are: kernels waste the rest."""

SAMPLES = 2048
"""Places of a map, or tokens of an image, that are looked at in one input of a layer."""
RIDGE = 1e-5
"""Of the mean square of a channel: added to the diagonal where channels are fitted."""

Weights = dict[str, Tensor]
Moments = Mapping[str, Tensor]
"""Layer -> (C + 1, C + 1): mean products of its C input channels and a constant 1; float32, as there may be many."""


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

    def places(self, units: int, chosen: Tensor) -> Tensor:
        """Indices along the axis that belong to the chosen units."""
        return (
            torch.arange(self.copies * units * self.width).reshape(self.copies, units, self.width)[:, chosen].flatten()
        )


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

    def cut(self, weights: Weights, keep: int, moments: Moments) -> None:
        """Leave the `keep` most important units, in their old order; readers in `moments` are adapted to that."""
        if keep == self.count:
            return
        kept = self.importance(weights).argsort(descending=True, stable=True)[:keep].sort().values
        for axis in self.reads:
            layer = axis.key.removesuffix(".weight")
            if layer in moments:
                _fold(weights, layer, axis.dim, axis.places(self.count, kept), moments[layer])
        for axis in (*self.writes, *self.reads, *self.follows):
            weights[axis.key] = weights[axis.key].index_select(axis.dim, axis.places(self.count, kept))


def _fold(weights: Weights, layer: str, dim: int, kept: Tensor, moments: Tensor) -> None:
    """Change a layer's weights on the kept inputs (and its bias) so that it makes up for the others.

    With x_R ~ A x_K + c fitted by ridge regression, W_R x_R + W_K x_K ~ (W_K + W_R A) x_K + W_R c.
    """
    weight, bias = weights[f"{layer}.weight"], weights.get(f"{layer}.bias")
    inputs = len(moments) - 1
    gone = torch.ones(inputs, dtype=torch.bool)
    gone[kept] = False
    # a transposed convolution adds a constant at some places only: its bias cannot take it
    known = torch.cat([kept, torch.tensor([inputs])]) if bias is not None and dim == 1 else kept
    moments = moments.double()
    square = moments[known][:, known]
    ridge = RIDGE * moments.diagonal()[:-1].mean().clamp_min(1e-12)  # there are layers whose inputs are all 0
    square = square + ridge * torch.eye(len(known), dtype=square.dtype)
    fitted = torch.linalg.solve(square, moments[known][:, :-1][:, gone])  # (known, gone)
    split = weight.movedim(dim, 0).double()
    extra = torch.tensordot(fitted, split[gone], dims=1)  # (known, ...)
    changed = split.clone()
    changed[kept] += extra[: len(kept)]
    weights[f"{layer}.weight"] = changed.movedim(0, dim).to(weight.dtype)
    if bias is not None and len(known) > len(kept):
        constant = extra[-1].flatten(1).sum(1) if extra.dim() > 2 else extra[-1]
        weights[f"{layer}.bias"] = bias + constant.to(bias.dtype)


@torch.no_grad()
def input_moments(model: Any, layers: Iterable[str], images: Tensor) -> dict[str, Tensor]:
    """Moments of the inputs of the named linear and convolution layers, over pairs (B, 2, 3, H, W) in both orders."""
    modules = dict(model.named_modules())
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0] if isinstance(module, nn.Linear) else args[0].flatten(2).transpose(1, 2)
            # an odd step, as one that divides the width of a map would look at the same few columns of every row
            x = x[:, :: -(-x.shape[1] // SAMPLES) | 1].flatten(0, 1).float()
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            sums[name] = sums.get(name, 0) + (x.T @ x).cpu()
            counts[name] = counts.get(name, 0) + len(x)

        return look

    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in sorted(set(layers))]
    try:
        pairs = SymmetricPairs(model)
        for pair in images:
            pairs(pair[None])
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


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
    With cut.fold_pairs, the layers that read what was cut are adapted on as many pairs, rendered from the train split;
    the result is the same at every call.
    Raises PqkError for a family other than DUSt3R.
    """
    if getattr(teacher, "family", None) != "dust3r":
        raise PqkError(f"students are made of DUSt3R models, not of {getattr(teacher, 'family', type(teacher))!r}")
    sizes = teacher.sizes
    weights = {key: value.detach().cpu() for key, value in teacher.state_dict().items() if ".layer_rn." not in key}
    config = dict(teacher.config)
    enc_kept, dec_kept = kept_blocks(teacher, cut)
    plan: list[tuple[Units, int]] = []
    for stack, part, blocks, kept in (
        ("enc_blocks", "enc", sizes.enc_blocks, enc_kept),
        ("dec_blocks", "dec", sizes.dec_blocks, dec_kept),
        ("dec_blocks2", "dec", sizes.dec_blocks2, dec_kept),
    ):
        config[stack] = []
        for index in kept:
            size = blocks[index]
            heads, ffn = remaining(size.heads, cut.heads), remaining(size.ffn, cut.ffn, FFN_STEP)
            plan += [(units, heads) for units in _head_units(f"{stack}.{index}.", part == "dec", size)]
            plan.append((_mlp_units(f"{stack}.{index}.", size), ffn))
            config[stack].append({"heads": heads, "ffn": ffn})
        config[f"{part}_depth"], config[f"{part}_head_dim"] = len(kept), blocks[0].head_dim
    if sizes.dpt is not None:
        wanted = DptSize(
            remaining(sizes.dpt.feature_dim, cut.dpt, DPT_STEP, least=2) // 2 * 2,
            remaining(sizes.dpt.last_dim, cut.dpt, DPT_STEP),
            tuple(remaining(dim, cut.dpt, DPT_STEP) for dim in sizes.dpt.layer_dims),  # type: ignore[arg-type]
        )
        plan += [pair for n in (1, 2) for pair in _dpt_units(f"downstream_head{n}.dpt.", sizes.dpt, wanted)]
        config["dpt"] = {
            "feature_dim": wanted.feature_dim,
            "last_dim": wanted.last_dim,
            "layer_dims": list(wanted.layer_dims),
        }
    moments = _moments_for(teacher, [units for units, keep in plan if keep < units.count], cut)
    for units, keep in plan:
        units.cut(weights, keep, moments)
    for stack, kept in (("enc_blocks", enc_kept), ("dec_blocks", dec_kept), ("dec_blocks2", dec_kept)):
        _renumber(weights, stack, kept)
    student: nn.Module = build_model("dust3r", config, weights).eval()
    return student


def _moments_for(teacher: Any, cut_units: list[Units], cut: StudentCut) -> Moments:
    """Moments of what the readers of these units see, on pairs that no training draws before its millionth step."""
    if not cut.fold_pairs or not cut_units:
        return {}
    device = teacher.mask_token.device
    seed = split_seed("train", LIMIT - 1, INDICES - 1)
    images = training_pairs(cut.fold_pairs, cut.fold_size, seed, texture_bank().to(device)).images
    layers = {axis.key.removesuffix(".weight") for units in cut_units for axis in units.reads}
    return input_moments(teacher, layers, images)


def _renumber(weights: Weights, stack: str, kept: list[int]) -> None:
    """Leave only the kept blocks of a stack, as blocks 0, 1, 2, ..."""
    old = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{stack}.")}
    for new, index in enumerate(kept):
        prefix = f"{stack}.{index}."
        weights.update(
            {f"{stack}.{new}.{key.removeprefix(prefix)}": w for key, w in old.items() if key.startswith(prefix)}
        )


def _head_units(block: str, crossed: bool, size: BlockSize) -> list[Units]:
    """The heads of self-attention, whose projection is fused (q | k | v, each head by head), and of cross-attention."""

    def units(writes: list[tuple[str, int]], read: str) -> Units:
        axes = tuple(
            Axis(f"{block}{key}.{w}", 0, copies, size.head_dim) for key, copies in writes for w in ("weight", "bias")
        )
        return Units(size.heads, axes, (Axis(f"{block}{read}.weight", 1, 1, size.head_dim),))

    found = [units([("attn.qkv", 3)], "attn.proj")]
    if crossed:
        found.append(units([(f"cross_attn.proj{x}", 1) for x in "qkv"], "cross_attn.proj"))
    return found


def _mlp_units(block: str, size: BlockSize) -> Units:
    writes = (Axis(f"{block}mlp.fc1.weight", 0), Axis(f"{block}mlp.fc1.bias", 0))
    return Units(size.ffn, writes, (Axis(f"{block}mlp.fc2.weight", 1),))


def _dpt_units(head: str, old: DptSize, new: DptSize) -> list[tuple[Units, int]]:
    """Every width of one DPT head with what is to stay of it; see `pqk/families/dust3r/dpt.py` for the layers."""

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
