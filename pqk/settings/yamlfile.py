"""Reads YAML files into frozen, validated objects, `load_spec`; each problem becomes one sentence with its line.

Only the JSON subset of YAML is read: mappings with text keys, lists, text, numbers, true/false, null. Duplicate keys,
aliases, merge keys, dates and tags are refused, so that the values of a file are those that a reader sees.
"""

from __future__ import annotations

import copy
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pqk import paths
from pqk.errors import PqkError, nearest
from pqk.files import sha256_json
from pqk.oserrors import cannot_read
from pqk.paths import shown

MAX_BYTES = 1_000_000
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}
_KINDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text (put it in quotes)",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
}

Key = tuple[str | int, ...]


class SpecError(PqkError):
    """Error for one or more problems of a config file or card; `problems` holds one sentence for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        more = len(self.problems) - 1
        super().__init__(self.problems[0] + (f" (and {more} more)" if more else ""))


class Section(BaseModel):
    """A part of a config: unknown keys refused, no silent conversions, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Spec(Section):
    """A whole config file, resolved: with its source file and the sha256 of its values."""

    _source: Path = PrivateAttr(default_factory=Path)

    @property
    def source(self) -> Path:
        """Returns the file that was read."""
        return self._source

    @property
    def sha256(self) -> str:
        """Returns the sha256 of the canonical JSON of the values, with overrides; comments and layout do not count."""
        return sha256_json(self.model_dump(mode="json"))

    @classmethod
    def laid_over(cls, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values of a file with overrides (nested) laid over them."""
        return merge(values, overrides)


AnySpec = TypeVar("AnySpec", bound=Spec)
Loaded = TypeVar("Loaded", covariant=True)


@dataclass(frozen=True)
class Document:
    """A parsed YAML mapping: its values, the name of the file in messages, and the line of each key path."""

    values: dict[str, Any]
    where: str
    lines: Mapping[Key, int] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-5 as a number, as in YAML 1.2 and other languages; keeps the first written tag."""

    tag: str | None = None  # the first that is written out, such as '!!int'
    tag_line = 0  # its line, from 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call,unused-ignore]
        tag = getattr(event, "tag", None)
        if self.tag is None and tag is not None:
            self.tag, self.tag_line = str(tag).replace("tag:yaml.org,2002:", "!!"), event.start_mark.line
        found: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[no-untyped-call,unused-ignore]
        return found


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call,unused-ignore]
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+\Z"),
    list("-+0123456789"),
)


def read_text(path: Path | str) -> str:
    """Returns the UTF-8 text of a file of at most 1 MB; raises PqkError with one sentence if it cannot be read."""
    file, name = Path(path), shown(path)
    if not file.exists():
        if file.is_symlink():
            raise PqkError(f"cannot read {name}: it is a link whose target does not exist or leads back to it")
        beside = file.parent.iterdir() if file.parent.is_dir() else ()
        siblings = [path.stem for path in beside if path.suffix == file.suffix]
        raise PqkError(f"{name}: no such file{nearest(file.stem, siblings)}")
    if not file.is_file():
        raise PqkError(f"{name}: is not a file")
    try:
        if file.stat().st_size > MAX_BYTES:
            raise PqkError(f"{name}: is larger than {MAX_BYTES} bytes, the limit for a config")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PqkError(f"{name}: is not UTF-8 text (byte {error.start} cannot be read)") from None
    except OSError as error:
        raise PqkError(cannot_read(name, error)) from None


def parse_yaml(text: str, where: str, first_line: int = 1) -> Document:
    """Parses one YAML mapping; `first_line` is the file's line number of the first line of `text`.

    A text is parsed once: a card is resolved from the same few files as the others. Raises PqkError naming `where` and
    the line.
    """
    found = _parsed(text, where, first_line)
    return replace(found, values=copy.deepcopy(found.values))


