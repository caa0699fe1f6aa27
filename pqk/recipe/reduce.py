"""Runs stage T of a recipe: the model does less work with the weights it has (`pqk.families.reducing`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pqk.compress.train.trained import MODEL
from pqk.errors import NotBuilt
from pqk.families.contract import Family
from pqk.files import write_json
from pqk.models import build_model, load_model, save_model
from pqk.recipe.experiment import Experiment
from pqk.recipe.request import Model, describe
from pqk.recipe.stages import LOADER_CODE, Context, device_hours, parts_code
from pqk.recipe.training import Trained
from pqk.settings.recipe import STAGES
from pqk.settings.reduce import Reduce


def check_reducing(of: Family, card: str, recipe: Sequence[str]) -> None:
    """Raises NotBuilt (exit code 3) for a recipe with T and a family without the part for it."""
    if "T" in recipe and of.reducing is None:
        raise NotBuilt(f"card {card} asks for {STAGES['T']} (T), but the family {of.name} has no reducing part")


def reduce_model(ctx: Context, experiment: Experiment, model: Model) -> Trained:
    """Makes or reuses the model that does less work. Raises PqkError where nothing becomes less."""
    of, spec = experiment.family, experiment.reduce
    asked = {"model": model.sha256, "tail": spec.tail, "tokens": spec.tokens}

    def make(folder: Path) -> None:
        source = load_model(model.path)
        config, weights = of.reducing_part().reduced(source.config, source.state_dict(), spec.tail, spec.tokens)
        save_model(build_model(of.name, config, weights), folder / MODEL)
        write_json(folder / "reduced.json", asked)

    made = ctx.make("reduced", (*LOADER_CODE, *parts_code(of, "model", "reducing")), asked, make)
    found = describe(made.path / MODEL, f"{model.name}+T")
    return Trained("T", found, False, None, 0, device_hours(made, {}), 0.0, None, None, {"words": words(spec)})


def words(spec: Reduce) -> str:
    """Returns the settings for a record's notes."""
    merged = f"at most {100 * spec.tokens:g} % of the tokens merged" if spec.tokens else "all tokens"
    return f"{'tail' if spec.tail == 'full' else f'tail on a {spec.tail} of the grid'}, {merged}"


def keeping(experiment: Experiment, model: Model) -> Experiment:
    """Returns the experiment with the keep-list that quantization of a reduced model needs."""
    ptq = experiment.quant.ptq
    needed = experiment.family.reducing_part().keep(load_model(model.path).config)
    keep = (*ptq.keep_list, *(entry for entry in needed if entry not in ptq.keep_list))
    quant = experiment.quant.model_copy(update={"ptq": ptq.model_copy(update={"keep_list": keep})})
    return replace(experiment, quant=quant)
