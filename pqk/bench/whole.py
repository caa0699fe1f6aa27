"""Joins a model's graphs to one, as a user exports a model by hand: `whole`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backends import exchange
from backends.base import Graph
from pqk.errors import PqkError
from pqk.families.contract import Family, GraphSpec, Sample
from pqk.settings.workload import Workload


class Whole(nn.Module):
    """All graphs of a model as one module: the family's glue runs on tensors while the module is traced.

    Takes the images of a sample, (1, 3, H, W) each, and returns what the family's `predict` does, in its order.
    """

    def __init__(self, of: Family, specs: Mapping[str, GraphSpec], sample: Sample, workload: Workload) -> None:
        super().__init__()
        self.modules_of = nn.ModuleDict({name: spec.module for name, spec in specs.items()})
        self._of, self._specs, self._sample, self._workload = of, specs, sample, workload
        self.output_names: tuple[str, ...] = ()

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        frames = [replace(frame, image=image[0]) for frame, image in zip(self._sample.inputs, images, strict=True)]
        sample = replace(self._sample, inputs=frames)
        found = self._of.predict_part().predict(self._call, sample, self._workload, 0)
        self.output_names = tuple(found)
        return tuple(found.values())  # type: ignore[arg-type]

    def _call(
        self, graph: str, feeds: Mapping[str, Any], *, reuse: Hashable | None = None, stay: bool = False
    ) -> dict[str, Any]:
        spec = self._specs[graph]
        found = self.modules_of[graph](*(feeds[name] for name in spec.input_names))
        return dict(zip(spec.output_names, (found,) if isinstance(found, Tensor) else found, strict=True))


def images_of(sample: Sample) -> dict[str, np.ndarray]:
    """Returns the images of a sample as the inputs of the whole graph. Raises PqkError where it has none."""
    frames: Sequence[Any] = sample.inputs if isinstance(sample.inputs, Sequence) else ()
    if not frames or not all(hasattr(frame, "image") for frame in frames):
        raise PqkError("what this family is fed is not images alone, so its graphs cannot be joined here")
    return {f"image_{number}": np.ascontiguousarray(frame.image[None]) for number, frame in enumerate(frames)}


def export_whole(of: Family, specs: Mapping[str, GraphSpec], sample: Sample, workload: Workload, path: Path) -> Graph:
    """Writes the whole model as one ONNX file, checked against torch. Raises PqkError or BackendError."""
    feeds = {name: torch.from_numpy(image) for name, image in images_of(sample).items()}
    module = Whole(of, specs, sample, workload).eval()
    with torch.no_grad():
        module(*feeds.values())
    return exchange.export(module, feeds, module.output_names, path)