@lru_cache(maxsize=256)
def _parsed(text: str, where: str, first_line: int) -> Document:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise PqkError(f"{where}: is empty, must be a mapping of keys to values")
            if not isinstance(node, yaml.MappingNode):
                line = node.start_mark.line + first_line
                raise PqkError(f"{where}:{line}: must be a mapping of keys to values at the top")
            lines: dict[Key, int] = {}
            _walk(node, (), lines, set(), where, first_line)
            if loader.tag is not None:  # a constructor trusts a written tag, and fails on '!!int ""' in its own ways
                line = loader.tag_line + first_line
                raise PqkError(f"{where}:{line}: tags ({loader.tag}) are not used in these files; leave it out")
            values = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + first_line}" if mark else where
        problem = error.problem or "cannot be parsed"
        if "'\\t'" in problem:
            problem = "a tab is used where YAML wants spaces"
        raise PqkError(f"{place}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise PqkError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise PqkError(f"{where}: is nested too deeply") from None
    except ValueError as error:
        raise PqkError(f"{where}: a value cannot be read: {error}") from None
    return Document(values, where, lines)


def _walk(node: yaml.Node, key: Key, lines: dict[Key, int], seen: set[int], where: str, first_line: int) -> None:
    """Refuses everything that is not plain data before construction; records the line of every key path."""
    line = node.start_mark.line + first_line
    place = f"{where}:{line}"
    lines.setdefault(key, line)
    if id(node) in seen:
        raise PqkError(f"{place}: aliases (*name) are not used in these files; write the value out")
    seen.add(id(node))
    if node.tag not in _PLAIN_TAGS:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        raise PqkError(f"{place}: {key_text(key)} is read as {kind!r}; put text in quotes")
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for name_node, value_node in node.value:
            name_place = f"{where}:{name_node.start_mark.line + first_line}"
            if not isinstance(name_node, yaml.ScalarNode) or name_node.tag != "tag:yaml.org,2002:str":
                shown_key = name_node.value if isinstance(name_node, yaml.ScalarNode) else "a list or a mapping"
                raise PqkError(f"{name_place}: the key {shown_key} is not text; put it in quotes")
            name = name_node.value
            if name in names:
                raise PqkError(f"{name_place}: the key {key_text((*key, name))} is given twice")
            names.add(name)
            lines[(*key, name)] = name_node.start_mark.line + first_line
            _walk(value_node, (*key, name), lines, seen, where, first_line)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*key, index), lines, seen, where, first_line)
    elif node.tag.endswith((":int", ":float")) and ":" in node.value:
        raise PqkError(f"{place}: {key_text(key)} is read as a number in base 60; put text in quotes")
    elif node.tag.endswith((":int", ":float")) and re.match(r"[-+]?0[0-9_]", node.value):
        raise PqkError(
            f"{place}: {key_text(key)} is {node.value}, which YAML may read in base 8: write the number without "
            "leading zeros; put text in quotes"
        )
    elif node.tag.endswith(":float") and not math.isfinite(_number(node.value)):
        raise PqkError(f"{place}: {key_text(key)} is {node.value} but must be a finite number")


def _number(text: str) -> float:
    """Returns the value of a YAML float, which may be written .inf or .nan and with underscores."""
    plain = text.lower().replace("_", "")
    return float(plain.replace(".inf", "inf").replace(".nan", "nan"))


def key_text(key: Sequence[str | int]) -> str:
    """Returns a key path as text: ('a', 'b', 0) as 'a.b[0]'."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def expand(overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Converts dotted keys to nested mappings: {'a.b': 1, 'a': {'c': 2}} -> {'a': {'b': 1, 'c': 2}}.

    Raises PqkError when one value is given twice or a key has an empty part.
    """
    result: dict[str, Any] = {}
    for dotted, value in overrides.items():
        parts = str(dotted).split(".")
        if not all(parts):
            raise PqkError(f"{where}: {dotted!r} is not a key")
        nested = expand(value, where) if isinstance(value, Mapping) else value
        for part in reversed(parts):
            nested = {part: nested}
        result = join(result, nested, where)
    return result


