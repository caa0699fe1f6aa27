"""Ranks quantized nodes by their share of a graph's error: one node, or one group, is put back to float at a time.

How a node goes back to float is each backend's own part, its `backends.base.Surgery`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np

from backends.base import BackendError, Feeds, Surgery, nearest

After = Callable[[list[Feeds]], list[Feeds]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class NodeShare:
    """The cost of a node (or a group of nodes): `share` of the error is gone when it alone computes in float.

    share = (error_all - error_without) / error_all. Errors are those of `mean_error`. Roundings flip when anything
    changes, so a node without influence shows a small share of either sign, and shares need not add up to 1.
    """

    name: str
    nodes: tuple[str, ...]
    share: float
    error_all: float
    error_without: float


def node_groups(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Groups nodes by the part of the model that they belong to, in order of their first node.

    The part is the name up to its first numbered block ('/blocks.7/attn/proj/MatMul' -> 'blocks.7'), else its
    first component ('/head/out.0/Conv' -> 'head'). A name without components belongs to
    the node before it; where no name has any, as other exporters write them, runs of about sqrt(count) are groups.
    """
    scoped = [name for name in names if "/" in name.strip("/")]
    groups: dict[str, list[str]] = {}
    if scoped:
        part = _part(scoped[0])
        for name in names:
            part = _part(name) if "/" in name.strip("/") else part
            groups.setdefault(part, []).append(name)
    else:
        size = math.isqrt(max(len(names) - 1, 0)) + 1
        for k in range(0, len(names), size):
            run = names[k : k + size]
            groups[f"{run[0]} .. {run[-1]}"] = list(run)
    return {name: tuple(members) for name, members in groups.items()}


def _part(name: str) -> str:
    parts = name.strip("/").split("/")
    end = next((i for i, part in enumerate(parts[:-1]) if re.search(r"(block|layer|stage)s?\d*\.\d+$", part)), 0)
    return "/".join(parts[: end + 1])


def rank_nodes(
    surgery: Surgery,
    feeds: Sequence[Feeds],
    reference: Sequence[Feeds] | None = None,
    names: Iterable[str] | Mapping[str, Sequence[str]] | None = None,
    after: After | None = None,
    progress: Progress | None = None,
    known: MutableMapping[str, float] | None = None,
) -> list[NodeShare]:
    """Returns the shares of the quantized graph's error, the largest first.

    feeds: inputs of the graph, one or two suffice. reference: what the outputs are compared with, one item for each
    item that is compared; by default the float graph's outputs. names: nodes, or groups of nodes by name; by default
    every quantized node. after: computes what is compared from the outputs of all feeds (the outputs of a graph that
    follows this one), so that errors of several graphs share one scale. progress: called with done, total and name
    before each measurement. known: errors that were measured before, by the names of the nodes that were in float, a
    line each; those that are measured now are added. Everything unquantized computes in f32. Memory holds one graph
    with one set of changes at a time, and no activations but the outputs. Raises BackendError for an unknown name and
    when there are no feeds.
    """
    if not feeds:
        raise BackendError("there is nothing to rank on: no feeds")
    groups = _as_groups(names, surgery.nodes)
    for members in groups.values():
        check_names(members, surgery.nodes, "the graph")
    if reference is None:
        reference = _compared(surgery.infer_plain(feeds), after)

    errors = {} if known is None else known

    def error(members: Sequence[str]) -> float:
        key = "\n".join(members)
        if key not in errors:
            errors[key] = mean_error(_compared(surgery.infer(members, feeds), after), reference)
        return errors[key]

    total = len(groups) + 1
    if progress:
        progress(0, total, "all nodes in int8")
    error_all = error(())
    shares = []
    for done, (name, members) in enumerate(groups.items(), 1):
        if progress:
            progress(done, total, name)
        without = error(members)
        share = (error_all - without) / error_all if error_all else 0.0
        shares.append(NodeShare(name, tuple(members), share, error_all, without))
    return sorted(shares, key=lambda item: -item.share)


def rank_by_groups(
    surgery: Surgery,
    feeds: Sequence[Feeds],
    reference: Sequence[Feeds] | None = None,
    detail: int = 3,
    least: float = 0.02,
    after: After | None = None,
    progress: Progress | None = None,
    known: MutableMapping[str, float] | None = None,
) -> tuple[list[NodeShare], list[NodeShare]]:
    """Returns the shares of the groups of `node_groups`, and of the single nodes of the `detail` worst; both sorted.

    Groups with a share below `least` are not looked into. The other arguments are those of `rank_nodes`.
    """
    if reference is None and feeds:
        reference = _compared(surgery.infer_plain(feeds), after)
    known = {} if known is None else known
    ranked = rank_nodes(surgery, feeds, reference, node_groups(surgery.nodes), after, progress, known)
    chosen = [name for group in ranked[:detail] if group.share >= least for name in group.nodes]
    if not chosen:
        return ranked, []
    return ranked, rank_nodes(surgery, feeds, reference, chosen, after, progress, known)


def mean_error(got: Sequence[Feeds], want: Sequence[Feeds]) -> float:
    """Returns the mean over outputs and items of mean|got - want| / mean|want|; inf for a value that is not finite."""
    if len(got) != len(want):
        raise BackendError(f"{len(got)} results cannot be compared with {len(want)}")
    errors = []
    for ours, theirs in zip(got, want, strict=True):
        for name, reference in theirs.items():
            scale = float(np.mean(np.abs(reference), dtype=np.float64))
            apart = float(np.mean(np.abs(ours[name] - reference), dtype=np.float64))
            errors.append((apart / scale if scale else math.inf) if apart else 0.0)
    found = float(np.mean(errors))
    return found if math.isfinite(found) else math.inf


def check_names(names: Iterable[str], known: Sequence[str], graph: str) -> None:
    """Raises BackendError for a name that is none of the quantized nodes `known` of `graph`."""
    for name in names:
        if name not in known:
            raise BackendError(f"{graph} has no quantized node {name!r}{nearest(name, known)}")


def other_model(kind: str, name: str) -> BackendError:
    """Returns the error for a node that the float graph does not have by type and name."""
    return BackendError(f"the float graph has no {kind} {name!r}: it is of another model")


def _as_groups(names: Iterable[str] | Mapping[str, Sequence[str]] | None, known: Sequence[str]) -> dict[str, list[str]]:
    if isinstance(names, Mapping):
        return {name: list(members) for name, members in names.items()}
    return {name: [name] for name in (known if names is None else names)}


def _compared(outputs: list[Feeds], after: After | None) -> list[Feeds]:
    return after(outputs) if after else outputs
