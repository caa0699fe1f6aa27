"""Pruning, distillation and quantization in one training run.

While gates are driven from open to shut, the network already rounds as its int8 engine will and learns from the float
Teacher. Then what is shut is cut out, and what is left is trained on in the same way, with ranges calibrated anew.
The toolchain prepares the modules of both phases; see `pqk.recipe.joint`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqk.compress.cut.cost import FLOPS_SIDE, Costs
from pqk.compress.cut.gates import Gated, Layout, Price, fold, kept_units, layouts_of, shut, starting_logits
from pqk.compress.cut.importance import taylor
from pqk.compress.cut.prune import Removed, removed_units
from pqk.compress.cut.refit import moments, refit, rendered
from pqk.compress.cut.units import Slot, cut, groups_of, slots_of
from pqk.compress.finetune import task_loss
from pqk.compress.qat import Quantized, imitation_loss, qat, training_of
from pqk.compress.train.fit import Fitted, Stop, fit
from pqk.compress.train.loop import Progress
from pqk.compress.train.pairs import SymmetricPairs, scenery
from pqk.data.render.stream import PairBatch
from pqk.errors import PqkError
from pqk.families.cutting import CuttingPart
from pqk.families.dust3r.losses import confidence_loss
from pqk.families.dust3r.model import Dust3r
from pqk.models import build_model
from pqk.settings.joint import Joint
from pqk.settings.quant import Qat
from pqk.settings.seeds import LIMIT
from pqk.settings.training import Fit

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class JointReport:
    """What the gates left. FLOPs are those of one pair of flops_side x flops_side images, two per multiply-add.

    share: of the FLOPs that is gone. gates: how many there were; undecided: of them those between 0.05 and 0.95
    when they were cut. gated_cut: the share at the end of their phase, each gate counting by how far it was shut.
    """

    flops_cut: float
    measure: str
    share: float
    params_before: int
    params_after: int
    flops_before: int
    flops_after: int
    flops_side: int
    gates: int
    undecided: int
    gated_cut: float
    removed: list[Removed]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class GatePlan:
    """The gates of a network: their units, in the order of importance, and their logits at the start.

    seed: of the training pairs of the importance. On one CPU the same arguments give the same gates.
    """

    def __init__(
        self,
        teacher: Dust3r,
        spec: Joint,
        cutting: CuttingPart,
        *,
        seed: int,
        importance: dict[str, Tensor] | None = None,
    ) -> None:
        """importance: what `taylor` gave before, to spare its time. Raises PqkError when flops_cut is too much."""
        self.spec, self.seed, self.cutting = spec, seed, cutting
        kinds = {name for name, allowed in spec.units if allowed}
        self.slots: list[Slot] = slots_of(teacher, kinds, spec.round_to, cutting)
        if importance is None:
            working = copy.deepcopy(teacher).requires_grad_(True).eval()
            loss_of = partial(task_loss, alpha=training_of(spec.train).alpha)
            importance = taylor(working, groups_of(self.slots), self.samples(), loss_of)
        self.importance = importance
        self.layouts: list[Layout] = layouts_of(teacher, self.slots, importance, cutting)
        self.starts = starting_logits(self.layouts, spec.gates.start, spec.gates.spread)
        self.total = Costs(teacher, self.slots, cutting)({}).flops
        shut(self.layouts, self.starts, self.total, spec.flops_cut)  # what cannot be reached is told before training

    def samples(self) -> Iterator[PairBatch]:
        """The training pairs of the importance, and of the refit."""
        some, device = self.spec.samples, torch.device("cpu")
        return rendered(some.pairs, some.size, self.seed, device, scenery(training_of(self.spec.train)))

    def into(self, encoder: nn.Module, decoder: nn.Module) -> Gated:
        """Put the gates into the prepared modules."""
        pace = self.spec.gates.rate / self.spec.train.lr
        return Gated(self.layouts, (encoder, decoder), self.total, self.starts, pace)


def phases(spec: Joint) -> tuple[Fit, Qat]:
    """The two phases as trainings: the first one's rate stays after its warm-up, the second one's falls to a tenth."""
    first = training_of(spec.train.model_copy(update={"epochs": spec.gates.epochs}))
    rest = spec.train.model_copy(update={"epochs": spec.train.epochs - spec.gates.epochs, "warmup_epochs": 0})
    return first.model_copy(update={"final_rate": first.learning_rate}), rest


def close_gates(
    parts: Mapping[str, nn.Module],
    plan: GatePlan,
    teacher: Dust3r,
    *,
    scratch: Path,
    device: str = "cpu",
    stop: Stop | None = None,
    report: Report | None = None,
) -> tuple[Fitted, Gated, dict[str, Tensor]]:
    """The first phase: train the prepared modules, in place, with gates that shut until plan.spec.flops_cut is gone.

    parts: what a quantizer's `prepare` made of each graph's module, without gates. The loss is that of
    `pqk.compress.qat.qat` and the price of the FLOPs that are still to go. The target goes in a line from what the
    gates cut at the start to flops_cut, at gates.ramp of the phase; the slope rises geometrically over the whole of it.
    Returns what `fit` does, the gates as they ended, and the averaged float weights by their names in the Teacher.
    """
    spec, training = plan.spec, phases(plan.spec)[0]
    gated = plan.into(parts["encoder"], parts["decoder"])
    model = Quantized(parts["encoder"], parts["decoder"], teacher.sizes.patch_size)
    price = Price(spec.gates.penalty, spec.gates.dual_rate)
    began = float(gated.cut().detach())
    guide = SymmetricPairs(teacher).eval()

    def loss_of(module: nn.Module, pairs: PairBatch, share: float) -> Tensor:
        gated.steepen(spec.gates.slope**share)
        with torch.no_grad():
            aim = guide(pairs.images)
        got = module(pairs.images)
        with torch.autocast(pairs.images.device.type, enabled=False):
            loss = imitation_loss(got, aim, training.alpha)
            if spec.train.task_weight:
                loss = loss + spec.train.task_weight * confidence_loss(got, *pairs.ordered(), training.alpha)[0]
            target = began + (spec.flops_cut - began) * min(1.0, share / spec.gates.ramp)
            return loss + price(gated.cut(), target)

    fitted = fit(
        model,
        training,
        loss_of,
        seed=plan.seed,
        scratch=scratch,
        device=device,
        teacher=teacher,
        extra=price,
        stop=stop,
        report=report,
    )
    # not the best weights, which are those of open gates, but the last: what fit keeps in its checkpoint
    last = torch.load(scratch / "checkpoint.pt", map_location="cpu", weights_only=True)["ema"]
    model.cpu().load_state_dict(
        {name.removeprefix("model."): v for name, v in last.items() if name.startswith("model.")}
    )
    gated.steepen(spec.gates.slope)
    return fitted, gated, float_weights(model, teacher)


def float_weights(model: Quantized, like: Dust3r) -> dict[str, Tensor]:
    """The weights of both prepared modules without their quantizers, by their names in a model of the same sizes.

    Weights that neither graph has are those of `like`.
    """
    found = {**model.encoder.state_dict(), **model.decoder.state_dict()}
    return {name: found.get(name, value).detach().cpu().clone() for name, value in like.state_dict().items()}


def cut_gates(teacher: Dust3r, weights: dict[str, Tensor], plan: GatePlan, gated: Gated) -> tuple[Dust3r, JointReport]:
    """A float network without the units whose gates are shut; the others' gates go into the weights that read them.

    weights: float ones, by their names in the Teacher. The lowest gates go, until plan.spec.flops_cut is reached.
    Raises PqkError when that cannot be, and when a weight is not finite.
    """
    spec, logits, factors = plan.spec, gated.logits(), gated.factors()
    working = build_model(teacher.family, teacher.config, weights).eval()
    if not all(bool(torch.isfinite(weight).all()) for weight in working.parameters()):
        raise PqkError("the weights are no longer finite after the phase with gates; lower joint.train.lr")
    fold(working, plan.layouts, factors)
    units, keep = kept_units(plan.layouts, shut(plan.layouts, logits, plan.total, spec.flops_cut))
    if spec.refit:
        images = (pair.images for pair in plan.samples())
        known = moments(working, groups_of(plan.slots), images, spec.samples.pairs)
        for group in groups_of([slot for slot in plan.slots if slot.name in units]):
            refit(working, group, keep[group.name], known)
    small = cut(working, plan.slots, units, keep, plan.cutting).eval()
    costs = Costs(teacher, plan.slots, plan.cutting)
    before, after = costs({}), costs(units)
    every = torch.cat([factor[1:] for factor in factors])
    report = JointReport(
        flops_cut=spec.flops_cut,
        measure="FLOPs",
        share=1 - after.flops / before.flops,
        params_before=before.params,
        params_after=after.params,
        flops_before=before.flops,
        flops_after=after.flops,
        flops_side=FLOPS_SIDE,
        gates=len(every),
        undecided=int(((every > 0.05) & (every < 0.95)).sum()),
        gated_cut=float(gated.cut().detach()),
        removed=removed_units(plan.slots, units, costs, plan.importance, keep, {}),
    )
    return small, report


def settle(
    parts: Mapping[str, nn.Module],
    teacher: Dust3r,
    spec: Joint,
    *,
    seed: int,
    scratch: Path,
    device: str = "cpu",
    stop: Stop | None = None,
    report: Report | None = None,
) -> Fitted:
    """The second phase: train what the cut network was prepared as, taught by the whole float Teacher; see `qat`."""
    return qat(
        parts,
        teacher,
        phases(spec)[1],
        seed=(seed + LIMIT // 2) % LIMIT,  # other pairs than those of the first phase
        scratch=scratch,
        device=device,
        stop=stop,
        report=report,
    )


@dataclass(frozen=True)
class Whole:
    """Progress of a phase as that of the whole run: `first` steps of it are over, in `seconds`.

    gates: in the phase with gates the network is worse from validation to validation by design, so rules see the last
    one alone.
    """

    spec: Joint
    gates: bool
    seconds: float = 0.0

    def __call__(self, p: Progress) -> Progress:
        steps = self.spec.train.steps_per_epoch
        first = 0 if self.gates else self.spec.gates.epochs * steps
        step = first + p.step
        shown: Sequence[dict[str, float]] = p.history[-1:] if self.gates else p.history
        history = [{**entry, "step": first + entry["step"]} for entry in shown]
        share = min(1.0, step / (self.spec.train.epochs * steps))
        return replace(p, step=step, seconds=self.seconds + p.seconds, share=share, history=history)