def join(left: Mapping[str, Any], right: Mapping[str, Any], where: str, key: Key = ()) -> dict[str, Any]:
    """Joins two nested mappings. Raises PqkError when both have the key of the same value."""
    joined = dict(left)
    for name, value in right.items():
        if name not in joined:
            joined[name] = value
        elif isinstance(joined[name], Mapping) and isinstance(value, Mapping):
            joined[name] = join(joined[name], value, where, (*key, name))
        else:
            raise PqkError(f"{where}: the key {key_text((*key, name))} is given twice")
    return joined


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with `overrides` (nested) applied: mappings merge key by key, every other value is replaced."""
    merged = dict(base)
    for name, value in overrides.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def load_spec(
    model: type[AnySpec], path: Path, overrides: Mapping[str, Any] | None, origin: str, section: str
) -> AnySpec:
    """Reads and validates a file, applies `overrides`, and validates again.

    origin: source of the overrides, section: the config they change; both are used in messages only. Raises PqkError
    (SpecError when values are wrong).
    """
    document = parse_yaml(read_text(path), shown(path))
    spec = validate(model, document, path)
    if not overrides:
        return spec
    values = model.laid_over(document.values, expand(overrides, origin))
    return validate(model, Document(values, origin), path, prefix=f"{section}.")


class ConfigLoader(Protocol[Loaded]):
    """Reads one of the files in configs/."""

    def __call__(
        self, path: Path | str | None = None, overrides: Mapping[str, Any] | None = None, origin: str = "overrides"
    ) -> Loaded:
        """Reads the project's file (or `path`) and lays `overrides` (nested or dotted keys) over it.

        origin: source of the overrides in messages. Raises PqkError.
        """


def config_loader(model: type[AnySpec], section: str) -> ConfigLoader[AnySpec]:
    """Returns the reader of configs/SECTION.yaml."""

    def load(
        path: Path | str | None = None, overrides: Mapping[str, Any] | None = None, origin: str = "overrides"
    ) -> AnySpec:
        file = Path(path) if path is not None else paths.configs(paths.project_root()) / f"{section}.yaml"
        return load_spec(model, file, overrides, origin, section)

    return load


def validate(model: type[AnySpec], document: Document, source: Path, prefix: str = "") -> AnySpec:
    """Builds the model from a document; raises SpecError with one sentence for each problem."""
    try:
        spec = model.model_validate(document.values)
    except ValidationError as error:
        # Unknown keys first: a misspelt key is also why the right one is missing.
        items = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        raise SpecError([_sentence(model, item, document, prefix) for item in items]) from None
    spec._source = source
    return spec


def _sentence(model: type[BaseModel], error: ErrorDetails, document: Document, prefix: str) -> str:
    key: Key = error["loc"]
    near = next((document.lines[key[:n]] for n in range(len(key), -1, -1) if key[:n] in document.lines), None)
    place = document.where if near is None else f"{document.where}:{near}"
    name = prefix + key_text(key)
    kind = error["type"]
    if kind == "extra_forbidden":
        allowed = _names_at(model, key[:-1])
        hint = nearest(str(key[-1]), allowed) or f" (allowed here: {', '.join(allowed)})"
        return f"{place}: unknown key {name!r}{hint}"
    if kind == "missing":
        return f"{place}: the key {name!r} is missing"
    rule = _rule(model, error)
    value = error["input"]
    if not rule.startswith("must") or (kind == "value_error" and isinstance(value, Mapping)):
        return f"{place}: {name + ' ' if key else ''}{rule}"
    text = repr(value)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else text
    return f"{place}: {name} is {text if len(text) <= 60 else text[:57] + '...'} but {rule}"


def _rule(model: type[BaseModel], error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in _KINDS:
        return _KINDS[kind]
    if kind in {"greater_than_equal", "less_than_equal", "greater_than", "less_than"}:
        return _range(model, error["loc"]) or f"must hold: {error['msg']}"
    if kind == "literal_error":
        expected = str(context["expected"])
        allowed = re.findall(r"'([^']*)'", expected)
        return f"must be {expected}{nearest(str(error['input']), allowed)}"
    if kind == "multiple_of":
        return f"must be a multiple of {context['multiple_of']}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}"
    if kind in {"too_short", "too_long"}:
        few, many = context.get("min_length"), context.get("max_length")
        return f"must have {f'at least {few}' if kind == 'too_short' else f'at most {many}'} items"
    if kind in {"string_too_short", "string_too_long"}:
        few, many = context.get("min_length"), context.get("max_length")
        return f"must have {f'at least {few}' if few is not None else f'at most {many}'} characters"
    return f"must be valid: {error['msg']}"


def _range(model: type[BaseModel], key: Key) -> str:
    """Returns the whole allowed range of a numeric field in words, so that one message shows both ends."""
    info = _field_at(model, key)
    if info is None:
        return ""
    bounds = {type(m).__name__.lower(): getattr(m, type(m).__name__.lower(), None) for m in info.metadata}
    low = f"at least {bounds['ge']}" if "ge" in bounds else f"more than {bounds['gt']}" if "gt" in bounds else ""
    high = f"at most {bounds['le']}" if "le" in bounds else f"less than {bounds['lt']}" if "lt" in bounds else ""
    if "ge" in bounds and "le" in bounds:
        return f"must be from {bounds['ge']} to {bounds['le']}"
    ends = " and ".join(part for part in (low, high) if part)
    return f"must be {ends}" if ends else ""


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model class inside X, X | None or tuple[X, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)
    return None


def _field_at(model: type[BaseModel], key: Key) -> FieldInfo | None:
    current: type[BaseModel] | None = model
    info: FieldInfo | None = None
    for part in key:
        if isinstance(part, int):
            continue
        info = current.model_fields.get(part) if current is not None else None
        current = _model_in(info.annotation) if info is not None else None
    return info


def _names_at(model: type[BaseModel], key: Key) -> list[str]:
    if not key:
        return list(model.model_fields)
    info = _field_at(model, key)
    inner = _model_in(info.annotation) if info is not None else None
    return list(inner.model_fields) if inner is not None else []
