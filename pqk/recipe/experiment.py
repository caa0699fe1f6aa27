"""Resolves a task card with the configs of a model family into an experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqk import paths
from pqk.errors import PqkError, nearest
from pqk.families.contract import Family, Metric
from pqk.families.hub import cached
from pqk.families.identify import family_of
from pqk.families.registry import family
from pqk.families.sides import check_sides
from pqk.files import sha256_json
from pqk.settings.card import Card, Overrides
from pqk.settings.distill import Distill, load_distill
from pqk.settings.evaluation import Evaluation, loosened
from pqk.settings.joint import Joint, load_joint
from pqk.settings.keep import split_entry
from pqk.settings.prune import Prune, load_prune
from pqk.settings.quant import Quant
from pqk.settings.reduce import Reduce, load_reduce
from pqk.settings.teacher import DefaultTeacher, load_teacher_settings
from pqk.settings.workload import Workload
from pqk.settings.yamlfile import Spec, config_loader, expand, join, merge


@dataclass(frozen=True)
class Experiment:
    """A card with its resolved configs."""

    family: Family
    card: Card
    workload: Workload
    evaluation: Evaluation
    quant: Quant
    distill: Distill
    prune: Prune
    joint: Joint
    reduce: Reduce

    @property
    def metric(self) -> Metric:
        """Returns the main metric, which every decision and the drop refer to."""
        return self.metrics[self.evaluation.quality.main_metric]

    @property
    def metrics(self) -> dict[str, Metric]:
        """Returns the family's metrics by name."""
        return {metric.name: metric for metric in self.family.settings_part().METRICS}

    @property
    def fed(self) -> dict[str, Any]:
        """Returns the family and the workload as plain data, which every worker task receives."""
        return {"family": self.family.name, "workload": self.workload.model_dump(mode="json")}

    @property
    def hashes(self) -> dict[str, str]:
        """Returns the sha256 of the card and of each of its resolved configs that it may use."""
        names = ["card", "workload", "evaluation", "quant", "distill", "prune", "joint"]
        if "T" in self.card.recipe:
            names.append("reduce")
        return {name: getattr(self, name).sha256 for name in names}

    @property
    def sha256(self) -> str:
        """Returns one sha256 over the card and its resolved configs."""
        return sha256_json(self.hashes)


def default_teacher(root: Path) -> DefaultTeacher:
    """Returns the settings of the project's Teacher. Raises PqkError where configs/teacher.yaml is missing or wrong."""
    file = paths.configs(root) / "teacher.yaml"
    if not file.is_file():
        raise PqkError(f"{paths.shown(file)}, which names the Teacher, is missing; give a model with --model")
    return load_teacher_settings(file)


def teacher_path(asked: str | None, root: Path) -> str:
    """Returns the requested model, else the project's Teacher, as `load_model` takes it.

    A name in the hub's cache becomes its folder. Raises PqkError where the Teacher is missing, or a name is not there.
    """
    if asked is not None:
        return cached(asked)
    found = default_teacher(root).model
    if found.startswith("random:"):
        return found
    if not (root / found).exists():
        raise PqkError(f"the shipped model {found} is missing; give one with --model")
    return str(root / found)


def experiment_family(model: str | None, root: Path) -> Family:
    """Returns the family of a model, by default of the project's Teacher. Raises PqkError where it is not found.

    Raises NotBuilt where it has no recipes.
    """
    found = family(default_teacher(root).family if model is None else family_of(model))
    found.check_runs()
    return found


def quant_loader(of: Family) -> Callable[..., Quant]:
    """Returns the reader of a family's quant.yaml."""
    return config_loader(of.settings_part().Quant, "quant")


def config_loaders(of: Family) -> dict[str, Callable[..., Spec]]:
    """Returns the reader of each config file of a family, by the file's name without .yaml."""
    part = of.settings_part()
    return {
        "workload": config_loader(part.Workload, "workload"),
        "eval": config_loader(part.Evaluation, "eval"),
        "quant": quant_loader(of),
        "distill": load_distill,
        "prune": load_prune,
        "joint": load_joint,
        "reduce": load_reduce,
    }


def config_file(root: Path, of: Family, name: str) -> Path:
    """Returns configs/FAMILY/NAME.yaml where it exists, else configs/NAME.yaml."""
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
    """Returns the card with the configs (the project's own, or the given `files`) and its overrides applied to them.

    of: the family of the model, by default the card's, else that of the project's Teacher. files: by the names of
    `config_loaders`. settings: applied after the overrides; dotted keys that start with the same names, such as
    {"quant.ptq.calibration_images": 64}. origin: the source of the settings in messages.
    Raises PqkError when an override or a setting is wrong, a limit is loosened without a noted reason, or more
    calibration images are requested than the workload has.
    """
    base = root or paths.project_root()
    of = of or (family(card.family) if card.family else experiment_family(None, base))
    if card.family not in (None, of.name):
        raise PqkError(f"card {card.id} is for models of the family {card.family}, and this one is of {of.name}")
    given = {name: file for name, file in (files or {}).items() if file is not None}
    found = {name: given.get(name) or config_file(base, of, name) for name in Overrides.model_fields}
    try:
        return _laid_over(card, of, found, settings or {}, origin)
    except PqkError:
        if settings:
            _laid_over(card, of, found, {}, origin)  # an error of the card is not reported as one of the settings
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
    _check_sides(resolved)
    asked, there = resolved.quant.ptq.calibration_images, resolved.workload.calibration_images
    if there is not None and asked > there:
        raise PqkError(f"{where}: quant.ptq.calibration_images is {asked} but workload.calibration.images is {there}")
    return resolved


def _check_keep_list(experiment: Experiment, where: str) -> None:
    """Raises PqkError for a keep-list entry that names a graph that the family does not have."""
    graphs = [use.name for use in experiment.family.settings_part().GRAPHS]
    for entry in experiment.quant.ptq.keep_list:
        graph, _ = split_entry(entry)
        if graph is not None and graph not in graphs:
            raise PqkError(
                f"{where}: quant.ptq.keep_list: {entry!r} names the graph {graph!r}{nearest(graph, graphs)}; "
                f"family {experiment.family.name} has {', '.join(graphs)} (a colon in a node's name: write it as [:])"
            )


def _check_sides(experiment: Experiment) -> None:
    """Raises PqkError for a size of training images that is no multiple of the family's patch."""
    for name in ("quant", "distill", "prune", "joint"):
        spec: Spec = getattr(experiment, name)
        check_sides(experiment.family, spec, f"{name}.")


def _by_group(settings: Mapping[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """Returns settings as nested mappings by config name. Raises PqkError for a key that starts with another name."""
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
