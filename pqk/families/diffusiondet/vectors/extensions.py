"""Runners of the cases of extensions: class states, geometry in the attention, other losses, distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pqk.families.diffusiondet.network import attention
from pqk.families.diffusiondet.network.configs import StageSize
from pqk.families.diffusiondet.network.head import Head, Stage
from pqk.families.diffusiondet.sampling import labels as states
from pqk.families.diffusiondet.sampling.sampler import Sampling, Step, scores_of
from pqk.families.diffusiondet.training.distill import (
    consistency_terms,
    distill_terms,
    progressive_target,
    trajectory,
)
from pqk.families.diffusiondet.training.losses import LossOptions, Matched, iou_weights, stage_losses
from pqk.families.diffusiondet.vectors.common import (
    GRADIENT_MARK,
    NETWORK_MARK,
    gradients,
    head_of,
    maps_of,
    sizes,
    tensor,
)
from pqk.families.vectors import Case, Compared, compare

BIAS_MARK = 1e-4
"""Of the relation bias: a logarithm of sums of waves."""
UNIFORM_STEP = 0.37
"""What the uniform numbers of the case move by from one step to the next."""


def label_states(case: Case) -> Iterator[Compared]:
    """Class states: their schedule, noise, steps back and variational loss."""
    y0, t, logits = tensor(case, "in_y0"), tensor(case, "in_t"), tensor(case, "in_logits")
    classes = case.need("num_classes")
    for name in ("linear", "cosine"):
        yield case.check(f"out_alpha_{name}", states.known_share(name))
    noisy = states.corrupt(y0, t, tensor(case, "in_u"), classes, "linear")
    yield case.check("out_y_t", noisy)
    yield case.check("out_pi_t", states.corrupted_distribution(y0, t, classes, "linear"))
    clean = states.clean_distribution(logits)
    yield case.check("out_P", clean)
    y = noisy
    for step, (now, after) in enumerate(case.need("pairs")[:-1]):
        uniform = (tensor(case, "in_u2") + UNIFORM_STEP * step) % 1
        y = states.previous(y, clean, now, after, uniform, "linear")
        yield case.check(f"out_sample_step{step}", y)
        yield case.check(f"out_dist_step{step}", states.mixed(clean, states.share_at("linear", after)))
    yield case.check("out_vb_weight", states.variational_weight(t, "linear"))
    yield case.check("out_vb_loss", states.variational_loss(logits, y0, noisy, t, "linear"))


def geometry(case: Case) -> Iterator[Compared]:
    """Features of places and of pairs, the biases made of them, and the attention with each."""
    boxes, known, config = tensor(case, "in_boxes"), tensor(case, "in_pro"), case.need("config")
    dim, (width, height) = config["hidden_dim"], case.need("image_wh")
    whwh, pairs = sizes((height, width))[None], attention.pair_features(boxes)
    yield case.check("mid_sine", attention.place_waves(boxes, whwh, dim))
    yield case.check("mid_pair", pairs)
    yield case.check("mid_relation64", attention.relation_waves(pairs)[:, :4], BIAS_MARK)

    def stage(bias: str | None = None, nearest: int = 0) -> Stage:
        made = Stage(StageSize(dim, config["nheads"], 4, 4, 4, 0, 0, geometry=True, bias=bias, nearest=nearest))
        own = case.weights() | ({} if bias is None else case.weights(f"{bias}."))
        names = made.state_dict().keys()
        made.load_state_dict({name: value for name, value in own.items() if name in names}, strict=False)
        return made

    with torch.no_grad():
        yield case.check("out_geo_feat", stage().geo_feat(attention.place_waves(boxes, whwh, dim)))
        yield case.check("out_attn_plain", stage().attended(known, boxes))
        for bias, mark in (("relation", BIAS_MARK), ("mlp", NETWORK_MARK)):
            biased = stage(bias)
            yield case.check(f"out_bias_{bias}", attention.bias_of(biased.geo_bias, boxes), mark)
            yield case.check(f"out_attn_{bias}", biased.attended(known, boxes), mark)
        for nearest in (3, 17):
            yield case.check(f"out_mask_k{nearest}", attention.nearest_mask(boxes, nearest))
            yield case.check(f"out_attn_knn{nearest}", stage(None, nearest).attended(known, boxes))
            yield case.check(f"out_attn_mlp_knn{nearest}", stage("mlp", nearest).attended(known, boxes))


def losses(case: Case) -> Iterator[Compared]:
    """Quality focal loss, weights by IoU, quality head and scores, for rows whose truths are given."""
    logits, boxes, quality = (
        tensor(case, name)[None].requires_grad_() for name in ("in_logits", "in_boxes", "in_quality_logits")
    )
    rows = tensor(case, "in_matched").bool().nonzero()[:, 0]
    whwh = torch.tensor(case.need("whwh"), dtype=torch.float32).expand(len(rows), 4)
    matched = Matched(torch.zeros_like(rows), rows, tensor(case, "in_class")[rows], tensor(case, "in_gt")[rows], whwh)
    found = stage_losses(logits, boxes, matched, LossOptions(class_loss="qfl"), quality)
    for name, value, given in (("qfl", found["loss_ce"], logits), ("quality", found["loss_quality"], quality)):
        yield case.check(f"out_{name}", value)
        gradient = gradients(value, {name: given})[name][0]
        yield case.check(f"out_grad_{name}", gradient, GRADIENT_MARK)
    iou = tensor(case, "mid_iou")[rows]
    for name in case.names("out_weight_u"):
        power = name.removeprefix("out_weight_u")
        yield case.check(name, iou_weights(iou, float(power)))
        found = stage_losses(logits, boxes, matched, LossOptions(iou_power=float(power)))
        yield case.check(f"out_l1_u{power}", found["loss_bbox"])
        yield case.check(f"out_giou_u{power}", found["loss_giou"])
        gradient = gradients(found["loss_bbox"] + found["loss_giou"], {"boxes": boxes})["boxes"][0]
        yield case.check(f"out_grad_box_u{power}", gradient, GRADIENT_MARK)
    how = Sampling(1, logits.shape[1], 2.0, quality_scores=True)
    yield case.check("out_reweighted_scores", scores_of(logits[0], quality[0], how))


def distillation(case: Case) -> Iterator[Compared]:
    """Deterministic samplers of teacher and student, what sets them apart with gradients, and other targets."""
    teacher, student = (head_of(case, f"{who}.head.") for who in ("teacher", "student"))
    maps, whwh, start = maps_of(case), sizes(case.need("image_hw")), tensor(case, "in_noise_init")[0]
    scale, most = case.need("config")["snr_scale"], case.need("topk")

    def call(head: Head) -> Callable[[Tensor, int, Tensor | None], tuple[Tensor, ...]]:
        return lambda boxes, t, _: tuple(each[-1, 0] for each in head(maps, boxes[None], t))

    def run(head: Head, steps: int) -> list[Step]:
        return trajectory(call(head), whwh, start, steps, scale)

    with torch.no_grad():
        taught = {steps: run(teacher, steps) for steps in (20, 4)}
    for steps, path in taught.items():
        yield case.check(f"out_teacher{steps}.logits", path[-1].logits[None], NETWORK_MARK)
        yield case.check(f"out_teacher{steps}.boxes", path[-1].boxes[None], NETWORK_MARK)
        for index, step in enumerate(path):
            for name, value in (("x", step.x), ("logits", step.logits), ("boxes", step.boxes)):
                if f"out_teacher{steps}_pair{index}.{name}" in case:
                    yield case.check(f"out_teacher{steps}_pair{index}.{name}", value[None], NETWORK_MARK)
    for name, norms in case.need("grad_norms").items():
        many, few = map(int, name.split("to"))
        terms = distill_terms(run(student, few), taught[many], whwh, most)
        for number, chosen in enumerate(terms.chosen):
            yield case.check(f"mid_{name}_step{number}.J", chosen[None])
        yield case.check(f"out_{name}.cls", terms.classes, NETWORK_MARK)
        yield case.check(f"out_{name}.box", terms.boxes, NETWORK_MARK)
        grown = gradients(terms.classes + terms.boxes, dict(student.named_parameters()))
        for key, norm in norms.items():
            yield compare(f"grad_norms.{name}.{key}", float(grown[key].norm()), norm, GRADIENT_MARK)
    path = taught[4]
    found = progressive_target(path[0].x, path[0].t, path[2].x, path[2].t)
    yield case.check("out_x0_tilde_999_to_499", found[None], NETWORK_MARK)
    times = case.need("consistency")
    x0, noise = (tensor(case, f"in_cons_{name}")[0] for name in ("x0", "noise"))
    pair = (times["t"], times["t_next"])
    terms, after = consistency_terms(call(student), call(student), call(teacher), x0, noise, pair, whwh, scale, most)
    yield case.check("mid_cons_x_next", after[None], NETWORK_MARK)
    yield case.check("mid_cons_J", terms.chosen[0][None])
    yield case.check("out_cons_box", terms.boxes, NETWORK_MARK)
    yield case.check("out_cons_cls", terms.classes, NETWORK_MARK)


KINDS = {
    "diffusiondet_ext_d3pm": label_states,
    "diffusiondet_ext_geo": geometry,
    "diffusiondet_ext_losses": losses,
    "diffusiondet_ext_distill": distillation,
}
