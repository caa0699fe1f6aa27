"""Runners of the cases of parts: pooling, coding, schedule, time, single stages, heads, detections, pictures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pqk.families.detection.inputs import padded
from pqk.families.diffusiondet import preprocess as pictures
from pqk.families.diffusiondet.network.boxes import apply_deltas, as_signal, from_signal, to_corners
from pqk.families.diffusiondet.network.configs import read_config
from pqk.families.diffusiondet.network.head import DynamicConv, Head, time_waves
from pqk.families.diffusiondet.network.roialign import CELLS, box_levels, pool, pyramid
from pqk.families.diffusiondet.sampling import schedule
from pqk.families.diffusiondet.sampling.selection import Detections, rescale, select, suppress
from pqk.families.diffusiondet.vectors.common import (
    GRADIENT_MARK,
    NETWORK_MARK,
    gradients,
    head_of,
    maps_of,
    sizes,
    tensor,
)
from pqk.families.tape import Tape
from pqk.families.vectors import Case, Compared, compare

TABLE_MARK = 1e-9
"""Of float64 tables."""
STAGE_PARTS = {
    "attn": "self_attn",
    "norm1": "norm1",
    "dynconv": "inst_interact",
    "norm2": "norm2",
    "norm3": "norm3",
    "scale_shift": "block_time_mlp",
    "deltas": "bboxes_delta",
}
"""Name of an intermediate result -> the module whose output it is."""


def roialign(case: Case) -> Iterator[Compared]:
    """Levels and pooled features of boxes, and the gradients to the maps."""
    maps, boxes = maps_of(case, gradient=True), tensor(case, "in_boxes")
    yield case.check("out_level", box_levels(boxes))
    pooled = pool(pyramid(maps), boxes)
    cells = pooled.transpose(2, 3).unflatten(-1, (CELLS, CELLS))
    yield case.check("out_pooled", cells)
    given = {f"out_grad_p{level}": map_ for level, map_ in enumerate(maps, start=2)}
    for name, gradient in gradients((cells * tensor(case, "in_grad_pooled")).sum(), given).items():
        yield case.check(name, gradient, GRADIENT_MARK)


def codec(case: Case) -> Iterator[Compared]:
    """Boxes as signals and back, noise added and estimated, deltas applied."""
    width, height = case.need("image_wh")
    whwh, scale = sizes((height, width)), float(case.need("snr_scale"))
    t = tensor(case, "in_t")
    signal = as_signal(to_corners(tensor(case, "in_gt")) * whwh, whwh, scale)
    yield case.check("out_signal", signal)
    x = schedule.diffuse(signal, t, tensor(case, "in_noise"))
    yield case.check("out_x_t", x)
    yield case.check("out_boxes_abs", from_signal(x, whwh, scale))
    x0 = as_signal(tensor(case, "in_pred_abs"), whwh, scale).clamp(-scale, scale)
    yield case.check("out_x_start", x0)
    yield case.check("out_pred_noise", schedule.noise_in(x, x0, t))
    yield case.check("out_apply_deltas", apply_deltas(tensor(case, "in_delta_boxes"), tensor(case, "in_deltas")))


def noise_schedule(case: Case) -> Iterator[Compared]:
    """The twelve tables, the times of samplers and the coefficients of their steps."""
    for name, values in schedule.tables().items():
        yield case.check(f"out_{name}", values, TABLE_MARK)
    for steps, expected in case.need("time_pairs").items():
        pairs = schedule.time_pairs(int(steps))
        yield compare(f"time_pairs.{steps}", pairs, expected)
        rows = [schedule.ddim_coefficients(t, after, 1.0) for t, after in pairs if after >= 0]
        if f"out_ddim_coef_{steps}" in case:
            yield case.check(f"out_ddim_coef_{steps}", np.array(rows).reshape(-1, 3), TABLE_MARK)


def time(case: Case) -> Iterator[Compared]:
    """The time's waves, their MLP, and what a stage makes of it."""
    t, dim = tensor(case, "in_t"), case.need("config")["hidden_dim"]
    yield case.check("out_sinusoid", time_waves(t, dim))
    yield case.check("out_sinusoid_256", time_waves(t, 256))
    head = Head(read_config({"hidden_dim": dim, "nheads": 1, "num_heads": 1}))
    head.load_state_dict(case.weights("head."), strict=False)
    with torch.no_grad():
        found = head.time_mlp(t)
        yield case.check("out_time", found)
        yield case.check("out_scale_shift", head.head_series[0].get_submodule("block_time_mlp")(found))


