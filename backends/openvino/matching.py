"""Steers NNCF's search for patterns: found sooner with the same result, and attention in int8 where it may be."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any


@contextlib.contextmanager
def quick_matching() -> Iterator[None]:
    """Looks at the types of nodes before anything else, within this context.

    NNCF searches a graph for some hundred patterns with networkx, which asks first whether the neighbours of two nodes
    can fit, and then whether the nodes do. The second question is the quicker one and mostly answered with no: asked
    first, the search takes a third of the time. Both must hold, so what is found, and its order, stay the same. Most
    patterns have a node of a type that the graph lacks: they are not searched for.
    """
    from nncf.common.graph import graph_matching
    from nncf.common.graph.graph import NNCFNode

    before = graph_matching.ism

    class Matcher(before.MultiDiGraphMatcher):  # type: ignore[name-defined]
        def subgraph_isomorphisms_iter(self) -> Iterator[dict[str, str]]:
            kinds = {  # what `node_match` looks at
                (node.get(NNCFNode.NODE_TYPE_ATTR), node.get(NNCFNode.METATYPE_ATTR)): node
                for node in self.G1.nodes.values()
            }.values()
            if all(any(self.node_match(kind, wanted) for kind in kinds) for wanted in self.G2.nodes.values()):
                yield from super().subgraph_isomorphisms_iter()

        def syntactic_feasibility(self, node: Any, of_pattern: Any) -> bool:
            fits = self.node_match(self.G1.nodes[node], self.G2.nodes[of_pattern])
            return bool(fits and super().syntactic_feasibility(node, of_pattern))

    graph_matching.ism = SimpleNamespace(MultiDiGraphMatcher=Matcher)
    try:
        yield
    finally:
        graph_matching.ism = before


@contextlib.contextmanager
def attention_where_allowed(keep: Collection[str]) -> Iterator[None]:
    """Lets NNCF round the product of attention weights and values, within this context, unless `keep` has Softmax.

    For transformers NNCF leaves that product in float, whatever the keep-list says. Where a CPU multiplies int8 faster
    than bf16, it is faster rounded.
    """
    from nncf.common.graph.patterns.patterns import IgnoredPatternNames
    from nncf.openvino.quantization.ignored_patterns import OPENVINO_IGNORED_PATTERNS
    from nncf.torch.quantization.ignored_patterns import PT_IGNORED_PATTERNS

    known = [registry.registry_dict for registry in (OPENVINO_IGNORED_PATTERNS, PT_IGNORED_PATTERNS)]
    before = [dict(patterns) for patterns in known]
    if "Softmax" not in keep:
        for patterns in known:
            del patterns[IgnoredPatternNames.MULTIHEAD_ATTENTION_OUTPUT]
    try:
        yield
    finally:
        for patterns, all_of_them in zip(known, before, strict=True):
            patterns.clear()
            patterns.update(all_of_them)  # in their order
