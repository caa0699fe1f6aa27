"""Quantizes graphs with NNCF after training: an ONNX or IR graph and calibration feeds -> an IR with int8 weights.

NNCF runs the float graph over the calibration set at f32, with all cores: once for SmoothQuant (when an alpha is
given) and once for the ranges, which fast bias correction shares; it reduces each activation to its statistics inside
the graph, so memory holds one item at a time. Full bias correction adds inferences of sub-graphs over a fifth of the
items.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from backends.base import BackendError, Feeds, Graph, QuantSpec, Source
from backends.calibration import CalibrationItems
from backends.cpu import half_range, weight_range_notes
from backends.openvino.engine import read_model, write_ir
from backends.openvino.flops import CONVOLUTIONS, MATMULS, live_operations
from backends.openvino.keep import kept_nodes, name_nodes
from backends.openvino.matching import attention_where_allowed, quick_matching
from backends.openvino.nncf_settings import Report, advanced_parameters, check_correction, check_spec, preset
from backends.openvino.passes import fold_constants, share_constants, split_tables
from backends.openvino.statistics import watched, weight_magnitudes
from backends.quantspec import check_left, lost_channels, nothing_left

if TYPE_CHECKING:
    import torch


class NNCFQuantizer:
    """NNCF post-training quantization for OpenVINO. `report` describes the last call."""

    name = "nncf"
    starts_from = "graph"
    sources: tuple[str, ...] = ("backends.openvino.nncf",)  # and what it imports

    def __init__(self, progress: bool = False) -> None:
        """`progress`: show NNCF's progress bars."""
        self.progress = progress
        self.report = Report()

    def notes(self) -> list[str]:
        """Returns notes on the last `quantize` for its results."""
        return [*weight_range_notes(self.report.half_range), *self.report.notes]

    def quantize(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> Graph:
        """Writes `<spec.output_dir>/<source.name>.xml` and `.bin` (int8 weights) and returns that graph.

        `calibration` is iterated several times (see the module), so it must be a collection or an object whose
        `__iter__` starts anew, not a generator; items are made, used and dropped one by one. Only the first
        `spec.calibration_samples` items are used. The same input gives the same bytes.
        Raises BackendError for a spec that NNCF cannot follow, a keep pattern without a match, a keep-list that leaves
        nothing, an empty calibration set, too few items, and an item that does not fit the graph's inputs or gives NaN
        or inf inside; nothing is written then.
        """
        import nncf

        check_spec(spec, source, "NNCF")
        check_correction(spec)
        model = read_model(source.graph.path)
        fold_constants(model)
        name_nodes(model)
        kept = kept_nodes(model, spec.keep)
        heavy = [op for op in live_operations(model) if op.get_type_name() in MATMULS | CONVOLUTIONS]
        check_left(source.name, (op.get_friendly_name() for op in heavy), kept, spec.keep)
        before = weight_magnitudes(model)
        items = CalibrationItems(calibration, source.graph.inputs, spec.calibration_samples)
        with _quiet(self.progress), watched(items), quick_matching(), attention_where_allowed(spec.keep):
            try:
                quantized = nncf.quantize(
                    model,
                    nncf.Dataset(items),
                    model_type=nncf.ModelType.TRANSFORMER,
                    preset=preset(spec),
                    subset_size=spec.calibration_samples,
                    fast_bias_correction=spec.bias_correction != "full",
                    ignored_scope=nncf.IgnoredScope(names=sorted(kept), validate=False),
                    advanced_parameters=advanced_parameters(spec),
                )
            except (nncf.ValidationError, nncf.InternalError, RuntimeError) as error:
                raise BackendError(f"NNCF cannot quantize {source.graph.path.name}: {error}") from error
        del model
        if not any(op.get_type_name() == "FakeQuantize" for op in quantized.get_ops()):
            raise nothing_left(source.name, spec.keep)
        split_tables(quantized)
        share_constants(quantized)
        name_nodes(quantized)
        after = weight_magnitudes(quantized)
        notes = lost_channels("NNCF", ((name, before[name], after[name]) for name in after if name in before))
        self.report = Report(items.passes, items.used, tuple(sorted(kept)), half_range(spec.weight_range), tuple(notes))
        return write_ir(quantized, spec.output_dir / f"{source.name}.xml")

    def prepare(self, source: Source, spec: QuantSpec, calibration: Iterable[Feeds]) -> torch.nn.Module:
        """Returns a trainable copy of `source.module` that rounds as the int8 engine will: see `qat.prepare`."""
        from backends.openvino import qat

        module, self.report = qat.prepare(source, spec, calibration)
        return module

    def finish(self, module: torch.nn.Module, source: Source, spec: QuantSpec) -> Graph:
        """Returns the IR with int8 weights of a module that was prepared and trained: see `qat.finish`."""
        from backends.openvino import qat

        return qat.finish(module, source, spec)


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Silences NNCF, which logs and draws progress bars on stdout, where a command prints its result.

    Its own `set_log_level` would change the handlers of the whole process, so the level of its logger is set here.
    """
    import nncf  # noqa: F401  (it sets up its logger when it is imported)
    import rich

    console, logger = rich.get_console(), logging.getLogger("nncf")
    before = console.quiet, logger.level
    console.quiet = not progress
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        console.quiet = before[0]
        logger.setLevel(before[1])
