"""Writes the compiled artifact of a card as a folder that runs without pqk: `pqk export`.

GRAPH.*          ONNX (float, or with Q/DQ nodes), or OpenVINO IR (int8 of openvino)
GRAPH.plan ...         the compiled engine, where it is a file of its own (TensorRT)
manifest.json          model, recipe and origin, format of the inputs, sha256 of every file
sample.py              runs the model on two images; needs only numpy, Pillow and the runtime
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Backend, Graph, Precision, lowered_to
from pqk import paths
from pqk.engines.calls import compiled
from pqk.engines.variant import Variant
from pqk.errors import PqkError, nearest
from pqk.export.target import MANIFEST, export_folder, target_of
from pqk.files import sha256_file, sha256_json, write_json
from pqk.recipe.candidate import Candidate
from pqk.recipe.experiment import Experiment
from pqk.recipe.quantization import Row
from pqk.recipe.recover import choose
from pqk.recipe.request import Request, asked_experiment, chosen_quantizer, usable_backend
from pqk.record.schema import empty_record
from pqk.settings.recipe import JOINT, quantizes
from pqk.store.store import OnEvent

FORMAT = 1  # of the manifest; readers reject any other
_IDENTITY = ("exp_id", "combo", "role", "family", "model", "backend", "quantizer", "precision")
_METHOD = ("bits_w", "bits_a", "keep_list", "images_calibration")
_EVIDENCE = ("commit", "workload_version", "eval_version", "hashes")


def export(
    request: Request,
    precision: str | None,
    out: Path,
    root: Path,
    on_event: OnEvent,
    say: Callable[[str], None],
    rollback: bool = True,
) -> Path:
    """Makes or reuses the card's candidate, and writes it to the folder `out`, whole or not at all.

    It is the candidate that `pqk run` measures with the same request: chosen in the same way, with the same hashes.
    `precision`: int8, or a float precision of the backend for the float model before quantization; None: int8 when the
    recipe quantizes, else the backend's best float. Raises PqkError or BackendError when `out` holds anything but an
    earlier export, for an unavailable precision, for a recipe that its stop-loss ended, and for errors of the stages.
    """
    out = target_of(out)
    experiment = asked_experiment(request, root)
    backend = usable_backend(request.backend)
    asked, label, quantizer = _precision(precision, request.quantizer, experiment, backend)
    if request.quantizer and quantizer is None:
        raise PqkError(f"--quantizer {request.quantizer}: a {asked} export is not quantized")
    if quantizer is None and experiment.card.recipe != JOINT:  # JOINT's float model comes from the quantized training
        float_stages = tuple(stage for stage in experiment.card.recipe if stage != "Q")
        request = replace(request, stages=float_stages or None, recipe=bool(float_stages))
    choice, request = choose(request, root, on_event, say, rollback=rollback)
    candidate = choice.candidate
    if candidate.trained and candidate.trained[-1].failed:
        raise PqkError(
            f"card {experiment.card.id} was stopped: {candidate.trained[-1].reason}; there is nothing to export"
        )
    row = next(row for row in reversed(choice.rows) if _is_asked(row, candidate, asked))
    own = choice.common | row.own
    variant = replace(row.variant, options={k: v for k, v in row.variant.options.items() if k != "cache_dir"})

    with export_folder(out) as folder:
        copies = {name: _copy(graph, folder) for name, graph in variant.graphs.items()}
        plans, measured = _compile(replace(variant, graphs=copies), candidate.experiment, folder, copies)
        part, about = candidate.experiment.family.export_part(), {}
        if part is not None:
            runtime = "openvino" if backend.name == "openvino" else "onnxruntime"
            (folder / "sample.py").write_text(part.sample_source(runtime, experiment.workload), encoding="utf-8")
            about = part.about_inputs(candidate.experiment.workload)
        record = _record(own, label, candidate, variant)
        manifest = {
            "format": FORMAT,
            "family": experiment.family.name,
            "card": experiment.card.id,
            "recipe": list(candidate.experiment.card.recipe),
            **{name: record[name] for name in (*_IDENTITY, *_METHOD, *_EVIDENCE)},
            "float_precision": _float_precision(asked, variant.options),
            "measured": measured,
            "device": own["device"],
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "versions": own["versions"],
            **about,
            "graphs": {name: _describe(graph, plans.get(name)) for name, graph in copies.items()},
            "files": _files(folder, set(plans.values())),
            "record": record,  # edge_eval.py copies it into its own: every field of the log's schema
        }
        write_json(folder / MANIFEST, manifest)
    say(f"{len(manifest['files'])} files and {MANIFEST} in {paths.shown(out)}")
    return out


def _is_asked(row: Row, candidate: Candidate, asked: Precision) -> bool:
    """Returns whether a row is the one to export: the candidate itself, or its float model in the asked precision."""
    if asked is Precision.INT8:
        return row.own.get("role") == "candidate"
    return row.variant.precision is asked and row.variant.hashes == candidate.onnx_float.hashes


def _record(own: Mapping[str, Any], label: str, candidate: Candidate, variant: Variant) -> dict[str, Any]:
    """Returns a record with the columns that are known without a measurement."""
    known = (*_IDENTITY, *_METHOD, *_EVIDENCE, "seed", "train_seed", "eval_seed", "params", "params_M")
    found = {name: own[name] for name in known if name in own}
    found["hashes"] = own["hashes"] | {"engine": sha256_json(variant.hashes)}
    return {**empty_record(), **found, "precision": label}


def _precision(
    asked: str | None, tool: str | None, experiment: Experiment, backend: Backend
) -> tuple[Precision, str, str | None]:
    """Returns the precision to compile, its name (int8, fp8 or int4 when quantized), and the quantizer or None."""
    floats = [Precision(p) for p in backend.float_precisions()]
    lowers = quantizes(experiment.card.recipe)
    if asked is None and not lowers:
        return floats[-1], str(floats[-1]), None
    if asked in floats:
        return Precision(asked), str(asked), None
    known, ptq = backend.quantizers(), experiment.quant.ptq
    lowered, name = "int8", None
    if lowers and known:
        name = chosen_quantizer(backend, tool, ptq)
        lowered = lowered_to(known[name], ptq.bits_w, ptq.bits_a)
    allowed = [*map(str, floats), lowered]
    if asked is not None and asked not in allowed:
        raise PqkError(
            f"--precision {asked}: backend {backend.name} here has {', '.join(allowed)}{nearest(asked, allowed)}"
        )
    if not lowers:
        raise PqkError(f"--precision {lowered}: the recipe of card {experiment.card.id} has no stage Q")
    return Precision.INT8, lowered, name or chosen_quantizer(backend, tool, ptq)


def _float_precision(asked: Precision, options: Mapping[str, Any]) -> str:
    """Returns the precision of the engine's float computations: 'best' (of the device), or a name."""
    return str(options.get("rest", "best")) if asked is Precision.INT8 else str(asked)


