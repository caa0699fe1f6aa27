"""Defines the evaluation, `configs/eval.yaml`, as a frozen object: measurements, thresholds, stop-loss lines."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from pqk.errors import nearest
from pqk.paths import shown
from pqk.settings.yamlfile import Section, Spec, parse_yaml, read_text, validate

MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
"""Name of a metric; the family defines which there are."""
DropPct = Annotated[float, Field(ge=0, le=20)]
CutPct = Annotated[float, Field(ge=0, le=95)]


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or "\0" in path or ".." in parts:
        raise ValueError("must be a relative path inside the project")
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]


class Quality(Section):
    """The quality metrics that are recorded; a family adds its own options."""

    main_metric: MetricName
    metrics: Annotated[tuple[MetricName, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _main_is_computed(self) -> Self:
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError("lists a metric twice")
        if self.main_metric not in self.metrics:
            hint = nearest(self.main_metric, self.metrics)
            raise ValueError(f"has main_metric {self.main_metric!r}, which is not among its metrics{hint}")
        return self


class Efficiency(Section):
    """Length of a timing after `warmup` rounds, and limits of its disturbances; seconds are per variant.

    It ends when both `min_rounds` and `min_seconds` are reached, at the latest at `max_seconds`, and earlier when
    every speedup is known to +- `enough_pct` percent (null: never). It is disturbed when other processes use more than
    `max_load` cores or times drift by more than `max_drift_pct` percent.
    """

    warmup: Annotated[int, Field(ge=0, le=1000)]
    min_rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    min_seconds: Annotated[float, Field(ge=0, le=86_400)]
    max_seconds: Annotated[float, Field(gt=0, le=86_400)]
    enough_pct: Annotated[float | None, Field(gt=0, le=100)]
    max_load: Annotated[float, Field(ge=0, le=10_000)]
    max_drift_pct: Annotated[float, Field(gt=0, le=1000)]

    @model_validator(mode="after")
    def _least_before_most(self) -> Self:
        if self.min_seconds > self.max_seconds:
            raise ValueError(
                f"has min_seconds {self.min_seconds:g}, which must be at most max_seconds, {self.max_seconds:g}"
            )
        return self


class Thresholds(Section):
    """Success lines. Drops are percent of the main metric against the Teacher; see configs/eval.yaml for each.

    A family adds lines for metrics that are judged in addition to the main one (`Metric.threshold`).
    """

    quality_drop_mainline_pct: DropPct
    quality_drop_q_only_pct: DropPct
    quality_drop_p_only_pct: DropPct
    t_pair_p50_reduction_pct: CutPct
    size_reduction_p_only_pct: CutPct
    size_ratio_min: Annotated[float, Field(ge=1, le=8)]
    as_planned_min: Annotated[float, Field(ge=0, le=1)]
    not_slower_than_best_float_pct: Annotated[float, Field(ge=0, le=5)]
    guard_drop_pct: DropPct


class StopLoss(Section):
    """Lines at which an experiment is given up."""

    no_improve_ckpt: Annotated[int, Field(ge=1, le=100)]
    drop_stop_k_pct: DropPct
    drop_stop_q_pct: DropPct
    drop_stop_p_pct: DropPct
    gpu_hours_overrun_pct: Annotated[float, Field(ge=100, le=300)]
    max_epochs: Annotated[int, Field(ge=1, le=1000)]


class EarlyStop(Section):
    """The least improvement between two checkpoints that counts, in percent of the main metric."""

    min_improvement_pct: DropPct


class Parity(Section):
    """Limits for the agreement of two toolchains; see configs/eval.yaml for each line."""

    pairs: Annotated[int, Field(ge=1, le=10_000)]
    float_relative: Annotated[float, Field(gt=0, le=1)]
    shared_metric_pct: DropPct
    shared_error_pct: Annotated[float, Field(ge=0, le=100)]
    recipe_metric_pct: DropPct


class Report(Section):
    """Paths of the reports, relative to the project root."""

    table: InsidePath
    summary_csv: InsidePath
    summary_json: InsidePath
    plots: InsidePath


class Evaluation(Spec):
    """Measurements, and the thresholds for success."""

    version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    quality: Quality
    efficiency: Efficiency
    thresholds: Thresholds
    stop_loss: StopLoss
    early_stop: EarlyStop
    parity: Parity
    report: Report

    @model_validator(mode="after")
    def _success_before_stop(self) -> Self:
        lines = {
            "quality_drop_mainline_pct": "drop_stop_k_pct",
            "quality_drop_q_only_pct": "drop_stop_q_pct",
            "quality_drop_p_only_pct": "drop_stop_p_pct",
        }
        for success, stop in lines.items():
            allowed, given_up = getattr(self.thresholds, success), getattr(self.stop_loss, stop)
            if allowed > given_up:
                raise ValueError(
                    f"thresholds.{success} is {allowed:g} but must be at most stop_loss.{stop}, {given_up:g}"
                )
        return self


_LOOSER_WHEN_LOWER = {
    "t_pair_p50_reduction_pct",
    "size_reduction_p_only_pct",
    "size_ratio_min",
    "as_planned_min",
}


def loosened(base: Evaluation, changed: Evaluation) -> list[str]:
    """Returns dotted names of thresholds and stop-loss lines that are easier to pass in `changed` than in `base`."""
    found = []
    for section in ("thresholds", "stop_loss"):
        before, after = getattr(base, section), getattr(changed, section)
        for name in type(before).model_fields:
            old, new = getattr(before, name), getattr(after, name)
            if new < old if name in _LOOSER_WHEN_LOWER else new > old:
                found.append(f"{section}.{name}")
    return found


class _Common(Spec):
    """The part of an evaluation that tables need; fields that a family adds are ignored."""

    model_config = ConfigDict(extra="ignore")

    thresholds: Thresholds
    report: Report


def load_common(path: Path) -> tuple[Report, Thresholds]:
    """Returns the report paths and the thresholds that all families share, from an eval.yaml. Raises PqkError."""
    document = parse_yaml(read_text(path), shown(path))
    lines = document.values.get("thresholds")
    if isinstance(lines, dict):
        document.values["thresholds"] = {name: lines[name] for name in lines if name in Thresholds.model_fields}
    found = validate(_Common, document, path)
    return found.report, found.thresholds
