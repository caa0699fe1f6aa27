"""Prunes, distills and quantizes a network in one training run: `close_gates`, `cut_gates`, `settle`.

Phase 1 drives gates on heads and hidden units from open to shut. The network already rounds like its int8 engine, and
learns from the float Teacher. Then the units with shut gates are cut out. Phase 2 trains the smaller network in the
same way, with newly calibrated ranges. The toolchain prepares the modules of both phases; see `pqk.recipe.joint`.
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

from pqk.compress.cut.cost import Costs
from pqk.compress.cut.gates import Gated, Layout, Price, fold, kept_units, layouts_of, shut, starting_logits
from pqk.compress.cut.importance import loss_of, taylor
from pqk.compress.cut.prune import Removed, removed_units
from pqk.compress.cut.refit import moments, refit
from pqk.compress.cut.units import Slot, cut, groups_of, slots_of
from pqk.compress.qat import qat, rounded_loss
from pqk.compress.train.fit import Fitted, Outputs, Stop, TrainingData, fit
from pqk.compress.train.loop import Progress
from pqk.errors import PqkError
from pqk.models import build_model
from pqk.settings.joint import Joint
from pqk.settings.seeds import LIMIT
from pqk.settings.training import Rounded

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class JointReport:
    """Result of the cut. FLOPs are those of one sample of flops_side x flops_side images, two per multiply-add.

    share: share of the FLOPs that was cut. gates: number of gates; undecided: number of gates between 0.05 and 0.95
    when they were cut. gated_cut: cut share at the end of the gate phase, each gate weighted by how far it was shut.
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
        """Returns plain data for JSON."""
        return asdict(self)


Names = Mapping[str, Mapping[str, str]]
"""Of the module of each graph: what its weights are called in the network, by their names in the module."""


class GatePlan:
    """The gates of a network: their units, ordered by importance, and their initial logits.

    seed: of the training samples for the importance. On one CPU the same arguments give the same gates.
    """

    def __init__(
        self,
        teacher: Any,
        spec: Joint,
        data: TrainingData,
        *,
        seed: int,
        importance: dict[str, Tensor] | None = None,
    ) -> None:
        """Computes the importance, unless `importance`, the result of an earlier `taylor`, is given.

        Raises PqkError when flops_cut cannot be reached.
        """
        self.spec, self.seed, self.data, cutting = spec, seed, data, data.cutting
        kinds = {name for name, allowed in spec.units if allowed}
        self.slots: list[Slot] = slots_of(teacher, kinds, spec.round_to, cutting)
        if importance is None:
            working = copy.deepcopy(teacher).requires_grad_(True).eval()
            loss = loss_of(working, data, spec.train.alpha)
            importance = taylor(working, groups_of(self.slots), self.samples(), loss)
        self.importance = importance
        self.layouts: list[Layout] = layouts_of(teacher, self.slots, importance, cutting)
        self.starts = starting_logits(self.layouts, spec.gates.start, spec.gates.spread)
        self.total = Costs(teacher, self.slots, cutting)({}).flops
        shut(self.layouts, self.starts, self.total, spec.flops_cut)  # raises now, not after training

    def samples(self) -> Iterator[Any]:
        """Returns the training samples for the importance and for the refit."""
        some, drawn = self.spec.samples, self.data.batches(self.spec.train, torch.device("cpu"), self.seed)
        return (drawn.train(index, 1, some.size) for index in range(some.pairs))

    def into(self, parts: Mapping[str, nn.Module], names: Names) -> Gated:
        """Puts the gates into the prepared modules. Raises PqkError when they lack a layer that gates belong before."""
        pace = self.spec.gates.rate / self.spec.train.learning_rate
        return Gated(self.layouts, partial(_layer, parts, names), self.total, self.starts, pace)


def phases(spec: Joint) -> tuple[Rounded, Rounded]:
    """Returns the two phases as trainings: after warm-up the rate is constant in phase 1 and falls in phase 2."""
    whole, gated = spec.train, spec.gates.epochs
    first = {"epochs": gated, "warmup": whole.warmup * whole.epochs / gated, "final_rate": whole.learning_rate}
    rest = {"epochs": whole.epochs - gated, "warmup": 0.0}
    return whole.model_copy(update=first), whole.model_copy(update=rest)


