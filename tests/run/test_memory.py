"""What a worker process does with its request."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from backends.base import Graph, Precision, TensorInfo
from pqk.run import memory, qat, variants


def test_peak_memory_is_that_of_a_fresh_compilation(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No compiled model from a cache, whatever the variant says; its other options stay."""
    seen: list[dict[str, Any]] = []

    class Engines:
        def __init__(self, variant: variants.Variant) -> None:
            seen.append(dict(variant.options))

        def __enter__(self) -> Any:
            return SimpleNamespace(timed_pair=lambda first, second: None)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(memory, "Runner", Engines)
    image = TensorInfo("image", (1, 3, 32, 32), "float32")
    graph = Graph(tmp_path / "a.onnx", (image,), (), "0" * 64)
    options = {"cache_dir": str(tmp_path), "rest": "f32"}
    asked = variants.Variant("int8", "openvino", Precision.INT8, graph, graph, options)
    assert memory.measure_memory({"variant": asked.to_json()})["peak_bytes"] > 0
    assert seen == [{"rest": "f32"}]


@pytest.mark.parametrize("library", ["glibc", "another"])
def test_calibration_in_torch_gives_memory_back(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Every eighth image of every pass, and only where the C library can."""
    trimmed: list[int] = []
    functions = {"malloc_trim": trimmed.append} if library == "glibc" else {}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(**functions))
    images = [{"image": number} for number in range(17)]
    seen: list[Any] = []

    class Job:
        quantizer = SimpleNamespace(prepare=lambda source, spec, feeds: [list(feeds), list(feeds)])

        def both(self, lower: Any) -> Any:
            seen.extend(lower(None, None, images))
            return seen

    qat.prepare(Job())  # type: ignore[arg-type]
    assert seen == [images, images]
    assert trimmed == ([0] * 6 if library == "glibc" else [])
