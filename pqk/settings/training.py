"""Defines the settings of a training, schedule, scenery and budget: of teachers (`configs/models/*.yaml`) and of all
methods.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pqk.settings.scenery import Scenery
from pqk.settings.seeds import LIMIT
from pqk.settings.yamlfile import Section, Spec, load_spec, merge

Side = Annotated[int, Field(ge=14, le=1036)]
"""Height and width of training images in pixels; a family says of which number they are multiples."""


class Stage(Section):
    """A part of the run at one image size; `until` is the share of the run at which the next stage takes over."""

    size: Side
    batch: int = Field(ge=1, le=4096, description="pairs per step, over all processes")
    until: float = Field(gt=0, le=1)


class Validation(Section):
    """Held-out pairs, rendered from the validation split, scored every `every` steps at `size`."""

    size: Side = 512
    pairs: int = Field(default=64, ge=1, le=4096)
    every: int = Field(default=1000, ge=1)
    patience: int = Field(default=8, ge=1, description="validations without a better score before the run stops early")


class Training(Scenery):
    """Settings of every training: image sizes, rates, scenery. Rates are per step; `ema` is the decay of the averaged
    weights that are kept in the end, `alpha` the weight of the confidence term of the task loss.
    """

    stages: list[Stage] = Field(min_length=1)
    learning_rate: float = Field(default=6e-4, gt=0, le=1)
    final_rate: float = Field(default=1e-6, ge=0)
    warmup: float = Field(default=0.02, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.9995, gt=0, lt=1)
    alpha: float = Field(default=0.2, ge=0)

    @field_validator("stages")
    @classmethod
    def _to_the_end(cls, stages: list[Stage]) -> list[Stage]:
        shares = [stage.until for stage in stages]
        if shares != sorted(set(shares)) or shares[-1] != 1:
            raise ValueError(f"must have rising values of 'until' that end with 1, and has {shares}")
        return stages

    @model_validator(mode="after")
    def _falling_rate(self) -> Self:
        if self.final_rate > self.learning_rate:
            raise ValueError(f"final_rate {self.final_rate} must not be above learning_rate {self.learning_rate}")
        return self

    def stage_at(self, share: float) -> Stage:
        """Returns the stage at a share of the run in [0, 1]."""
        return next((stage for stage in self.stages if share < stage.until), self.stages[-1])


class Match(Section):
    """A loss that teaches attention where another frame shows the same place, and what is saved meanwhile.

    weight: of that loss beside the family's own. maps: share of the sets of a batch whose maps are computed, as these
    take most of the time and are learned from few. cameras: factor of the gradient that the cameras send back into what
    all outputs share, where that of the maps would drown it.
    """

    weight: float = Field(default=1.0, gt=0, le=100)
    maps: float = Field(default=1.0, gt=0, le=1)
    cameras: float = Field(default=1.0, gt=0, le=1000)


class TrainSpec(Training, Spec):
    """The training of a teacher.

    network: keys of the configuration, laid over those of the named model: an extension of it, for example. rates:
    factors of the learning rate by a regular expression of the names of weights; 0: not trained. match: for families
    that have this loss.
    """

    version: str = "1.0"
    model: str
    seed: int = Field(default=0, ge=0, lt=LIMIT)
    steps: int = Field(ge=1)
    network: dict[str, Any] = Field(default_factory=dict)
    rates: dict[str, Annotated[float, Field(ge=0, le=10_000)]] = Field(default_factory=dict)
    match: Match | None = None
    validation: Validation = Validation()

    @field_validator("rates")
    @classmethod
    def _patterns(cls, rates: dict[str, float]) -> dict[str, float]:
        for pattern in rates:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"must have regular expressions as keys, and {pattern!r} is none: {error}") from None
        return rates

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out an empty `network` and `rates`, so that a file without them keeps its former sha256."""
        values: dict[str, Any] = handler(self)
        for name in ("network", "rates"):
            if not values[name]:
                del values[name]
        return values


class Held(Section):
    """Held-out pairs that are scored after every epoch, at `size`; from a folder with fewer pairs, all of them."""

    size: Side = 512
    pairs: int = Field(default=16, ge=1, le=4096)


class Fit(Training):
    """The training of a compression method. An epoch is a number of steps, as no rendered pair is seen twice."""

    epochs: int = Field(ge=1, le=1000)
    steps_per_epoch: int = Field(ge=1, le=1_000_000)
    validation: Held = Held()

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


class Rounded(Fit):
    """The training of a network in its quantized form, against the float network.

    task_weight: weight of the family's own loss, which is added to the distance from the float model. final_rate is a
    tenth of learning_rate where it is left out. The keys of files before quant.yaml 1.1 and joint.yaml 1.1 are read
    too: lr, warmup_epochs (of `epochs`), and size and batch for a training of one stage.
    """

    task_weight: Annotated[float, Field(ge=0, le=100)]

    @model_validator(mode="before")
    @classmethod
    def _old_words(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        found = dict(values)
        for old, new in _OLD.items():
            if old in found and new in found:
                raise ValueError(f"has both {new} and {old}, its former name; leave {old} out")
        if "lr" in found:
            found["learning_rate"] = found.pop("lr")
        if "warmup_epochs" in found and isinstance(found["warmup_epochs"], int) and found.get("epochs"):
            warmup, epochs = found.pop("warmup_epochs"), found["epochs"]
            if not 0 <= warmup < epochs:
                raise ValueError(f"must have fewer warmup_epochs than epochs, and has {warmup} of {epochs}")
            found["warmup"] = warmup / epochs
        if "size" in found and "batch" in found:
            found["stages"] = [{"size": found.pop("size"), "batch": found.pop("batch"), "until": 1.0}]
        if "final_rate" not in found and isinstance(found.get("learning_rate"), float):
            found["final_rate"] = found["learning_rate"] / 10
        return found

    @staticmethod
    def laid_over(values: Mapping[str, Any], overrides: Mapping[str, Any], section: str) -> dict[str, Any]:
        """Returns the values of a file with overrides laid over them; both may use old or new keys in `section`."""
        mine, other = values.get(section), overrides.get(section)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            gone = {old for old, new in _OLD.items() if new in other} | {
                new for old, new in _OLD.items() if old in other
            }
            stages = mine.get("stages")
            if "stages" in gone and isinstance(stages, list) and len(stages) == 1:  # one of size and batch may stay
                mine = {**{name: stages[0][name] for name in ("size", "batch") if name in stages[0]}, **mine}
            values = {**values, section: {name: value for name, value in mine.items() if name not in gone}}
        return merge(values, overrides)


_OLD = {"lr": "learning_rate", "warmup_epochs": "warmup", "size": "stages", "batch": "stages"}


def load_training(path: Path | str, steps: int | None = None) -> TrainSpec:
    """Reads and checks a training file, with another number of steps if given.

    Raises PqkError naming file, key, value and the allowed values.
    """
    return load_spec(TrainSpec, Path(path), {"steps": steps} if steps is not None else None, "--steps", "train")
