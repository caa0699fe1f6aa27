"""Gives records as a pandas DataFrame with typed columns: `frame`. pandas is the extra `frame`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqk import paths
from pqk.errors import NotBuilt
from pqk.record.log import read_records
from pqk.record.schema import Column, columns, validate

if TYPE_CHECKING:
    import pandas as pd

Record = Mapping[str, Any]

_DTYPES = {"number": "Float64", "integer": "Int64", "string": "string", "boolean": "boolean"}
"""pandas' types that have a null, by JSON type. Lists and objects stay as they are, in a column of type object."""
_TIMES = ("datetime", "measured_at")


def frame(source: Path | str | Iterable[Path | str] | Sequence[Record] | None = None) -> pd.DataFrame:
    """Returns a row per record, null (`pandas.NA`, `NaT`, None) where nothing was measured.

    source: files or folders of records, or records; default: logs/ of the project. The columns are, in this order:

    - those of the schema: float64, int64, text, bool with null; `datetime` and `measured_at` as times in UTC;
    - metrics of families without a column of their own, from `metrics`;
    - NAME_low and NAME_high, the 95 % interval of NAME;
    - executed_NAME, the share of the FLOPs that ran in the precision NAME.

    `attrs` of the frame holds `unit` and `better` (lower or higher) by column. Raises PqkError as `read_records` and
    `validate` do, and NotBuilt without pandas.
    """
    try:
        import pandas as pd
    except ImportError:
        raise NotBuilt(
            "a frame of records needs pandas, which is not installed: pip install 'pqk[frame]' or pip install pandas"
        ) from None
    records = _records(source)
    known = columns()
    made = {column.name: _typed(column, records, pd) for column in known}
    about = {column.name: {"unit": column.unit, "better": column.better} for column in known}
    for name, found in _other_metrics(records, made).items():
        made[name] = pd.array([((r["metrics"] or {}).get(name) or {}).get("value") for r in records], dtype="Float64")
        about[name] = found
    with_interval = dict.fromkeys(name for record in records for name in record["intervals"] or ())
    for name in with_interval:
        for place, end in enumerate(("low", "high")):
            ends = [((record["intervals"] or {}).get(name) or (None, None))[place] for record in records]
            made[f"{name}_{end}"] = pd.array(ends, dtype="Float64")
            about[f"{name}_{end}"] = about.get(name, {"unit": "", "better": ""})
    for name in dict.fromkeys(name for record in records for name in record["executed_precision"] or ()):
        shares = [
            None if record["executed_precision"] is None else record["executed_precision"].get(name, 0.0)
            for record in records
        ]
        made[f"executed_{name}"] = pd.array(shares, dtype="Float64")
        about[f"executed_{name}"] = {"unit": "1", "better": ""}
    table = pd.DataFrame(made)
    table.attrs = {key: {name: found[key] for name, found in about.items()} for key in ("unit", "better")}
    return table


def _records(source: Any) -> list[Record]:
    if source is None:
        source = paths.project_root() / "logs"
    if isinstance(source, Path | str):
        return [item.record for item in read_records(source)]
    items = list(source)
    if all(isinstance(item, Path | str) for item in items):
        return [item.record for item in read_records(items)]
    for number, item in enumerate(items, 1):
        validate(item, f"record {number}")
    return items


def _typed(column: Column, records: Sequence[Record], pd: Any) -> Any:
    values = [record[column.name] for record in records]
    if column.name in _TIMES:
        return pd.Series(pd.to_datetime(pd.Series(values, dtype="object"), utc=True))
    if column.kind in _DTYPES:
        return pd.array(values, dtype=_DTYPES[column.kind])
    return pd.Series(values, dtype="object")


def _other_metrics(records: Sequence[Record], taken: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Returns unit and direction of the metrics that have no column, by name."""
    return {
        name: {"unit": about["unit"] or "1", "better": about["better"]}
        for record in records
        for name, about in (record["metrics"] or {}).items()
        if name not in taken
    }