def close_gates(
    parts: Mapping[str, nn.Module],
    names: Names,
    plan: GatePlan,
    teacher: Any,
    data: TrainingData,
    *,
    scratch: Path,
    device: str = "cpu",
    stop: Stop | None = None,
    report: Report | None = None,
) -> tuple[Fitted, Gated, dict[str, Tensor]]:
    """Trains the prepared modules with gates, in place, until plan.spec.flops_cut is cut (phase 1).

    parts: the modules that a quantizer's `prepare` returned for the graphs, without gates. names: see `names_in`, of
    the modules before. The loss is that of `pqk.compress.qat`, plus the price of the FLOPs that are still to be cut.
    The target share rises linearly from the initial cut of the gates to flops_cut, which it reaches at gates.ramp of
    the phase; the slope rises geometrically over the whole phase. Returns the result of `fit`, the gates in their final
    state, and the averaged float weights by their names in the Teacher.
    """
    spec, training = plan.spec, phases(plan.spec)[0]
    gated, price = plan.into(parts, names), Price(spec.gates.penalty, spec.gates.dual_rate)
    model, began = nn.ModuleDict(parts), float(gated.cut().detach())
    imitate = rounded_loss(training, data)

    def gated_loss(module: nn.Module, batch: Any, aim: Outputs | None, share: float) -> Tensor:
        gated.steepen(spec.gates.slope**share)
        loss = imitate(module, batch, aim, share)
        target = began + (spec.flops_cut - began) * min(1.0, share / spec.gates.ramp)
        with torch.autocast(loss.device.type, enabled=False):
            return loss + price(gated.cut(), target)

    fitted = fit(
        model,
        training,
        gated_loss,
        data,
        seed=plan.seed,
        scratch=scratch,
        device=device,
        teacher=teacher,
        guided=True,
        extra=price,
        stop=stop,
        report=report,
    )
    model.cpu().load_state_dict(fitted.last)  # not the best weights: those had open gates
    gated.steepen(spec.gates.slope)
    return fitted, gated, float_weights(model, names, teacher)


def names_in(network: nn.Module, parts: Mapping[str, nn.Module]) -> Names:
    """Returns for each part what its weights are called in the network whose layers it holds, by their names in it."""

    def weights(module: nn.Module) -> dict[str, Tensor]:
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}

    own = {id(value): name for name, value in weights(network).items()}
    return {
        part: {name: own[id(value)] for name, value in weights(module).items() if id(value) in own}
        for part, module in parts.items()
    }


def float_weights(parts: Mapping[str, nn.Module] | nn.ModuleDict, names: Names, like: Any) -> dict[str, Tensor]:
    """Returns the weights of the prepared modules without quantizers, by their names in a model of the same sizes.

    Weights that are in no graph are taken from `like`.
    """
    found = {
        names[part][name]: value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
        if name in names[part]
    }
    return {name: found.get(name, value).detach().cpu().clone() for name, value in like.state_dict().items()}


def _layer(parts: Mapping[str, nn.Module], names: Names, weight: str) -> nn.Module:
    """Returns the layer of a weight, by the weight's name in the network."""
    for part, known in names.items():
        for name, called in known.items():
            if called == weight:
                return parts[part].get_submodule(name.rpartition(".")[0])
    raise PqkError(f"the prepared modules have no weight {weight!r} to put gates before")


def cut_gates(teacher: Any, weights: dict[str, Tensor], plan: GatePlan, gated: Gated) -> tuple[Any, JointReport]:
    """Cuts the units with shut gates; multiplies the other gates into the weights that read their units.

    weights: float weights by their names in the Teacher. The gates with the lowest logits are cut until
    plan.spec.flops_cut is reached. Returns the smaller float network and the report. Raises PqkError when flops_cut
    cannot be reached, and when a weight is not finite.
    """
    spec, logits, factors = plan.spec, gated.logits(), gated.factors()
    working = build_model(teacher.family, teacher.config, weights).eval()
    if not all(bool(torch.isfinite(weight).all()) for weight in working.parameters()):
        raise PqkError("the weights are no longer finite after the phase with gates; lower joint.train.lr")
    fold(working, plan.layouts, factors)
    units, keep = kept_units(plan.layouts, shut(plan.layouts, logits, plan.total, spec.flops_cut))
    if spec.refit:
        known = moments(working, groups_of(plan.slots), plan.samples(), spec.samples.pairs, plan.data.learning)
        for group in groups_of([slot for slot in plan.slots if slot.name in units]):
            refit(working, group, keep[group.name], known)
    small = cut(working, plan.slots, units, keep, plan.data.cutting).eval()
    costs = Costs(teacher, plan.slots, plan.data.cutting)
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
        flops_side=costs.side,
        gates=len(every),
        undecided=int(((every > 0.05) & (every < 0.95)).sum()),
        gated_cut=float(gated.cut().detach()),
        removed=removed_units(plan.slots, units, costs, plan.importance, keep, {}),
    )
    return small, report


def settle(
    parts: Mapping[str, nn.Module],
    teacher: Any,
    spec: Joint,
    data: TrainingData,
    *,
    seed: int,
    scratch: Path,
    device: str = "cpu",
    stop: Stop | None = None,
    report: Report | None = None,
) -> Fitted:
    """Trains the prepared modules of the cut network against the uncut float Teacher (phase 2); see `qat`."""
    return qat(
        parts,
        teacher,
        phases(spec)[1],
        data,
        seed=(seed + LIMIT // 2) % LIMIT,  # other batches than those of the first phase
        scratch=scratch,
        device=device,
        stop=stop,
        report=report,
    )


@dataclass(frozen=True)
class Whole:
    """Converts the progress of one phase into progress of the whole run.

    gates: whether it is phase 1. There the network gets worse from validation to validation by design, so the stop
    rules see only the last validation. seconds: duration of the phases before.
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
