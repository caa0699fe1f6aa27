"""Defines the result file of a study of weight quantization, `SCHEMA`, and writes it: `write_results`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pqk.files import write_json
from pqk.study.weights.closeness import METRICS

_NUMBER = {"type": ["number", "null"]}
_INTERVAL = {
    "type": ["object", "null"],
    "required": ["value", "low", "high"],
    "additionalProperties": False,
    "properties": {"value": {"type": "number"}, "low": _NUMBER, "high": _NUMBER},
}
_OUTPUT = {
    "type": "object",
    "required": list(METRICS),
    "additionalProperties": False,
    "properties": dict.fromkeys(METRICS, _NUMBER),
}
_SCHEME = {
    "type": ["object", "null"],  # null: the float model
    "required": ["quant_type", "bits", "symmetric", "per_channel", "group_size"],
    "additionalProperties": False,
    "properties": {
        "quant_type": {"type": "string"},
        "bits": {"type": "integer"},
        "symmetric": {"type": "boolean"},
        "per_channel": {"type": "boolean"},
        "group_size": {"type": ["integer", "null"]},
    },
}
_ENGINE = {
    "type": "object",
    "required": [
        "runtime",
        "what",
        "measured",
        "size_bytes",
        "rounds",
        "p25_ms",
        "p50_ms",
        "p75_ms",
        "speedup",
        "relative_error",
    ],
    "additionalProperties": False,
    "properties": {
        "runtime": {"type": "string"},
        "what": {"type": "string"},
        "measured": {"enum": ["engine", "emulated"]},  # emulated: another runtime computed, nothing was timed
        "size_bytes": {"type": "integer", "minimum": 1},
        "rounds": {"type": "integer", "minimum": 0},
        "p25_ms": _NUMBER,
        "p50_ms": _NUMBER,
        "p75_ms": _NUMBER,
        "speedup": _INTERVAL,  # against the float engine of the same runtime, paired by round
        "relative_error": _NUMBER,  # the largest over all outputs, of the engine against the float model in torch
    },
}
_ROW = {
    "type": "object",
    "required": [
        "name",
        "scheme",
        "compute",
        "size_bytes",
        "theory_bytes",
        "compression",
        "quantize_s",
        "outputs",
        "grades",
        "quality",
        "drop_pct",
        "engines",
        "note",
    ],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "scheme": _SCHEME,
        "compute": {"type": "string"},
        "size_bytes": {"type": "integer", "minimum": 1},
        "theory_bytes": {"type": ["integer", "null"]},
        "compression": {"type": "number", "exclusiveMinimum": 0},
        "quantize_s": _NUMBER,
        "outputs": {"type": "object", "additionalProperties": _OUTPUT},
        "grades": {"type": "object", "additionalProperties": {"type": "object"}},
        "quality": {"type": ["object", "null"], "additionalProperties": _NUMBER},  # against ground truth
        "drop_pct": _INTERVAL,
        "engines": {"type": "array", "items": _ENGINE},  # empty: no engine here computes this scheme
        "note": {"type": ["string", "null"]},
    },
}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A study of weight quantization",
    "type": "object",
    "required": ["schema", "made", "commit", "model", "data", "machine", "grades_from", "rows", "notes", "advice"],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": "weights-2"},
        "made": {"type": "string"},
        "commit": {"type": ["string", "null"]},
        "model": {
            "type": "object",
            "required": ["name", "family", "parameters", "sha256"],
            "properties": {"parameters": {"type": "integer"}},
        },
        "data": {"type": "object", "required": ["samples", "sha256", "truthful"]},
        "machine": {"type": "object", "required": ["device", "isa", "versions"]},
        "grades_from": {"type": "string"},
        "rows": {"type": "array", "minItems": 1, "items": _ROW},
        "notes": {"type": "array", "items": {"type": "string"}},  # why a tool or a scheme has no engine
        "advice": {
            "type": "array",
            "items": {"type": "object", "required": ["scenario", "rule", "chosen", "why"]},
        },
    },
}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Checks the results against `SCHEMA` and writes them as JSON, whole or not at all."""
    import jsonschema

    jsonschema.validate(results, SCHEMA)
    write_json(path, results)
