"""Reads the schema of the unified log, the only place that names its columns, and checks records: `validate`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk.errors import PqkError, nearest

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

SCHEMA_FILE = Path("logs") / "unified_log_schema.json"
GROUPS = ("identity", "method", "quality", "efficiency", "resources", "edge", "evidence")

_INT64_MAX = 2**63 - 1
_NOUNS = {
    "number": "a number",
    "integer": "a whole number",
    "string": "a text",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
# How the patterns of the schema read in an error message, keyed by the field or by the object that holds it.
_PATTERN_WORDS = {
    "datetime": "an ISO 8601 time in UTC such as 2025-10-08T12:00:00Z",
    "hashes": "a sha256 of 64 lower-case hexadecimal digits",
    "precision": "a name of letters, digits and underscores such as int8",
    "best_float": "a name of letters, digits and underscores such as bf16",
    "main_metric": "a name of up to 32 lower-case letters, digits and underscores",
}


@dataclass(frozen=True)
class Column:
    """One field of the schema, with its format in reports.

    `better` is 'lower', 'higher' or ''; `format` is printf-like without the percent sign ('.3f', 'd', '+.2f') or '';
    `kind` is the JSON type without null; `short` is the heading in the terminal ('' = not shown there);
    `also` names a second sheet that shows the column; `timing` columns are null in an emulated row; `metric` columns
    hold a quality metric of a family, which is in `metrics` too.
    """

    name: str
    group: str
    unit: str
    better: str
    format: str
    description: str
    kind: str
    short: str
    also: str
    timing: bool
    metric: bool


class Contradiction(PqkError):
    """Two numbers of a record that must be equal are not."""


def schema_path() -> Path:
    """Finds the schema in the nearest of the current folder and its parents, else in the repository of this package.

    Raises PqkError when there is none.
    """
    here = Path.cwd()
    candidates = [folder / SCHEMA_FILE for folder in (here, *here.parents, Path(__file__).resolve().parents[2])]
    for path in candidates:
        if path.is_file():
            return path
    raise PqkError(
        f"no log schema: neither {here} nor a parent of it holds {SCHEMA_FILE}; change into a checkout of pqk"
    )


def load_schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of a record; do not modify it. Raises PqkError when it is damaged."""
    path = schema_path()
    return _load(path, path.stat().st_mtime_ns)[0]


def schema_version() -> str:
    """Returns the version of new records, for example '2.0.0'."""
    return str(load_schema()["properties"]["schema_version"]["const"])


def columns() -> list[Column]:
    """Returns the columns of every table, in the order of the schema."""
    return [
        Column(
            name=name,
            group=rules["x-group"],
            unit=rules.get("x-unit", ""),
            better=rules.get("x-better", ""),
            format=rules.get("x-format", ""),
            description=rules["description"],
            kind=next((kind for kind in _types(rules) if kind != "null"), "string"),
            short=rules.get("x-short", ""),
            also=rules.get("x-also", ""),
            timing=rules.get("x-timing", False),
            metric=rules.get("x-metric", False),
        )
        for name, rules in load_schema()["properties"].items()
    ]


