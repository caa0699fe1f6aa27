"""Keep-list entries for both graphs of a model and for one of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqk.errors import PqkError
from pqk.recipe.experiment import resolve
from pqk.settings.card import load_card
from pqk.settings.keep import hint, keep_for, split_entry
from pqk.settings.quant import load_quant

GRAPHS = ("encoder", "decoder")
patterns = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: split_entry(text)[0] is None)
entries = st.lists(st.tuples(st.sampled_from([None, *GRAPHS]), patterns), max_size=12)


def written(graph: str | None, pattern: str) -> str:
    return f"{graph}:{pattern}" if graph else pattern


@given(st.sampled_from(GRAPHS), patterns)
def test_an_entry_is_read_as_it_is_written(graph: str, pattern: str) -> None:
    assert split_entry(written(graph, pattern)) == (graph, pattern)
    assert split_entry(pattern) == (None, pattern)


@given(entries)
def test_each_graph_gets_what_concerns_it_once_and_in_order(pairs: list[tuple[str | None, str]]) -> None:
    listed = [written(*pair) for pair in pairs]
    for graph in GRAPHS:
        mine = [pattern for of, pattern in pairs if of in (None, graph)]
        found = keep_for(listed, graph)
        assert set(found) == set(mine)
        assert len(found) == len(set(found))
        assert [mine.index(pattern) for pattern in found] == sorted(mine.index(pattern) for pattern in found)
    if all(of is None for of, _ in pairs):
        assert keep_for(listed, "encoder") == keep_for(listed, "decoder") == list(dict.fromkeys(listed))


def test_a_graph_is_a_plain_name() -> None:
    assert split_entry("(?:a|b):c") == (None, "(?:a|b):c")
    assert split_entry("head:x") == ("head", "x")
    assert split_entry("decoder:a:b") == ("decoder", "a:b")
    assert keep_for(["LayerNorm", "encoder:Softmax", "decoder:^/x$"], "decoder") == ["LayerNorm", "^/x$"]


def test_a_graph_that_the_family_does_not_have_is_refused() -> None:
    settings = {"quant.ptq.keep_list": ["encodr:Softmax"]}
    with pytest.raises(PqkError, match=r"names the graph 'encodr' \(did you mean 'encoder'\?\); .* encoder, decoder"):
        resolve(load_card("B1"), settings=settings)


def test_one_graph_alone_needs_no_hint() -> None:
    assert hint(["a.b"], "net", ["net"], "keep entry 'a.b' matches no node") == ""


def test_the_hint_is_for_entries_that_stand_for_both_graphs() -> None:
    listed = ["LayerNorm", "a.b", "encoder:c.d"]
    assert hint(listed, "encoder", GRAPHS, "keep entry 'a.b' matches no node") == (
        "; an entry must match in both graphs, or name its graph: 'decoder:...'"
    )
    assert hint(listed, "encoder", GRAPHS, "keep entry 'c.d' matches no node") == ""
    assert hint(listed, "decoder", GRAPHS, "no disk") == ""


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("encoder:LayerNrom", "'encoder:LayerNrom' is neither.*'LayerNorm'"),
        ("decoder:", "'decoder:' is neither"),
        ("decoder:(a", "'decoder:\\(a' is not one"),
    ],
)
def test_what_stands_behind_the_graph_is_checked_too(entry: str, says: str) -> None:
    with pytest.raises(PqkError, match=says):
        load_quant(overrides={"ptq.keep_list": [entry]})


def test_a_keep_list_of_all_kinds_is_accepted() -> None:
    listed = ["LayerNorm", "encoder:Softmax", "decoder:^/dec_blocks\\.0/", "x/y", "encoder:x/y"]
    assert load_quant(overrides={"ptq.keep_list": listed}).ptq.keep_list == tuple(listed)
