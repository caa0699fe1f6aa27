"""Entries of a keep-list: for both graphs of a model, or, behind `encoder:` or `decoder:`, for one of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

GRAPHS = ("encoder", "decoder")


def split_entry(entry: str) -> tuple[str | None, str]:
    """The graph that an entry names (None: both) and the group or regular expression behind it."""
    graph, sign, rest = entry.partition(":")
    return (graph, rest) if sign and graph in GRAPHS else (None, entry)


def keep_for(entries: Iterable[str], graph: str) -> list[str]:
    """The entries that concern one graph, in their order, each once and without the graph's name."""
    named = (split_entry(entry) for entry in entries)
    return list(dict.fromkeys(rest for of, rest in named if of in (None, graph)))


def hint(entries: Iterable[str], graph: str, said: str) -> str:
    """What to add to the error `said` of a quantizer: how an entry for both graphs is given to the other one alone.

    Empty when the error quotes no such entry.
    """
    if not any(split_entry(entry)[0] is None and repr(entry) in said for entry in entries):
        return ""
    other = next(name for name in GRAPHS if name != graph)
    return f"; an entry must match in both graphs, or name its graph: '{other}:...'"


def keep_patterns(names: Collection[str]) -> list[str]:
    """Keep-list entries that match exactly these nodes; `decoder:NAME` is the node of that graph alone."""
    named = (split_entry(name) for name in names)
    return [f"{graph}:^{re.escape(node)}$" if graph else f"^{re.escape(node)}$" for graph, node in named]