def metrics_of(record: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Returns the object `metrics` of a record that has its metrics only in columns, with the schema's units.

    None where nothing was measured.
    """
    found: dict[str, dict[str, Any]] = {}
    for column in columns():
        if column.metric and (record.get(column.name) is not None or record.get("main_metric") == column.name):
            unit = "" if column.unit == "1" else column.unit
            found[column.name] = {"value": record.get(column.name), "unit": unit, "better": column.better}
            ends = (record.get("intervals") or {}).get(column.name)
            found[column.name] |= {} if ends is None else {"interval": ends}
    return found if any(about["value"] is not None for about in found.values()) else None


def names_of_1_0() -> dict[str, str | None]:
    """Returns, by current name of a column, its name in schema 1.0; None where schema 1.0 did not measure it."""
    return {n: rules["x-1.0"] for n, rules in load_schema()["properties"].items() if "x-1.0" in rules}


def empty_record() -> dict[str, Any]:
    """Returns a record with every field null except schema_version. The caller fills in the known values."""
    record: dict[str, Any] = dict.fromkeys(load_schema()["properties"])
    record["schema_version"] = schema_version()
    return record


def validate(record: Any, where: str = "record") -> None:
    """Checks one record against the schema; `where` (a file, an experiment) starts the message.

    Raises PqkError with the exact field, its value and the allowed values: an unknown field (with the nearest known
    one), a missing field, a wrong type or value, NaN or infinity, a timing in an emulated record, shares of executed
    precision that add up to more than 1, a day that does not exist. Raises Contradiction for a metric whose column is
    not its value in `metrics`.
    """
    if not isinstance(record, dict):
        raise PqkError(f"{where}: a record must be a JSON object, got {_show(record)}")
    path = schema_path()
    schema, validator = _load(path, path.stat().st_mtime_ns)
    problems = list(_beyond_json(record, ""))
    if not problems:
        errors = sorted(validator.iter_errors(record), key=_rank)
        problems = list(dict.fromkeys(_sentence(error, record, schema) for error in errors))
    if not problems:
        problems = list(_beyond_schema(record))
    unequal = [] if problems else list(_unequal(record))
    if problems or unequal:
        first, *others = problems or unequal
        more = f" (and {len(others)} more)" if others else ""
        raise (PqkError if problems else Contradiction)(f"{where}: {first}{more}")


@lru_cache(maxsize=4)
def _load(path: Path, mtime_ns: int) -> tuple[dict[str, Any], Draft202012Validator]:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry

    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        Draft202012Validator.check_schema(schema)
    except (ValueError, SchemaError, RecursionError) as error:
        raise PqkError(f"{path}: not a valid JSON Schema: {str(error).splitlines()[0]}") from error
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or "const" not in properties.get("schema_version", {}):
        raise PqkError(f"{path}: properties.schema_version must name the version as a const")
    for name, rules in properties.items():
        if rules.get("x-group") not in GROUPS or "description" not in rules:
            raise PqkError(f"{path}: field {name!r} must have a description and an x-group out of {', '.join(GROUPS)}")
    # An empty registry: a $ref in a schema is never fetched from the network.
    return schema, Draft202012Validator(schema, registry=Registry())


def _types(rules: dict[str, Any]) -> list[str]:
    kinds = rules.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _beyond_json(value: Any, path: str) -> Iterator[str]:
    """Finds values that JSON cannot hold or that would break a table: NaN, infinity, huge integers, broken Unicode."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                yield f"{path or 'the record'} has the key {_show(key)}; keys must be texts"
                continue
            yield from _beyond_json(key, f"the key of {path}" if path else "a field name")
            yield from _beyond_json(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _beyond_json(item, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path} must be a finite number or null, got {_show(value)}"
    elif isinstance(value, int) and abs(value) > _INT64_MAX:
        yield f"{path} must fit in 64 bits, got a number of {value.bit_length()} bits"
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            yield f"{path} must be Unicode text, got {_show(value)}"


def _beyond_schema(record: dict[str, Any]) -> Iterator[str]:
    """Finds problems that a JSON Schema cannot express."""
    try:
        datetime.fromisoformat(record.get("datetime") or "1970-01-01")
    except ValueError:
        yield f"datetime must be a day that exists, got {_show(record['datetime'])}"
    total = sum((record.get("executed_precision") or {}).values())
    if total > 1 + 1e-6:
        yield f"executed_precision: the shares must add up to at most 1, got {total:.6g}"
    metrics, main = record.get("metrics"), record.get("main_metric")
    if metrics is not None and main is not None and main not in metrics:
        yield f"main_metric must be one of {', '.join(metrics)}, got {_show(main)}{nearest(main, metrics)}"
    for column in columns():
        if column.name in (metrics or {}) and not column.metric:
            yield f"metrics.{column.name} has the name of another field"


def _unequal(record: dict[str, Any]) -> Iterator[str]:
    """Finds metrics whose column holds another value than `metrics`."""
    metrics = record.get("metrics") or {}
    for column in columns():
        if column.name in metrics and metrics[column.name]["value"] != record[column.name]:
            value = _show(record[column.name])
            yield f"{column.name} is {value} and must be as in metrics, {_show(metrics[column.name]['value'])}"


def _rank(error: ValidationError) -> tuple[int, str]:
    """Returns a sort key. Problems that explain others come first: wrong version, unknown fields, missing fields."""
    path = _path(error)
    if path:
        return (0 if path == "schema_version" else 3), path
    return {"additionalProperties": 1, "required": 2}.get(str(error.validator), 3), path


def _path(error: ValidationError) -> str:
    text = ""
    for part in error.absolute_path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _sentence(error: ValidationError, record: dict[str, Any], schema: dict[str, Any]) -> str:
    """Returns one sentence: the field, the allowed values, the value found."""
    field = _path(error)
    rules = error.schema if isinstance(error.schema, dict) else {}
    known = list(schema["properties"])
    if error.validator == "additionalProperties" and not field:
        unknown = [name for name in record if name not in schema["properties"]]
        missing = [name for name in known if name not in record]
        return "; ".join(
            f"unknown field {_show(name)}{nearest(name, missing) or nearest(name, known)}" for name in unknown
        )
    if field and error.validator in ("additionalProperties", "required"):
        return f"{field}: {error.message}"
    if error.validator == "required":
        missing = [name for name in known if name not in record]
        return f"missing field{'s' if len(missing) > 1 else ''} {', '.join(missing)}; use null for unknown values"
    if "then" in error.absolute_schema_path:
        return f"{field} must be null in an emulated record, which carries no timing, got {_show(error.instance)}"
    if "propertyNames" in error.absolute_schema_path:
        return f"{field} has the key {_show(error.instance)}, which is not a name"
    if error.validator == "const":
        return f"{field} must be {_show(error.validator_value)}, got {_show(error.instance)}"
    if error.validator == "enum":
        allowed = [str(value) for value in rules["enum"] if value is not None]
        null = " or null" if None in rules["enum"] else ""
        hint = nearest(error.instance, allowed) if isinstance(error.instance, str) else ""
        return f"{field} must be one of {', '.join(allowed)}{null}, got {_show(error.instance)}{hint}"
    return f"{field} must be {_allowed(rules, field)}, got {_show(error.instance)}"


def _allowed(rules: dict[str, Any], field: str) -> str:
    """Returns the allowed values of a field in words, such as 'a number between 0 and 1, or null'."""
    kinds = _types(rules)
    words = " or ".join(_NOUNS[kind] for kind in kinds if kind != "null")
    low, high = rules.get("minimum"), rules.get("maximum")
    if low is not None and high is not None:
        words += f" between {low} and {high}"
    elif low is not None:
        words += f" of at least {low}"
    elif "exclusiveMinimum" in rules:
        words += f" above {rules['exclusiveMinimum']}"
    if "pattern" in rules:
        words = _PATTERN_WORDS.get(field.split(".")[0], f"a text that matches {rules['pattern']}")
    elif "maxLength" in rules:
        words += f" of {rules.get('minLength', 0)} to {rules['maxLength']} characters"
    elif rules.get("minLength"):
        words += " that is not empty"
    return f"{words}, or null" if "null" in kinds else words


def _show(value: Any) -> str:
    """Returns a value as JSON would show it, cut to a readable length."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError):
        text = f"{value!r} ({type(value).__name__})"
    return text if len(text) <= 80 else text[:77] + "..."
