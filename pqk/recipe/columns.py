"""Builds the records of a run: the schema's columns from the results of the stages, and the record of a failure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pqk.engines.variant import Variant
from pqk.errors import EXIT_UNAVAILABLE, PqkError
from pqk.families.contract import Metric
from pqk.files import sha256_json
from pqk.measure.scores import drop_of, metric_intervals
from pqk.recipe.experiment import Experiment
from pqk.recipe.verdict import Measured, Rise, judge_float, judge_quantized
from pqk.record.log import read_records, record_filename, write_record
from pqk.record.schema import empty_record
from pqk.settings.evaluation import Thresholds
from pqk.stats.intervals import LEVEL, Interval, median_interval
from pqk.stats.latency import p95, percentile, speedup

Record = dict[str, Any]


@dataclass(frozen=True)
class Measurements:
    """The results of the stages, by the name of the variant.

    teacher: the Teacher in f32. scored: see `pqk.measure.evaluate`. timed: result of `stages.timing`; None where
    engines are emulated. memory: results of `stages.memory`; empty where engines are emulated. level: of the drop's
    interval; above 95 % where the scenes were looked at more than once.
    """

    teacher: Variant
    scored: Mapping[str, Any]
    timed: Mapping[str, Any] | None
    memory: Mapping[str, Mapping[str, int | None]]
    level: float = LEVEL


def common_columns(
    experiment: Experiment,
    backend: str,
    machine: Mapping[str, Any],
    model: str,
    truthful: bool,
    commit: str | None,
    hashes: Mapping[str, str],
) -> Record:
    """Returns the columns that all records of a run share; they are known before the measurement."""
    workload, evaluation = experiment.workload, experiment.evaluation
    return {
        "exp_id": experiment.card.id,
        "combo": experiment.card.combo,
        "model": model,
        "family": experiment.family.name,
        "backend": backend,
        "device": machine["device"],
        "cpu_quota": machine["cpu_quota"],
        "seed": workload.seeds.eval,
        "train_seed": workload.seeds.train,
        "eval_seed": workload.seeds.eval,
        "main_metric": evaluation.quality.main_metric,
        "quality_reference": "ground_truth" if truthful else "teacher",
        "commit": commit,
        "workload_version": workload.version,
        "eval_version": evaluation.version,
        "versions": machine["versions"],
        "machine": {name: _plain(value) for name, value in machine.items() if name != "versions"},
        "hashes": dict(hashes),
    }


def _plain(value: Any) -> Any:
    """Returns a property of the machine as a single table value."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def measured_record(
    common: Record,
    measured: Measurements,
    variant: Variant,
    against: Sequence[Variant],
    truthful: bool,
    experiment: Experiment,
) -> Record:
    """Returns a record with all measurements of a variant.

    against: the float variants that speedups refer to, f32 first.
    """
    metrics = experiment.evaluation.quality.metrics
    mine, base = measured.scored[variant.name], measured.scored[measured.teacher.name]
    record = empty_record() | {"precision": str(variant.precision)} | common
    record["datetime"] = _now()
    record["hashes"] = common["hashes"] | {"engine": sha256_json(variant.hashes)}
    record |= {"scenes": base["groups"], "pairs": len(base["samples"]), "measured": mine["measured"]}
    taken = mine if measured.timed is None else measured.timed["variants"][variant.name]
    record |= {name: taken.get(name) for name in ("measured_at", "measured_commit")}  # a reused one keeps its own
    # An emulation reports the plan of the graph, not kernels that ran.
    if mine["measured"] == "engine":
        record["executed_precision"] = mine["executed"]
        record["executed_matched_by_size"] = mine["matched_by_size"]
    record["flops_G"] = mine["flops"] / 1e9
    intervals = metric_intervals(mine, metrics)
    described = described_metrics(experiment.metrics[name] for name in metrics)
    record["metrics"] = {
        name: {"value": mine["summary"].get(name), **about}
        | ({"interval": intervals[name]} if name in intervals else {})
        for name, about in described.items()
    }
    record |= {name: about["value"] for name, about in record["metrics"].items() if name in record}
    drop = drop_of(experiment.metric, mine, base, truthful, measured.level)
    if drop is not None:
        record["quality_drop_pct"] = drop.value
        if (ends := drop.ends()) is not None:
            intervals["quality_drop_pct"] = ends
    record["intervals"] = intervals or None
    record["size_MB"] = mine["size_bytes"] / 1e6
    record["size_ratio"] = mine["size_bytes"] / base["size_bytes"]
    if measured.timed is not None:
        columns, intervals = _timing(measured.timed, variant, against, measured.teacher)
        on_gpu = "cpu" in (record["machine"] or {})  # beside the device, which is the CPU elsewhere
        record |= columns | _memory(measured.memory[variant.name], on_gpu)
        record["intervals"] = {**(record["intervals"] or {}), **intervals} or None
    return record


def described_metrics(metrics: Iterable[Metric]) -> dict[str, dict[str, str]]:
    """Returns unit and direction of metrics and of their parts, by name."""
    return {name: {"unit": m.unit, "better": m.better} for m in metrics for name in (m.name, *m.parts)}


def interval_of(record: Mapping[str, Any], column: str) -> Interval | None:
    """Returns a column of a record with its interval; None when it was not measured.

    The drop counts scenes, other columns timing rounds.
    """
    value = record[column]
    if value is None:
        return None
    low, high = (record["intervals"] or {}).get(column, (None, None))
    scenes = column == "quality_drop_pct"
    groups = len(record["scenes"] or ()) if scenes else len((record["samples"] or {}).get("pair", ()))
    return Interval(value, low, high, groups)


