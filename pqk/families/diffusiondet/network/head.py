"""Defines the head: stages that refine boxes by what lies in them, told how noisy the boxes are by a time.

Chen et al. 2023 (DiffusionDet), on the stages of Sun et al. 2021 (Sparse R-CNN). Names of all weights are those of the
official checkpoints. B images, N boxes each, C channels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.errors import PqkError
from pqk.families.diffusiondet.network import attention
from pqk.families.diffusiondet.network.boxes import apply_deltas, widened
from pqk.families.diffusiondet.network.configs import DiffusionDetConfig, StageSize
from pqk.families.diffusiondet.network.roialign import CELLS, Joined, Pooler, Pyramid, pyramid

NORM_EPS = 1e-5
TIME_BASE = 10_000.0
MAPS = ("p2", "p3", "p4", "p5")


def time_waves(t: Tensor, dim: int) -> Tensor:
    """Returns sines, then cosines of times t (B,): (B, dim). Frequencies 10000^(-i / (dim / 2 - 1)), i from 0."""
    count = dim // 2
    t = widened(t)
    rate = torch.exp(torch.arange(count, device=t.device, dtype=t.dtype) * (-math.log(TIME_BASE) / max(1, count - 1)))
    angle = t[:, None] * rate
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class TimeWaves(nn.Module):
    """`time_waves` as the first layer of the time MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return time_waves(t, self.dim)


class Refine(nn.Module):
    """`apply_deltas` as a module, so that the nodes of an exported graph are named after it."""

    def forward(self, boxes: Tensor, deltas: Tensor) -> Tensor:
        return apply_deltas(boxes, widened(deltas))  # growth times width is too large for float16


class DynamicConv(nn.Module):
    """Mixes the features in a box by matrices made of what is known: (B, N, C), (B, N, 49, C) -> (B, N, C)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.dim, self.inner = dim, inner
        self.dynamic_layer = nn.Linear(dim, 2 * dim * inner)
        self.norm1 = nn.LayerNorm(inner, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.out_layer = nn.Linear(CELLS * CELLS * dim, dim)
        self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, p: Tensor, features: Tensor) -> Tensor:
        first, second = self.dynamic_layer(p).split(self.dim * self.inner, dim=-1)
        x = F.relu(self.norm1(features @ first.reshape(p.shape[0], p.shape[1], self.dim, self.inner)))
        x = F.relu(self.norm2(x @ second.reshape(p.shape[0], p.shape[1], self.inner, self.dim)))
        return F.relu(self.norm3(self.out_layer(x.flatten(-2))))


class Stage(nn.Module):
    """One refinement: boxes and what is known of them -> class logits, new boxes, and what is known then."""

    def __init__(self, size: StageSize) -> None:
        super().__init__()
        dim = size.dim
        self.size, self.skipped = size, False  # skipped: the head runs without this stage
        self.pooler, self.refine = Pooler(), Refine()
        self.self_attn = attention.Attention(dim, size.heads)
        self.inst_interact = DynamicConv(dim, size.dynamic)
        self.linear1 = nn.Linear(dim, size.ffn)
        self.linear2 = nn.Linear(size.ffn, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=NORM_EPS) for _ in range(3))
        self.block_time_mlp = nn.Sequential(nn.SiLU(), nn.Linear(4 * dim, 2 * dim))
        self.cls_module = _tower(dim, size.cls_layers)
        self.reg_module = _tower(dim, size.reg_layers)
        self.class_logits = nn.Linear(dim, size.classes)
        self.bboxes_delta = nn.Linear(dim, 4)
        if size.geometry:
            self.geo_feat = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        if size.bias is not None:
            self.geo_bias = attention.geometry_bias(size.bias, size.heads)
        if size.quality:
            self.quality_logit = nn.Linear(dim, 1)

    def forward(
        self,
        table: Pyramid,
        boxes: Tensor,
        known: Tensor | None,
        time: Tensor,
        whwh: Tensor | None = None,
        added: Tensor | None = None,
        classes: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """Returns logits (B, N, K), boxes (B, N, 4), what is known (B, N, C) and the quality logits (B, N) or None.

        table: the maps. boxes: corners in pixels. known: of the stage before; None in the first one, which begins with
        the mean of the features in a box. time: embedding (B, 4 C). whwh: sizes of the images (B, 4), which only place
        features need. added: to what is known at first (B, N, C). classes: False leaves out both kinds of logits.
        """
        features = self.pooler(table, boxes)
        p = features.mean(dim=2) if known is None else known
        if added is not None:
            p = p + added
        if self.size.geometry:
            if whwh is None:
                raise PqkError("a network with geo_feat needs the sizes of the images: give whwh")
            p = p + self.geo_feat(attention.place_waves(boxes, whwh, self.size.dim))
        p = self.norm1(p + self.attended(p, boxes)) if self.size.attends else self.norm1(p)
        p = self.norm2(p + self.inst_interact(p, features))
        p = self.norm3(p + self.linear2(F.relu(self.linear1(p))))
        scale, shift = self.block_time_mlp(time)[:, None].split(self.size.dim, dim=-1)
        f = p * (1 + scale) + shift
        boxed = self.reg_module(f)
        refined = self.refine(boxes, self.bboxes_delta(boxed))
        if not classes:
            return None, refined, p, None
        quality = self.quality_logit(boxed)[..., 0] if self.size.quality else None
        return self.class_logits(self.cls_module(f)), refined, p, quality

    def attended(self, p: Tensor, boxes: Tensor) -> Tensor:
        """Returns the attention among boxes, with the bias and to the neighbours that the configuration asks for."""
        bias = None if self.size.bias is None else attention.bias_of(self.geo_bias, boxes)
        if 0 < self.size.nearest < boxes.shape[1]:
            others = ~attention.nearest_mask(boxes, self.size.nearest)[:, None]
            bias = torch.zeros_like(p[:, None, :, :1]) if bias is None else bias
            bias = bias.masked_fill(others, -torch.inf)
        return self.self_attn(p, bias)


class LabelTable(nn.Module):
    """What each class, and the mask after them, adds to the features of a box: weight (K + 1, C)."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes + 1, dim))

    def forward(self, labels: Tensor) -> Tensor:
        """labels: classes (B, N) int64, or distributions (B, N, K + 1)."""
        return labels.to(self.weight.dtype) @ self.weight if labels.is_floating_point() else self.weight[labels]