def _copy(graph: Graph, folder: Path) -> Graph:
    """Copies the graph's files to `folder` under their names, as an ONNX file names its data file; returns the copy."""
    for path in graph.files():
        shutil.copyfile(path, folder / path.name)
    return replace(graph, path=folder / graph.path.name)


def _compile(
    variant: Variant, experiment: Experiment, folder: Path, copies: dict[str, Graph]
) -> tuple[dict[str, str], str]:
    """Compiles the copies and runs one sample of noise, to check that the export works.

    A copy that runs in another form than its file has is replaced by that form, as a bundle has no engine options.
    Returns the plan file of each graph that has one, and 'engine' or 'emulated'. Raises PqkError for NaN or infinity.
    """
    of, workload, plans = experiment.family, experiment.workload, {}
    with compiled(variant) as engines:
        found = of.predict_part().predict(engines, of.data_part().example(workload), workload, 0)
        for name, array in found.items():
            if not np.isfinite(array).all():
                raise PqkError(f"the exported {variant.precision} model computes NaN or infinity in {name}")
        for name, engine in engines.engines.items():
            copies[name] = engine.write_form(copies[name].path) or copies[name]
            plan = getattr(engine, "plan", None)
            if plan is not None:
                plans[name] = f"{name}{Path(plan).suffix}"
                shutil.copyfile(plan, folder / plans[name])
        return plans, engines.measured


def _describe(graph: Graph, plan: str | None) -> dict[str, Any]:
    return {
        "file": graph.path.name,
        "format": graph.format,
        "plan": plan,
        "sha256": graph.sha256,
        "inputs": [asdict(port) for port in graph.inputs],
        "outputs": [asdict(port) for port in graph.outputs],
    }


def _files(folder: Path, plans: set[str]) -> dict[str, dict[str, Any]]:
    """Returns sha256, bytes and kind by file name; kinds: weights (graphs and their data), plan, or sample."""
    return {
        path.name: {
            "sha256": sha256_file(path),
            "bytes": path.stat().st_size,
            "kind": "plan" if path.name in plans else "sample" if path.suffix == ".py" else "weights",
        }
        for path in sorted(folder.iterdir())
    }
