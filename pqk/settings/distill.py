"""Defines the distillation settings, `configs/distill.yaml`, as a frozen object: cut and training of the student."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pqk.settings.training import Fit, Side
from pqk.settings.yamlfile import Section, Spec, config_loader

Cut = Annotated[float, Field(ge=0, le=0.6)]


class StudentCut(Section):
    """Shares to cut of the Teacher's blocks, heads of attention, MLP widths, widths of the DPT heads and inner widths
    of convolutional blocks; 0: none.

    fold_pairs: number of rendered pairs of fold_size pixels for the refit after the cut, before training; 0: no refit.
    """

    depth: Cut
    heads: Cut
    ffn: Cut
    dpt: Cut
    inner: Cut = 0.0
    fold_pairs: Annotated[int, Field(ge=0, le=256)] = 0
    fold_size: Side = 512

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out `inner` where nothing of it is cut, so that a file without it keeps its former sha256."""
        return {name: value for name, value in handler(self).items() if name != "inner" or value}


class DistillLoss(Section):
    """Weights of `alpha L_task + beta KL + gamma features`; beta is beta_start up to task_share of the run and then
    rises linearly to beta_end.
    """

    alpha: Annotated[float, Field(ge=0, le=100)]
    beta_start: Annotated[float, Field(ge=0, le=100)]
    beta_end: Annotated[float, Field(ge=0, le=100)]
    temperature: Annotated[float, Field(ge=1, le=100)]
    gamma: Annotated[float, Field(ge=0, le=100)]
    task_share: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.alpha == self.beta_start == self.gamma == 0:
            raise ValueError("must have alpha, beta_start or gamma above 0, or the run begins without a loss")
        return self

    def beta_at(self, share: float) -> float:
        """Returns the weight of the KL term at a share of the run in [0, 1]."""
        if share <= self.task_share:
            return self.beta_start
        risen = (share - self.task_share) / (1 - self.task_share)
        return self.beta_start + (self.beta_end - self.beta_start) * risen


Steps = Annotated[int, Field(ge=1, le=1000)]
Weight = Annotated[float, Field(ge=0, le=100)]


class Watched(NamedTuple):
    """What a family's `forward` keeps for a loss of samplers: the kind, a number of steps (0: nothing is kept), and
    where the task begins; see `SamplerLoss`.
    """

    kind: str
    steps: int
    start: str = "truth"


class SamplerLoss(Section):
    """How a student learns to find in fewer steps of a sampler what its Teacher finds in many.

    kind: steps: from the same noise, each of the student's steps is held against the Teacher's at the same time;
    teacher_steps is a multiple of student_steps, and both run without fresh noise. consistency: from the truth with
    noise, the student at one of the Teacher's times is held against itself at the next, where a step of the Teacher
    leads. best: how many boxes are compared, the Teacher's (for consistency the student's own) best. classes, boxes:
    weights of their distances, beside loss.alpha of the task; where both are 0 the Teacher does not run.
    start: where the task begins: truth: with the truth and the noise of a drawn time, as a Teacher learns; noise: with
    noise alone, which is all that a student of one step meets.
    """

    kind: Literal["steps", "consistency"] = "steps"
    teacher_steps: Steps
    student_steps: Steps = 1
    best: Annotated[int, Field(ge=1, le=10_000)] = 100
    classes: Weight = 1.0
    boxes: Weight = 1.0
    start: Literal["truth", "noise"] = "truth"

    @property
    def guided(self) -> bool:
        """Returns whether the Teacher is asked."""
        return max(self.classes, self.boxes) > 0

    @property
    def watched(self) -> tuple[Watched, Watched]:
        """Returns what is kept of Teacher and student."""
        steps = self.student_steps if self.guided else 0
        return Watched(self.kind, self.teacher_steps), Watched(self.kind, steps, self.start)

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out later keys with their first values, so that settings without them keep their former sha256."""
        first = {"kind": "steps", "start": "truth"}
        return {name: value for name, value in handler(self).items() if first.get(name) != value}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "consistency" and (self.student_steps != 1 or self.teacher_steps < 2):
            raise ValueError("of kind consistency must have student_steps 1 and teacher_steps of at least 2")
        return self

    @model_validator(mode="after")
    def _a_multiple(self) -> Self:
        if self.teacher_steps % self.student_steps:
            raise ValueError(
                f"must have teacher_steps that are a multiple of student_steps, and has {self.teacher_steps} and "
                f"{self.student_steps}"
            )
        return self


class Distill(Spec):
    """Settings of method K: the cut of the student, and how it learns from the Teacher.

    sampler: for families with a sampler; in place of the KL and of features.
    """

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    student: StudentCut
    loss: DistillLoss
    sampler: SamplerLoss | None = None
    train: Fit

    @model_validator(mode="after")
    def _sampler_alone(self) -> Self:
        if self.sampler is not None and (self.loss.beta_start or self.loss.beta_end or self.loss.gamma):
            raise ValueError("with a section sampler must have loss.beta_start, loss.beta_end and loss.gamma 0")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out an absent sampler, so that settings without one keep their former sha256."""
        values: dict[str, Any] = handler(self)
        if self.sampler is None:
            del values["sampler"]
        return values

    @model_validator(mode="after")
    def _a_density(self) -> Self:
        if self.train.alpha == 0 and max(self.loss.beta_start, self.loss.beta_end) > 0:
            raise ValueError("must have train.alpha above 0 where the KL has a weight: it sets the densities' scale")
        return self


load_distill = config_loader(Distill, "distill")