class Head(nn.Module):
    """All stages: maps and noisy boxes -> class logits and boxes of every stage."""

    def __init__(self, sizes: DiffusionDetConfig) -> None:
        super().__init__()
        dim = sizes.stage.dim
        self.label_state = sizes.label_state
        self.time_mlp = nn.Sequential(TimeWaves(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))
        self.pyramid = Joined()
        self.head_series = nn.ModuleList(Stage(size) for size in sizes.head)
        if sizes.label_state is not None:
            self.label_embed = LabelTable(sizes.stage.classes, dim)

    def forward(
        self,
        maps: Sequence[Tensor] | Mapping[str, Tensor],
        boxes: Tensor,
        t: Tensor | int,
        labels: Tensor | None = None,
        whwh: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns logits (stages, B, N, K) and boxes (stages, B, N, 4); of a network with a quality head also its
        logits (stages, B, N).

        maps: p2 ... p5 in their order or by name, (B, C, h, w) each. boxes: corners in pixels (B, N, 4). t: times 0 ...
        999 (B,), or one for all. labels: class states (B, N) int64, K being the mask, or distributions (B, N, K + 1);
        None: all masked. whwh: w, h, w, h of the images (B, 4), needed with `geo_feat` alone. Boxes get no gradient
        from one stage to the next.
        """
        listed = [maps[name] for name in MAPS] if isinstance(maps, Mapping) else list(maps)
        return tuple(torch.stack(each) for each in zip(*self.stages(listed, boxes, t, labels, whwh), strict=True))

    def last(
        self, maps: Sequence[Tensor], boxes: Tensor, t: Tensor, labels: Tensor | None, whwh: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Returns what `forward` does of the last stage alone, by the operations of an exported graph and no other."""
        return self.stages(maps, boxes, t, labels, whwh, exported=True)[-1]

    def stages(
        self,
        maps: Sequence[Tensor],
        boxes: Tensor,
        t: Tensor | int,
        labels: Tensor | None = None,
        whwh: Tensor | None = None,
        exported: bool = False,
    ) -> list[tuple[Tensor, ...]]:
        """Returns logits (B, N, K), boxes (B, N, 4) and, where there are some, quality logits (B, N) of each stage.

        Arguments as of `forward`. exported: only the last stage has logits and is returned; see also `Pyramid`.
        """
        table = pyramid(maps, exported, self.pyramid)
        boxes = widened(boxes)
        times = torch.as_tensor(t, device=boxes.device).reshape(-1)
        if times.shape[0] != boxes.shape[0]:  # an export could not tell the shape
            times = times.expand(boxes.shape[0])
        time = self.time_mlp(times)
        added = self.label_term(labels, boxes)
        known: Tensor | None = None
        found: list[tuple[Tensor, ...]] = []
        stages = [stage for stage in self.head_series if not stage.skipped]
        for number, stage in enumerate(stages, start=1):
            classes = not exported or number == len(stages)
            logits, refined, known, quality = stage(table, boxes, known, time, whwh, added, classes)
            if logits is not None:
                found.append((logits, refined) if quality is None else (logits, refined, quality))
            boxes, added = refined.detach(), None
        return found

    def label_term(self, labels: Tensor | None, boxes: Tensor) -> Tensor | None:
        """Returns what the class states add to the features of boxes (B, N, C); None without a table of classes."""
        if self.label_state is None:
            return None
        if labels is None:
            return self.label_embed.weight[-1].expand(*boxes.shape[:2], -1)
        return self.label_embed(labels)


def _tower(dim: int, layers: int) -> nn.Sequential:
    """Returns so many times a linear layer without bias, a norm and a relu."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim, eps=NORM_EPS), nn.ReLU()]
    return nn.Sequential(*parts)
