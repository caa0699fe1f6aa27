"""Reads and writes log files, a JSON object per record, checked both ways: `read_records`, `write_record`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pqk.errors import PqkError
from pqk.files import matching, write_json
from pqk.oserrors import cannot_read
from pqk.record.schema import SCHEMA_FILE, load_schema, metrics_of, names_of_1_0, schema_version, validate

# Two records that agree in all of these are repetitions of the same measurement; the newer may replace the older.
IDENTITY = ("exp_id", "role", "model", "backend", "quantizer", "device", "precision", "seed")
MADE_FROM = ("model", "workload", "eval", "quant", "scenes")  # and in these of their hashes (quant: see _identity)
_NAME_LENGTH = 120


@dataclass(frozen=True)
class Logged:
    """A record and the file it was read from."""

    source: Path
    record: dict[str, Any]


def record_filename(record: dict[str, Any]) -> str:
    """Returns the file name of a record: its readable identity in [A-Za-z0-9._-], and eight digits of its hash.

    The hash of the whole identity separates records whose readable parts become equal when other characters are
    replaced.
    """
    parts = [str(record[key]) for key in ("exp_id", "role", "backend", "quantizer", "precision") if record.get(key)]
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))[:_NAME_LENGTH].lstrip(".-") or "record"
    return f"{readable}-{hashlib.sha256(_identity(record).encode()).hexdigest()[:8]}.json"


def write_record(path: Path | str, record: dict[str, Any]) -> Path:
    """Checks one record and writes it atomically; returns the file written.

    `path` is a `.json` file, or a folder in which `record_filename` chooses the name.
    Raises PqkError when the record is invalid, or when the file exists and holds anything but this same measurement.
    """
    return _write(path, [record], record)


def write_records(path: Path | str, records: Sequence[dict[str, Any]]) -> Path:
    """Checks several records and writes them as one JSON list, all or nothing. Same rules as `write_record`.

    Raises PqkError also for an empty list and for a path that is not a `.json` file.
    """
    if not records:
        raise PqkError(f"{path}: there is no record to write")
    if Path(path).suffix != ".json":
        raise PqkError(f"{path}: a list of records needs a file name that ends in .json")
    return _write(path, records, list(records))


def read_records(source: Path | str | Iterable[Path | str]) -> list[Logged]:
    """Reads and checks the records of files and of folders (their `*.json`, not the schema), in order of file name.

    A record of an older version gets null for the fields it does not have; of version 1, family and metrics too.
    Raises PqkError naming the file, and the field, for bad JSON, an invalid record or a newer schema version.
    """
    sources = [source] if isinstance(source, Path | str) else list(source)
    logged = []
    for file in _files([Path(item) for item in sources]):
        content = _read_json(file)
        items = content if isinstance(content, list) else [content]
        for index, item in enumerate(items):
            where = f"{file}, record {index + 1}" if isinstance(content, list) else str(file)
            record = _upgrade(item, where)
            validate(record, where)
            logged.append(Logged(file, record))
    return logged


def _write(path: Path | str, records: Sequence[dict[str, Any]], content: Any) -> Path:
    for index, record in enumerate(records):
        name = record.get("exp_id") if isinstance(record, dict) else None
        validate(record, f"record {index + 1}" if name is None else f"record of {name}")
    target = Path(path)
    if target.is_dir() or target.suffix != ".json":
        target = target / record_filename(records[0])
    refuse_to_lose(target, records)
    write_json(target, content)
    return target


def refuse_to_lose(target: Path, records: Sequence[dict[str, Any]]) -> None:
    """Raises PqkError when writing these records to the file `target` would lose a record that is not among them.

    Only the identity of the records is read (IDENTITY and the hashes of MADE_FROM), so this can be called before they
    are measured.
    """
    new = {_identity(record) for record in records}
    if target.is_dir():
        raise PqkError(f"cannot write {target}: it is a folder")
    if not target.exists():
        return
    old = _read_json(target)
    for item in old if isinstance(old, list) else [old]:
        if not isinstance(item, dict) or "exp_id" not in item:
            raise PqkError(f"{target} exists and is not a log; choose another file")
        if _identity(item) not in new:
            kept = ", ".join(f"{key} {item[key]}" for key in IDENTITY if item.get(key) is not None)
            raise PqkError(f"{target} already holds another record ({kept}); choose another file")


def _identity(record: dict[str, Any]) -> str:
    hashes = record.get("hashes")
    # the quantization settings do not matter for a model that was not quantized
    made_from = [key for key in MADE_FROM if key != "quant" or record.get("quantizer") is not None]
    evidence = [hashes.get(key) for key in made_from] if isinstance(hashes, dict) else []
    return json.dumps([record.get(key) for key in IDENTITY] + evidence, sort_keys=True, ensure_ascii=True)


def _files(sources: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            found = matching(source, "*.json")
            files += [p for p in found if p.name != SCHEMA_FILE.name and not p.name.startswith(".")]
        elif source.is_file():
            files.append(source)
        else:
            raise PqkError(f"no log file or folder at {source}")
    return list(dict.fromkeys(files))


def _read_json(file: Path) -> Any:
    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON; use null for unknown values")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"the field {key!r} appears twice")
            seen[key] = value
        return seen

    try:
        text = file.read_text(encoding="utf-8-sig")
        return json.loads(text, parse_constant=refuse, object_pairs_hook=no_duplicates)
    except OSError as error:
        raise PqkError(cannot_read(file, error)) from error
    except RecursionError as error:
        raise PqkError(f"{file}: not a log: nested too deeply") from error
    except ValueError as error:
        raise PqkError(f"{file}: bad JSON: {error}") from error


def _upgrade(record: Any, where: str) -> Any:
    """Converts a record of an older version to the current one."""
    if not isinstance(record, dict) or "schema_version" not in record:
        return record
    current = schema_version()
    asked = record["schema_version"]
    match = re.fullmatch(r"([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})", asked) if isinstance(asked, str) else None
    if match is None or asked == current:
        return record
    version, known = tuple(map(int, match.groups())), tuple(map(int, current.split(".")))
    if version > known:
        raise PqkError(f"{where}: schema_version {asked} is newer than {current}, which this pqk reads; update pqk")
    if version < (1, 0, 0):
        raise PqkError(f"{where}: schema_version {asked} is older than 1.0.0, the first one; write the log again")
    if version < (1, 1, 0):
        record = _from_1_0(record)
    properties = load_schema()["properties"]
    record = {**dict.fromkeys(properties), **record, "schema_version": current}
    if version < (2, 0, 0):
        older = {name: rules["x-older"] for name, rules in properties.items() if "x-older" in rules}
        record |= {**older, "metrics": metrics_of(record)}
    return record


def _from_1_0(record: dict[str, Any]) -> dict[str, Any]:
    """Renames the values of schema 1.0 to the current names (`x-1.0` in the schema).

    Its speedup_vs_fp32 was against the Teacher in a float row and against the same model in a quantized row.
    """
    new = dict(record)
    speed, quantized = new.pop("speedup_vs_fp32", None), record.get("quantizer") is not None
    hashes = record.get("hashes")
    own_is_teacher = not (isinstance(hashes, dict) and "teacher" in hashes)
    if not quantized or own_is_teacher:
        new["speedup_vs_teacher_f32"] = speed
    if quantized or own_is_teacher:
        new["speedup_vs_own_f32"] = speed
    before = names_of_1_0()
    new |= {name: None if was is None else record.get(was) for name, was in before.items()}
    main = new.get("main_metric")
    new["main_metric"] = next((name for name, was in before.items() if main is not None and was == main), main)
    return new