def dynamic_conv(case: Case) -> Iterator[Compared]:
    """The dynamic convolution alone, with gradients."""
    config = case.need("config")
    layer = DynamicConv(config["hidden_dim"], config["dim_dynamic"])
    layer.load_state_dict(case.weights())
    known, features = (tensor(case, name).requires_grad_() for name in ("in_pro", "in_roi"))
    out = layer(known[None], features.flatten(2).transpose(1, 2)[None])[0]
    yield case.check("out", out)
    given = {"out_grad_pro": known, "out_grad_roi": features}
    for name, gradient in gradients((out * tensor(case, "in_grad_out")).sum(), given).items():
        yield case.check(name, gradient, GRADIENT_MARK)


def stage(case: Case) -> Iterator[Compared]:
    """One stage as the first one and as a later one, with its intermediate results."""
    head = head_of(case, num_heads=1)
    table, boxes = pyramid(maps_of(case)), tensor(case, "in_boxes")
    with torch.no_grad():
        embedding = head.time_mlp(tensor(case, "in_t"))
        yield case.check("mid_time", embedding)
        pooled = pool(table, boxes).transpose(2, 3).unflatten(-1, (CELLS, CELLS))
        yield case.check("mid_first.pooled", pooled)
        for name, known in (("first", None), ("later", tensor(case, "in_pro"))):
            with Tape(head.head_series[0]) as tape:
                logits, refined, after, _ = head.head_series[0](table, boxes, known, embedding)
            for part, module in STAGE_PARTS.items():
                yield case.check(f"mid_{name}.{part}", tape.only(module))
            yield case.check(f"out_{name}.logits", logits)
            yield case.check(f"out_{name}.boxes", refined)
            yield case.check(f"out_{name}.pro", after)


def whole_head(case: Case) -> Iterator[Compared]:
    """All stages, with gradients to the maps and to the boxes."""
    head, maps, boxes = head_of(case), maps_of(case, gradient=True), tensor(case, "in_boxes").requires_grad_()
    logits, refined = head(maps, boxes, tensor(case, "in_t"))
    yield case.check("out_logits", logits, NETWORK_MARK)
    yield case.check("out_boxes", refined, NETWORK_MARK)
    total = (logits * tensor(case, "in_grad_logits")).sum() + (refined * tensor(case, "in_grad_boxes")).sum()
    given = {f"out_grad_p{level}": map_ for level, map_ in enumerate(maps, start=2)} | {"out_grad_in_boxes": boxes}
    for name, gradient in gradients(total, given).items():
        if name in case:
            yield case.check(name, gradient, GRADIENT_MARK)


def postprocess(case: Case) -> Iterator[Compared]:
    """The best pairs of box and class, suppression by class, and the way to the picture's size."""
    scores, most = tensor(case, "in_logits").sigmoid(), case.need("num_proposals")
    best = select(scores, tensor(case, "in_boxes"), most)
    kept = suppress(best, case.need("nms_threshold"))
    yield from detections(case, "out_topk_{}", best)
    yield from detections(case, "out_nonms_{}", best)
    yield from detections(case, "out_nms_{}", kept)
    yield from detections(case, "out_final_{}", rescale(kept, case.need("image_hw"), case.need("output_hw")))


def detections(case: Case, name: str, found: Detections, mark: float = NETWORK_MARK) -> Iterator[Compared]:
    """Compares boxes, scores and labels; name: of the arrays, with a place for these words."""
    for field, value in found._asdict().items():
        yield case.check(name.format(field), value, mark)


def preprocess(case: Case) -> Iterator[Compared]:
    """The table of sizes, resized pictures and boxes, and a padded batch."""
    table = [pictures.official_size(*query) for query in case.need("size_queries")]
    yield case.check("out_size_table_h_w", table)
    resized = []
    for index, (height, width, short, long) in enumerate(case.need("image_queries")):
        resized.append(pictures.resized(case[f"in_image{index}"], short, long))
        yield case.check(f"out_resized{index}", resized[-1])
        output = pictures.official_size(height, width, short, long)
        boxes = pictures.resized_boxes(case[f"in_boxes{index}"], (height, width), output)
        yield case.check(f"out_boxes{index}", boxes)
    images = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in resized[:2]]
    batch, whwh = padded(images)
    yield case.check("out_batch", batch)
    yield case.check("out_whwh", whwh)


KINDS = {
    "diffusiondet_roialign": roialign,
    "diffusiondet_codec": codec,
    "diffusiondet_schedule": noise_schedule,
    "diffusiondet_time": time,
    "diffusiondet_dynconv": dynamic_conv,
    "diffusiondet_stage": stage,
    "diffusiondet_head": whole_head,
    "diffusiondet_postprocess": postprocess,
    "diffusiondet_preprocess": preprocess,
}
