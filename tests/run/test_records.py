"""Timing and memory columns of a record out of stated samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_toys import small_experiment

from backends.base import Graph, Precision
from pqk.engines.variant import Variant
from pqk.recipe.columns import Measurements, measured_record
from pqk.record.schema import columns, validate

TIMING = {
    "rounds": 30,
    "seconds": 15.2,
    "ended_by": "minimum",
    "order_seed": 0,
    "drift_pct": 1.5,
    "load_before": 0.0,
    "load_during": 0.1,
    "load_after": 0.0,
    "own_cores": 1.9,
}
QUIET = [1.0 + k / 100 for k in range(30)]


def variant(name: str, precision: Precision, model: str) -> Variant:
    graph = Graph(Path(f"{model}-{precision}.onnx"), (), (), (model + str(precision)).ljust(64, "0")[:64])
    return Variant(name, "openvino", precision, {"encoder": graph, "decoder": graph})


TEACHER = variant("fp32", Precision.F32, "a")
TEACHER_16 = variant("bf16", Precision.BF16, "a")
STUDENT = variant("student fp32", Precision.F32, "b")
STUDENT_16 = variant("student bf16", Precision.BF16, "b")
INT8 = variant("int8", Precision.INT8, "c")
EXPERIMENT = small_experiment({"eval.quality.metrics": ["absrel"]})


def record_of(
    which: Variant, against: Sequence[Variant], pairs: dict[str, list[float]], **about: Any
) -> dict[str, Any]:
    """The record of a variant whose timing had these samples (ms of a pair, by variant)."""
    scored = {
        name: {
            "summary": {"absrel": 0.1},
            "groups": ["s"],
            "samples": [{"group": "s", "sample": "a, b", "absrel": 0.1}],
            "measured": "engine",
            "executed": {},
            "matched_by_size": None,
            "flops": 1e9,
            "size_bytes": 1000,
        }
        for name in pairs
    }
    samples: dict[str, dict[str, Any]] = {
        name: {
            "sample": ms,
            "graphs": {"encoder": [x / 4 for x in ms for _ in "ab"], "decoder": [x / 2 for x in ms]},
            "group_s": [1.0],
            "group_samples": 9,
        }
        for name, ms in pairs.items()
    }
    if "device" in about:
        samples[which.name]["device"] = about["device"]
    timed = {"variants": samples, "timing": TIMING, "disturbed": about.get("disturbed", [])}
    memory = {name: about.get("memory", {"compile": 3_000_000_000, "steady": 2_000_000_000}) for name in pairs}
    common = {"exp_id": "X", "role": "baseline", "status": "ok", "main_metric": "absrel", "hashes": {}}
    measured = Measurements(TEACHER, scored, timed if about.get("timed", True) else None, memory)
    record = measured_record(common | about.get("common", {}), measured, which, against, True, EXPERIMENT)
    validate(record)
    return record


def test_both_speeds_of_every_row() -> None:
    """The Teacher takes 8 ms in f32 and 4 in bf16, the student 6 and 5, its int8 2."""
    times = {"fp32": 8.0, "bf16": 4.0, "student fp32": 6.0, "student bf16": 5.0, "int8": 2.0}
    pairs = {name: [ms * x for x in QUIET] for name, ms in times.items()}
    teachers, students = [TEACHER, TEACHER_16], [STUDENT, STUDENT_16]
    found = {
        which.name: record_of(which, against, pairs)
        for which, against in (
            (TEACHER, teachers),
            (TEACHER_16, teachers),
            (STUDENT, students),
            (STUDENT_16, students),
            (INT8, students),
        )
    }
    speeds = ("speedup_vs_teacher_f32", "speedup_vs_own_f32", "speedup_vs_best_float")
    assert {name: [record[speed] for speed in speeds] for name, record in found.items()} == {
        "fp32": pytest.approx([1.0, 1.0, 0.5]),
        "bf16": pytest.approx([2.0, 2.0, 1.0]),
        "student fp32": pytest.approx([8 / 6, 1.0, 5 / 6]),
        "student bf16": pytest.approx([8 / 5, 6 / 5, 1.0]),
        "int8": pytest.approx([4.0, 3.0, 2.5]),
    }
    assert {record["best_float"] for record in found.values()} == {"bf16"}
    # What a row is against itself has no interval.
    named = {"t_pair_p50_ms", *speeds}
    assert set(found["int8"]["intervals"]) == named
    assert set(found["fp32"]["intervals"]) == named - {"speedup_vs_teacher_f32", "speedup_vs_own_f32"}
    assert set(found["student fp32"]["intervals"]) == named - {"speedup_vs_own_f32"}


def test_ratios_are_taken_round_by_round() -> None:
    """Every third round is ten times as slow for both: medians would say another ratio, and an interval of it too."""
    slow = [10.0 if k % 3 == 0 else 1.0 for k in range(30)]
    int8 = [s * (1.0 if k % 2 else 1.1) for k, s in enumerate(slow)]
    pairs = {"fp32": [2 * s for s in slow], "int8": int8}
    record = record_of(INT8, [TEACHER], pairs)
    assert record["speedup_vs_own_f32"] == pytest.approx((2 + 2 / 1.1) / 2)
    assert record["intervals"]["speedup_vs_own_f32"] == pytest.approx([2 / 1.1, 2])
    few = record_of(INT8, [TEACHER], {name: ms[:5] for name, ms in pairs.items()})
    assert few["intervals"] is None and few["speedup_vs_own_f32"] is not None  # no 95 % from five rounds


@pytest.mark.parametrize(("rounds", "told"), [(99, False), (100, True)])
def test_p95_is_null_below_a_hundred_rounds(rounds: int, told: bool) -> None:
    pairs = {name: [1.0 + k for k in range(rounds)] for name in ("fp32", "int8")}
    record = record_of(INT8, [TEACHER], pairs)
    assert (record["t_pair_p95_ms"] == pytest.approx(95.05)) if told else record["t_pair_p95_ms"] is None
    assert record["pairs_per_sec"] == pytest.approx(1000 / (1 + (rounds - 1) / 2))


def test_what_the_machine_did_is_in_the_record() -> None:
    pairs = {"fp32": QUIET, "int8": QUIET}
    quiet = record_of(INT8, [TEACHER], pairs)
    assert (quiet["disturbed"], quiet["timing"], quiet["t_pair_device_p50_ms"]) == (False, TIMING, None)
    record = record_of(INT8, [TEACHER], pairs, disturbed=["times drifted"], device=[3.0, 1.0, 2.0])
    assert (record["disturbed"], record["t_pair_device_p50_ms"]) == (True, 2.0)
    assert record["samples"]["device"] == [3.0, 1.0, 2.0] and set(quiet["samples"]) == {"pair", "encoder", "decoder"}


@pytest.mark.parametrize(
    ("compiling", "steady", "peak"), [(3e9, 2e9, 3.0), (2e9, 3e9, 3.0), (3e9, None, 3.0), (None, None, None)]
)
def test_memory_of_compiling_and_of_running(compiling: float | None, steady: float | None, peak: float | None) -> None:
    about = {"compile": compiling, "steady": steady}
    pairs = {"fp32": QUIET, "int8": QUIET}
    record = record_of(INT8, [TEACHER], pairs, memory=about)
    assert record["ram_compile_GB"] == (compiling and compiling / 1e9)
    assert record["ram_GB"] == (steady and steady / 1e9)
    assert record["peak_memory_GB"] == peak
    on_gpu = record_of(INT8, [TEACHER], pairs, memory=about, common={"machine": {"device": "NVIDIA H200", "cpu": "x"}})
    assert on_gpu["peak_memory_GB"] is None  # that is the device's, which is not measured


def test_what_was_not_timed_is_null() -> None:
    record = record_of(INT8, [TEACHER], {"fp32": QUIET, "int8": QUIET}, timed=False)
    names = {column.name for column in columns() if column.timing} | {"intervals", "ram_GB", "ram_compile_GB"}
    assert "speedup_vs_own_f32" in names and {record[name] for name in names} == {None}
