"""Resolves a task card with the configs of a model family into an experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqk import paths
from pqk.errors import PqkError, nearest
from pqk.families.contract import Family, Metric
from pqk.families.identify import family_of
from pqk.families.registry import family
from pqk.files import sha256_json
from pqk.settings.card import Card, Overrides
from pqk.settings.distill import Distill, load_distill
from pqk.settings.evaluation import Evaluation, loosened
from pqk.settings.joint import Joint, load_joint
from pqk.settings.keep import split_entry
from pqk.settings.prune import Prune, load_prune
from pqk.settings.quant import Quant, load_quant
from pqk.settings.teacher import DefaultTeacher, load_teacher_settings
from pqk.settings.workload import Workload
from pqk.settings.yamlfile import Spec, config_loader, expand, join, merge


@dataclass(frozen=True)
class Experiment:
    """A card with the configs as it sees them."""

    family: Family
    card: Card
    workload: Workload
    evaluation: Evaluation
    quant: Quant
    distill: Distill
    prune: Prune
    joint: Joint

    @property
    def metric(self) -> Metric:
        """The main metric, which every decision and the drop refer to."""
        return self.metrics[self.evaluation.quality.main_metric]

    @property
    def metrics(self) -> dict[str, Metric]:
        """The family's metrics by name."""
        return {metric.name: metric for metric in self.family.settings_part().METRICS}

    @property
    def fed(self) -> dict[str, Any]:
        """What every worker task is told: family and workload, as plain data."""
        return {"family": self.family.name, "workload": self.workload.model_dump(mode="json")}

    @property
    def sha256(self) -> str:
        """One sha256 over the card and its resolved configs."""
        names = ("card", "workload", "evaluation", "quant", "distill", "prune", "joint")
        return sha256_json({name: getattr(self, name).sha256 for name in names})


def default_teacher(root: Path) -> DefaultTeacher:
    """The project's Teacher. Raises PqkError where configs/teacher.yaml is missing or wrong."""
    file = paths.configs(root) / "teacher.yaml"
    if not file.is_file():
        raise PqkError(f"{paths.shown(file)} is missing, which names the Teacher; give a model with --model")
    return load_teacher_settings(file)


def teacher_path(asked: str | None, root: Path) -> str:
    """What `load_model` takes: the model asked for, else the project's Teacher. Raises PqkError where it is missing."""
    if asked is not None:
        return asked
    found = default_teacher(root).model
    if found.startswith("random:"):
        return found
    if not (root / found).exists():
        raise PqkError(f"the shipped model {found} is missing; give one with --model")
    return str(root / found)


def experiment_family(model: str | None, root: Path) -> Family:
    """The family of a model, by default of the project's Teacher. Raises PqkError."""
    return family(default_teacher(root).family if model is None else family_of(model))


def config_loaders(of: Family) -> dict[str, Callable[..., Spec]]:
    """The reader of each config file of a family, by the name without .yaml."""
    part = of.settings_part()
    return {
        "workload": config_loader(part.Workload, "workload"),
        "eval": config_loader(part.Evaluation, "eval"),
        "quant": load_quant,
        "distill": load_distill,
        "prune": load_prune,
        "joint": load_joint,
    }


def config_file(root: Path, of: Family, name: str) -> Path:
    """configs/FAMILY/NAME.yaml where there is one, else configs/NAME.yaml."""
    own = paths.configs(root) / of.name / f"{name}.yaml"
    return own if own.is_file() else paths.configs(root) / f"{name}.yaml"


def resolve(
    card: Card,
    root: Path | None = None,
    *,
    of: Family | None = None,
    files: Mapping[str, Path | str | None] | None = None,
    settings: Mapping[str, Any] | None = None,
    origin: str = "settings",
) -> Experiment:
    """The configs (the project's own, or the `files` given) with the card's overrides laid over them.

    of: the family of the model, by default of the project's Teacher. files: by the names of `config_loaders`.
    `settings` are laid over those in turn: dotted keys below the same names, such as
    {"quant.ptq.calibration_images": 64}; `origin` names where they come from in messages.
    Raises PqkError when an override or a setting is wrong, a line is loosened without a noted reason, or more
    calibration images are asked for than the workload has.
    """
    base = root or paths.project_root()
    of = of or experiment_family(None, base)
    given = {name: file for name, file in (files or {}).items() if file is not None}
    found = {name: given.get(name) or config_file(base, of, name) for name in Overrides.model_fields}
    try:
        return _laid_over(card, of, found, settings or {}, origin)
    except PqkError:
        if settings:
            _laid_over(card, of, found, {}, origin)  # what is wrong in the card is not blamed on the settings
        raise


def _laid_over(
    card: Card, of: Family, files: Mapping[str, Path | str], settings: Mapping[str, Any], origin: str
) -> Experiment:
    where = origin if settings else paths.shown(card.source)
    extra = _by_group(settings, origin)
    own = {"thresholds": card.thresholds, "stop_loss": card.stop_loss}
    laid = {group: expand(getattr(card.overrides, group), where) for group in files}
    laid["eval"] = join(laid["eval"], {name: part for name, part in own.items() if part}, where)
    laid = {group: merge(laid[group], extra[group]) for group in files}
    loaders: dict[str, Any] = config_loaders(of)
    resolved = Experiment(of, card, *(load(files[name], laid[name], where) for name, load in loaders.items()))
    loose = loosened(loaders["eval"](files["eval"]), resolved.evaluation)
    for name in loose:
        if name not in card.exceptions:
            at = "note the reason under exceptions" if not settings else "only a task card may do that, with its reason"
            raise PqkError(f"{where}: {name} is looser than in eval.yaml; {at}: {name}")
    for name in card.exceptions:
        if name not in loose and not settings:
            raise PqkError(
                f"{where}: exceptions.{name} is noted, but the card does not loosen it{nearest(name, loose)}"
            )
    _check_keep_list(resolved, where)
    asked, there = resolved.quant.ptq.calibration_images, resolved.workload.calibration_images
    if there is not None and asked > there:
        raise PqkError(f"{where}: quant.ptq.calibration_images is {asked} but workload.calibration.images is {there}")
    return resolved


def _check_keep_list(experiment: Experiment, where: str) -> None:
    """Raises PqkError for an entry of the keep-list that names a graph which the family does not have."""
    graphs = [use.name for use in experiment.family.settings_part().GRAPHS]
    for entry in experiment.quant.ptq.keep_list:
        graph, _ = split_entry(entry)
        if graph is not None and graph not in graphs:
            raise PqkError(
                f"{where}: quant.ptq.keep_list: {entry!r} names the graph {graph!r}{nearest(graph, graphs)}; a model of "
                f"family {experiment.family.name} has {', '.join(graphs)} (a colon in a node's name: write it as [:])"
            )


def _by_group(settings: Mapping[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """Settings as nested mappings below the names of the configs. Raises PqkError for any other beginning."""
    groups: dict[str, dict[str, Any]] = {group: {} for group in Overrides.model_fields}
    for name, value in settings.items():
        group, _, rest = name.partition(".")
        if group not in groups or not rest:
            raise PqkError(
                f"{origin}: {name} must start with {', '.join(f'{known}.' for known in list(groups)[:-1])} or "
                f"{list(groups)[-1]}. and name a value{nearest(group, groups)}"
            )
        groups[group] = join(groups[group], expand({rest: value}, origin), origin)
    return groups
