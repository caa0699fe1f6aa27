"""Reads the entries of a keep-list: for every graph of a model, or, after `GRAPH:`, for one graph: `keep_for`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_NAMED = re.compile(r"([a-z][a-z0-9_]*):(.*)", re.DOTALL)


def split_entry(entry: str) -> tuple[str | None, str]:
    """Returns the graph that an entry names (None: every graph) and the group or regular expression after it."""
    found = _NAMED.fullmatch(entry)
    return (found[1], found[2]) if found else (None, entry)


def keep_for(entries: Iterable[str], graph: str) -> list[str]:
    """Returns the entries for one graph, in their order, each once and without the graph's name."""
    named = (split_entry(entry) for entry in entries)
    return list(dict.fromkeys(rest for of, rest in named if of in (None, graph)))


def hint(entries: Iterable[str], graph: str, graphs: Collection[str], said: str) -> str:
    """Returns a hint to append to the error `said` of a quantizer: how to write an entry for a single graph.

    Empty when the error quotes no entry for all graphs, or there is no other graph.
    """
    others = [name for name in graphs if name != graph]
    if not others or not any(split_entry(entry)[0] is None and repr(entry) in said for entry in entries):
        return ""
    which = "both graphs" if len(graphs) == 2 else "every graph"
    return f"; an entry must match in {which}, or name its graph: '{others[0]}:...'"


def keep_patterns(names: Collection[str]) -> list[str]:
    """Returns keep-list entries that match exactly these nodes; `GRAPH:NAME` is the node of that graph alone."""
    named = (split_entry(name) for name in names)
    return [f"{graph}:^{re.escape(node)}$" if graph else f"^{re.escape(node)}$" for graph, node in named]