def judged(
    record: Mapping[str, Any],
    thresholds: Thresholds,
    recipe: Sequence[str],
    rises: Sequence[Rise] = (),
    planned: float | None = None,
) -> Record:
    """Returns verdict and reasons of a quantized candidate's record. planned: see `Measured`."""
    shares, precision = record["executed_precision"], record["precision"]
    verdict, reasons = judge_quantized(
        Measured(
            interval_of(record, "quality_drop_pct"),
            interval_of(record, "speedup_vs_own_f32"),
            interval_of(record, "speedup_vs_best_float"),
            record["size_ratio"],
            None if shares is None else shares.get(precision, 0.0),
            rises,
            planned,
        ),
        thresholds,
        recipe,
        precision,
    )
    return {"verdict": verdict, "verdict_reasons": reasons}


def judged_float(
    record: Mapping[str, Any],
    thresholds: Thresholds,
    recipe: Sequence[str],
    stopped: str | None,
    rises: Sequence[Rise] = (),
) -> Record:
    """Returns verdict and reasons of a float candidate, and its status when a stop-loss rule ended the recipe."""
    drop = interval_of(record, "quality_drop_pct")
    verdict, reasons = judge_float(
        drop, record["size_ratio"], thresholds, recipe, rises, interval_of(record, "speedup_vs_teacher_f32")
    )
    if stopped is None:
        return {"verdict": verdict, "verdict_reasons": reasons}
    return {"status": "stopped", "verdict": "fail", "verdict_reasons": [f"FAILED: stop-loss: {stopped}", *reasons]}


def planned_shares(shares: Mapping[str, float]) -> str:
    """Returns the end of a note on the precisions that an emulated graph plans, with their shares of FLOPs."""
    listed = ", ".join(f"{100 * share:.1f} % of FLOPs in {name}" for name, share in shares.items())
    return f"; planned, not measured: {listed}"


def _timing(
    timed: Mapping[str, Any], variant: Variant, against: Sequence[Variant], teacher: Variant
) -> tuple[Record, dict[str, list[float]]]:
    """Returns the timing columns, with the raw samples among them, and their intervals by column.

    against: the model's own float variants, f32 first. teacher: in f32. The best float has the highest speedup.
    """
    samples = timed["variants"]
    mine, pairs = samples[variant.name], {name: found["sample"] for name, found in samples.items()}
    own, device = against[0], mine.get("device")
    best = max(against, key=lambda v: speedup(pairs[own.name], pairs[v.name]).value)
    bases = {"teacher_f32": teacher, "own_f32": own, "best_float": best}
    found: dict[str, Interval] = {"t_pair_p50_ms": median_interval(mine["sample"])}
    found |= {f"speedup_vs_{name}": speedup(pairs[base.name], mine["sample"]) for name, base in bases.items()}
    raw = {"pair": mine["sample"], **mine["graphs"], **({"device": device} if device else {})}
    graphs = {f"t_{graph}_p50_ms": percentile(times, 50) for graph, times in mine["graphs"].items()}
    known = empty_record()
    columns = {
        **{name: value for name, value in graphs.items() if name in known},  # the others are only in `samples`
        **{name: interval.value for name, interval in found.items()},
        "t_pair_p95_ms": p95(mine["sample"]),
        "t_pair_device_p50_ms": percentile(device, 50) if device else None,
        "t_scene_s": percentile(mine["group_s"], 50) if mine["group_s"] else None,
        "pairs_per_sec": 1000 * len(mine["sample"]) / sum(mine["sample"]),
        "best_float": str(best.precision),
        "samples": {name: [round(x, 4) for x in times] for name, times in raw.items()},
        "timing": timed["timing"],
        "disturbed": bool(timed["disturbed"]),
    }
    # A row is 1.00 times as fast as itself by definition; that has no interval.
    itself = {f"speedup_vs_{name}" for name, base in bases.items() if base.name == variant.name}
    ends = {name: interval.ends() for name, interval in found.items() if name not in itself}
    return columns, {name: both for name, both in ends.items() if both is not None}


def _memory(found: Mapping[str, int | None], on_gpu: bool) -> Record:
    """Returns the memory columns. The host's memory says nothing about the memory that a GPU needs."""
    compiling, running = found["compile"], found["steady"]
    known = [value / 1e9 for value in (compiling, running) if value is not None]
    return {
        "ram_GB": None if running is None else running / 1e9,
        "ram_compile_GB": None if compiling is None else compiling / 1e9,
        "peak_memory_GB": None if on_gpu else max(known, default=None),
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_failure(logs: Path, known: dict[str, Any], error: Exception) -> bool:
    """Writes a record with status 'failed' or 'unavailable', null measurements, and the reason in its notes.

    An existing record of the same measurement with status 'ok' is kept instead. Returns whether a record was written.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = " ... ".join(dict.fromkeys((lines[0], lines[-1])))  # first and last line of a traceback
    status = "unavailable" if getattr(error, "exit_code", None) == EXIT_UNAVAILABLE else "failed"
    record = empty_record() | known | {"status": status, "datetime": _now(), "notes": f"{status}: {reason}"}
    target = logs / record_filename(record)
    try:
        if target.exists() and any(old.record["status"] == "ok" for old in read_records(target)):
            return False
        write_record(target, record)
    except PqkError:  # such as a full disk; the caller reports the original failure
        return False
    return True
