"""Exports torch modules to ONNX, the one graph that every toolchain starts from, and checks the file against torch.

The file holds no path, no stack trace and no time: the same module gives the same bytes. Graphs whose weights
exceed `EXTERNAL_ABOVE` bytes keep them in one `<name>.data` file, because a protobuf ends at 2 GiB.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from backends.base import BackendError, Graph, TensorInfo, first_line, sha256_files

if TYPE_CHECKING:
    import onnx
    import torch

EXTERNAL_ABOVE = 1_800_000_000
SHARED_ABOVE = 1024  # bytes
ROUNDING = 10
"""How many times as far from torch in f64 as torch in f32 a file may be: the largest of few large errors differs so."""
STDOUT = 1
"""Its number as a file."""
EXPORTERS = ("auto", "torchscript", "dynamo")


def export(
    module: torch.nn.Module,
    example: Mapping[str, torch.Tensor],
    output_names: Sequence[str],
    path: Path | str,
    opset: int = 18,
    exporter: str = "auto",
    tolerance: float = 1e-4,
    external_above: int = EXTERNAL_ABOVE,
    more: Sequence[Mapping[str, torch.Tensor]] = (),
) -> Graph:
    """Writes `module` as ONNX with static shapes, checks it against torch, and returns its graph.

    `example` maps input names to tensors, in the order of the module's positional arguments; the module returns a
    tensor or a tuple of tensors, named by `output_names` in that order. `exporter` 'auto' takes the tracing exporter
    up to `external_above` bytes of weights (one second against nine) and the dynamo exporter beyond (the tracing one
    writes a file per tensor first). The target appears whole or not at all. more: see `verify`.
    Raises BackendError when the export fails or the file differs from torch by more than `tolerance` (see `verify`).
    """
    import torch

    if exporter not in EXPORTERS:
        raise BackendError(f"exporter must be one of {list(EXPORTERS)}, got {exporter!r}")
    if not example:
        raise BackendError("cannot export a module without inputs: the example is empty")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    weights = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    large = weights > external_above
    if exporter == "auto":
        exporter = "dynamo" if large else "torchscript"
    with eval_mode(module), tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        made = Path(folder) / target.name
        with torch.no_grad(), _quiet():
            try:
                torch.onnx.export(
                    module,
                    tuple(example.values()),
                    str(made),
                    input_names=list(example),
                    output_names=list(output_names),
                    opset_version=opset,
                    dynamo=exporter == "dynamo",
                    external_data=large,
                    verbose=False,
                )
            except Exception as error:
                raise BackendError(
                    f"the {exporter} exporter cannot write {target.name}: {first_line(error)}"
                ) from error
        _rewrite(made, large and exporter == "torchscript", list(output_names))
        graph = describe_onnx(made)
        _check_names(graph, list(example), list(output_names), target.name)
        verify(graph, module, example, tolerance, more)
        move_graph(made, target)
    return Graph(target, graph.inputs, graph.outputs, graph.sha256)


def verify(
    graph: Graph,
    module: torch.nn.Module,
    example: Mapping[str, torch.Tensor],
    tolerance: float = 1e-4,
    more: Sequence[Mapping[str, torch.Tensor]] = (),
) -> dict[str, float]:
    """Compares the file in ONNX Runtime (CPU) with torch on two varied draws or more; returns each output's error.

    The draws are `example` and what `draws` makes of it: constant inputs would hide attention, and equal ones the order
    of inputs. more: other examples in place of those, of a module whose inputs mean nothing in another order: four
    numbers are no box any more. The error of an output is max|file - torch| / max|torch|, the largest of all draws.
    A module that multiplies rounding errors for some of its values (boxes of a detector with random weights) cannot be
    met there by any file. So an output with a larger error is held against torch in f64: half of its values must be
    within `tolerance`, and none may be further than ROUNDING times the largest error of torch in f32.
    Raises BackendError when an error is larger, and when the module itself gives values that are not finite.
    """
    from backends.reference import OnnxRuntimeEngine, TorchEngine

    drawn = [example, *more] if more else draws(example)
    feeds = [{name: tensor.detach().cpu().numpy() for name, tensor in draw.items()} for draw in drawn]
    feeds = feeds if np.isfinite(tolerance) else feeds[:1]  # then only whether the file runs is asked
    errors: dict[str, float] = {}
    with eval_mode(module), OnnxRuntimeEngine(graph) as engine:
        reference = TorchEngine(module, graph.inputs, graph.outputs)
        for feed in feeds:
            want, got = reference.infer(feed), engine.infer(feed)
            found = {name: _error(want[name], got[name]) for name in want}
            for name, error in found.items():
                if not np.isfinite(want[name]).all():
                    what = f"{graph.path.name}: output {name!r} holds values that are not finite in torch already"
                    raise BackendError(f"{what}: the fault is in the model")
                errors[name] = max(errors.get(name, 0.0), error)
            if not all(error <= tolerance for error in found.values()):
                _check_rounding(module, graph, feed, want, got, tolerance)
    return errors


def _error(want: np.ndarray, got: np.ndarray) -> float:
    """Returns max|got - want| / max|want|, or the difference itself where all of `want` is 0."""
    largest = float(np.max(np.abs(want), initial=0.0))
    difference = float(np.max(np.abs(got.astype(np.float64) - want), initial=0.0))
    return difference / largest if largest else difference


def _check_rounding(
    module: torch.nn.Module,
    graph: Graph,
    feed: Mapping[str, np.ndarray],
    want: Mapping[str, np.ndarray],
    got: Mapping[str, np.ndarray],
    tolerance: float,
) -> None:
    """Raises BackendError where a file is further from torch than rounding explains; see `verify`."""
    exact = _in_double(module, feed, list(want))
    for name, mine in want.items():
        error, allowed = _error(mine, got[name]), tolerance
        if error <= tolerance:
            continue
        if exact is not None and np.isfinite(exact[name]).all():
            error, largest = _error(exact[name], got[name]), float(np.max(np.abs(exact[name]), initial=0.0))
            if largest and float(np.median(np.abs(got[name] - exact[name]))) <= tolerance * largest:
                allowed = max(tolerance, ROUNDING * _error(exact[name], mine))
        if not error <= allowed:
            raise BackendError(
                f"{graph.path.name}: output {name!r} differs from torch by {error:.3g} of its largest value "
                f"{float(np.max(np.abs(mine), initial=0.0)):.3g}; {allowed:.3g} is allowed"
            )


def _in_double(
    module: torch.nn.Module, feed: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, np.ndarray] | None:
    """Returns the outputs of a copy of a module in f64, on the CPU; None for a module that cannot compute so."""
    import torch

    def double(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    try:
        with torch.no_grad():
            found = copy.deepcopy(module).cpu().double()(*(double(torch.from_numpy(each)) for each in feed.values()))
    except (RuntimeError, TypeError):
        return None
    found = found if isinstance(found, tuple) else (found,)
    return {name: tensor.numpy() for name, tensor in zip(names, found, strict=True)}


def draws(example: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Returns `example` and shuffled copies of it from a fixed seed: one, or two where the example is not varied.

    A shuffled input holds the example's values in another order, so it stays in the range that the module expects. A
    constant float input c is drawn from [0, 2c] instead, or from [-1, 1] for c = 0; constant integers stay. The example
    is varied when no float input with several elements is constant and no two inputs are equal.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def shuffled(value: torch.Tensor) -> torch.Tensor:
        flat = value.detach().reshape(-1)
        if _constant(value):
            unit = torch.rand(flat.shape, generator=generator).to(flat)
            centre = flat[0]
            return (centre * 2 * unit if centre else 2 * unit - 1).reshape(value.shape)
        return flat[torch.randperm(len(flat), generator=generator).to(flat.device)].reshape(value.shape)

    values = list(example.values())
    alike = any(a.shape == b.shape and torch.equal(a, b) for k, a in enumerate(values) for b in values[:k])
    varied = not alike and not any(_constant(value) for value in values)
    made = [{name: shuffled(value) for name, value in example.items()} for _ in range(1 if varied else 2)]
    return [dict(example), *made]


def _constant(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.numel() > 1 and bool((value == value.reshape(-1)[0]).all())


def save_with_data(model: onnx.ModelProto, path: Path) -> None:
    """Writes a graph whose constants of 1024 bytes or more are in one file `<name>.data` beside it."""
    import onnx

    location = f"{path.name}.data"
    onnx.save_model(model, str(path), save_as_external_data=True, location=location, size_threshold=1024)


def move_graph(made: Path, target: Path) -> None:
    """Moves an ONNX file to `target` of the same file system, its data file first; one of an older graph goes."""
    data, old_data = (path.with_name(path.name + ".data") for path in (made, target))
    if data.exists():
        data.replace(old_data)
    else:
        old_data.unlink(missing_ok=True)
    made.replace(target)


def describe_onnx(path: Path | str) -> Graph:
    """Reads names, static shapes and dtypes of an ONNX file (weights stay on disk).

    Raises BackendError when the file cannot be read, a shape is dynamic, or external data lies anywhere but in
    `<file name>.data` beside it.
    """
    import onnx

    path = Path(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise BackendError(f"{path} is not a readable ONNX file: {error}") from error
    for name in sorted(_external_files(model)):
        if name != path.name + ".data":
            raise BackendError(
                f"{path} keeps weights in {name!r}; all of them must be in one file {path.name + '.data'!r} beside it"
            )
        if not path.with_name(name).is_file():
            raise BackendError(f"{path} needs its weights file {name!r} beside it, which is missing")
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_tensor_info(value, path) for value in model.graph.input if value.name not in weights)
    outputs = tuple(_tensor_info(value, path) for value in model.graph.output)
    graph = Graph(path, inputs, outputs, "")
    return Graph(path, inputs, outputs, sha256_files(graph.files()))


def _tensor_info(value: onnx.ValueInfoProto, path: Path) -> TensorInfo:
    import onnx

    shape = []
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        if not dim.HasField("dim_value"):
            raise BackendError(
                f"{path}: axis {axis} of {value.name!r} is dynamic ({dim.dim_param or '?'}); export with fixed shapes"
            )
        shape.append(dim.dim_value)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return TensorInfo(value.name, tuple(shape), np.dtype(dtype).name)


def _external_files(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }


def _rewrite(path: Path, gather_weights: bool, outputs: Sequence[str]) -> None:
    """Drops everything that depends on where and when the file was made; optionally puts all weights in one file.

    Constant outputs get their names.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=gather_weights)
    model.doc_string, model.producer_name, model.producer_version = "", "", ""
    graph = model.graph
    graph.doc_string = ""
    _share_constants(graph)
    _name_constant_outputs(graph, outputs)
    functions = list(model.functions)
    for holder in [model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        holder.doc_string = ""
        del holder.metadata_props[:]
    for function in functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]
    if not gather_weights:
        onnx.save_model(model, str(path))
        return
    keep = path.with_name(f"{path.name}.whole")
    keep.mkdir()
    save_with_data(model, keep / path.name)
    for old in path.parent.iterdir():
        if old.is_file():
            old.unlink()
    for new in keep.iterdir():
        new.replace(path.parent / new.name)
    shutil.rmtree(keep)


