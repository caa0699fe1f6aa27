"""Notes of a quantizer on both graphs of a model."""

from __future__ import annotations

from pqk.compress.tasks.quantize import merge_notes


def test_notes_of_one_graph_name_it_and_shared_ones_come_once() -> None:
    found = merge_notes({"encoder": ["7 bits", "channels 1, 2"], "decoder": ["7 bits", "not smoothed: a"]})
    assert found == ["7 bits", "encoder: channels 1, 2", "decoder: not smoothed: a"]
    assert merge_notes({"encoder": ["7 bits"]}) == ["7 bits"]
    assert merge_notes({}) == []
