"""Memory that a model needs to be compiled and to run, on real engines in fresh processes."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_toys import PIXELS, SIDE, toy_variant
from run_toys import small_experiment

from pqk.compress.tasks import qat
from pqk.engines.variant import Variant
from pqk.measure.footprint import forget_peak, ram_bytes
from pqk.recipe import stages
from pqk.recipe.stages import Context
from pqk.store import worker
from pqk.store.store import Store

WIDE, TERMS = 2048, 5
WEIGHTS = 4 * PIXELS * WIDE
"""Bytes of the wide toy's weights, 25 MB; its file holds TERMS matrices of that size, which the compiler adds up."""


EXPERIMENT = small_experiment({"workload.input.shape": [1, 3, SIDE, SIDE]})


def measured(root: Path, variant: Variant) -> dict[str, int | None]:
    return stages.memory(Context(Store(root), lambda *_: None, {}), EXPERIMENT, variant)


@pytest.mark.skipif(not forget_peak(), reason="this kernel cannot forget a peak")
def test_a_compiled_model_needs_its_weights_and_compiling_needs_more(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    small, wide = (
        measured(tmp_path, toy_variant(tmp_path / name, name, "openvino", width, TERMS))
        for name, width in (("small", 16), ("wide", WIDE))
    )
    assert small["steady"] is not None and wide["steady"] is not None
    # Running holds the weights, and the compiled file mapped; compiling holds all that is added up as well.
    assert 0.8 * WEIGHTS < wide["steady"] - small["steady"] < 2.5 * WEIGHTS
    assert wide["compile"] is not None and wide["compile"] > wide["steady"] + 0.8 * TERMS * WEIGHTS
    assert small["compile"] is not None and small["steady"] > 2e7
    assert not list(tmp_path.glob("memory/*/compiled-*"))  # the compiled models are gone


def test_a_model_that_was_compiled_anew_has_no_steady_state(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    variant = toy_variant(tmp_path / "toy", "toy", "openvino").to_json()
    request = {**EXPERIMENT.fed, "variant": variant, "compiled": str(tmp_path / "compiled"), "step": "run"}
    assert worker.call("memory", request)["steady_bytes"] is None
    assert worker.call("memory", request)["steady_bytes"] > 2e7  # now it is there


def test_the_reference_compiles_nothing_that_could_be_kept(tmp_path: Path) -> None:
    found = measured(tmp_path, toy_variant(tmp_path / "toy", "toy"))
    assert found["compile"] is not None and found["steady"] is not None


@pytest.mark.parametrize(
    ("grows", "settles"), [("len(kept) < 2", True), ("True", False)], ids=["at first", "without end"]
)
def test_memory_that_grows_without_end_is_no_steady_state(grows: str, settles: bool) -> None:
    """In a process of its own, whose memory nothing else moves: a pair that keeps 10 MB, twice or every time."""
    code = (
        "from pqk.measure.memory import steady_bytes\n"
        "kept = []\n"
        "def pair():\n"
        f"    if {grows}: kept.append(b'1' * 10_000_000)\n"
        "found = steady_bytes(pair)\n"
        "print(found if found is None else found > 2e7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(settles or None)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_calibration_in_torch_gives_memory_back() -> None:
    """What the C library keeps of freed memory goes back to the system while the images pass."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    size, count = 65_536, 1500
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for index, block in enumerate(blocks):
        if index % 50:  # the others hold the heap open, as live objects do
            libc.free(block)
    before = ram_bytes()
    images = [{"image": number} for number in range(3)]
    seen: list[Any] = []

    class Job:
        quantizer = SimpleNamespace(prepare=lambda source, spec, feeds: list(feeds))

        def each(self, lower: Any) -> Any:
            seen.extend(lower(None, None, images))
            return seen

    qat.prepare(Job())  # type: ignore[arg-type]
    assert seen == images
    assert before - ram_bytes() > 0.8 * size * count
    for block in blocks[::50]:
        libc.free(block)