def _name_constant_outputs(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    """Gives outputs that depend on no input the names that were asked for: the exporter folds them into weights."""
    from onnx import helper

    weights = {weight.name for weight in graph.initializer}
    for value, name in zip(graph.output, names, strict=False):
        if value.name != name and value.name in weights:
            graph.node.append(helper.make_node("Identity", [value.name], [name], name))
            value.name = name


def _share_constants(graph: onnx.GraphProto) -> None:
    """Makes equal Constant nodes one initializer: the tracing exporter repeats a buffer at each of its uses.

    Small ones stay: they name shapes and axes, and nobody saves space with them. So do graph outputs, whose names are
    part of the contract, and everything in a graph with branches or loops, which may name constants of the outer one.
    """
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return
    named = {value.name for value in graph.output}
    kept: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        tensor = node.attribute[0].t if node.op_type == "Constant" and node.attribute[0].name == "value" else None
        if tensor is None or len(tensor.raw_data) < SHARED_ABOVE or node.output[0] in named:
            nodes.append(node)
            continue
        tensor.name = ""
        content = tensor.SerializeToString(deterministic=True)
        if content not in kept:
            kept[content] = node.output[0]
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        renamed[node.output[0]] = kept[content]
    if not renamed:
        return
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    del graph.node[:]
    graph.node.extend(nodes)


def _check_names(graph: Graph, inputs: list[str], outputs: list[str], name: str) -> None:
    got_in, got_out = [t.name for t in graph.inputs], [t.name for t in graph.outputs]
    if got_in != inputs:
        raise BackendError(f"{name}: the exported inputs are {got_in}, asked were {inputs} (is one of them unused?)")
    if got_out != outputs:
        raise BackendError(f"{name}: the exported outputs are {got_out}, asked were {outputs}")


@contextlib.contextmanager
def eval_mode(module: torch.nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters, which print progress and warn about each traced constant; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _nothing_on_stdout():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Sends what C++ code writes to stdout nowhere: of an operator that it cannot write, torch prints the whole graph.

    A command prints its result there. Where stdout is closed, nothing is done.
    """
    try:
        before = os.dup(STDOUT)
    except OSError:
        yield
        return
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), STDOUT)
    try:
        yield
    finally:
        os.dup2(before, STDOUT)
        os.close(before)
