"""Changes by a cut, part by part: names, sums over parts, and the note on parts that are no faster."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqk.families.dust3r.parts import KINDS, part_of
from pqk.measure.block_profile import REST, _part
from pqk.recipe.block_profile import PartChange, clause, summed
from pqk.report.parts import write_parts


@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [
        ("enc_blocks.11.mlp.fc1.weight", "enc_blocks.11.mlp", "encoder MLPs"),
        ("/enc_blocks.0/attn/qkv/Add", "enc_blocks.0.attn", "encoder attention"),
        ("dec_blocks2.1.cross_attn.projk.bias", "dec_blocks2.1.cross_attn", "decoder attention"),
        ("/dec_blocks.1/mlp/fc2/MatMul/DequantizationMultiply", "dec_blocks.1.mlp", "decoder MLPs"),
        ("/downstream_head2/dpt/head.0/Conv/WithoutBiases", "downstream_head2", "heads"),
        ("image_abcd_acdb_/patch_embed/proj/Conv/WithoutBiases", REST, REST),
        ("/enc_blocks.0/Add_1", REST, REST),
        ("enc_blocks.0.norm1.weight", REST, REST),
    ],
)
def test_names_of_weights_and_nodes(name: str, part: str, kind: str) -> None:
    assert _part(name, part_of) == (part, kind)
    assert kind in (*KINDS, REST)


def test_a_name_that_tells_nothing() -> None:
    assert _part("MVN_20905", part_of) is None


def entry(params: int, flops: float, *times: float) -> dict[str, Any]:
    return {"params": params, "flops": flops, "time_ms": list(times) or None}


def held_against(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[PartChange]:
    """The rows of two sides, whose parts get the kinds that their names have."""
    sides = [{name: {"kind": (part_of(name) or (REST, REST))[1], **part} for name, part in side.items()}
             for side in (before, after)]  # fmt: skip
    return summed(sides[0], sides[1], (*KINDS, REST))


def test_a_part_is_faster_when_it_is_so_in_every_round() -> None:
    before = {"enc_blocks.0.mlp": entry(100, 10.0, 4.0, 2.0, 4.0), "downstream_head1": entry(50, 8.0, 2.0, 2.0, 2.0)}
    after = {"enc_blocks.0.mlp": entry(40, 4.0, 2.0, 1.5, 1.0), "downstream_head1": entry(40, 7.0, 1.0, 2.1, 1.0)}
    rows = {row.name: row for row in held_against(before, after)}
    assert list(rows) == ["encoder MLPs", "heads", "enc_blocks.0.mlp", "downstream_head1"]
    mlps, heads = rows["encoder MLPs"], rows["heads"]
    assert (mlps.params, mlps.flops, mlps.time_ms) == ((100, 40), (10.0, 4.0), (4.0, 1.5))
    assert mlps.ratio == (0.25, 0.5, 0.75)  # within each round: 0.5, 0.75, 0.25
    assert mlps.faster and heads.cut and heads.faster is False
    said = clause(list(rows.values()))
    assert said is not None and said.endswith("0.50x in encoder MLPs; no faster: heads (0.50x)")


def test_what_was_not_cut_is_not_told_of_and_what_was_not_timed_is_null(tmp_path: Path) -> None:
    whole = {"enc_blocks.0.mlp": entry(100, 10.0, 4.0), "downstream_head1": entry(50, 8.0, 2.0)}
    assert clause(held_against(whole, whole)) is None
    untimed = {"enc_blocks.0.mlp": entry(100, 10.0), "downstream_head1": entry(50, 8.0)}
    rows = held_against(untimed, {**untimed, "enc_blocks.0.mlp": entry(50, 5.0)})
    assert clause(rows) is None and all(row.time_ms is None and row.faster is None for row in rows)
    (line,) = [row for row in read(write_parts(rows, tmp_path / "parts.csv")) if row["part"] == "enc_blocks.0.mlp"]
    assert (line["params_before"], line["params_after"], line["gflops_after"]) == ("100", "50", "0.0")
    assert line["time_after_ms"] == line["time_ratio_median"] == line["faster"] == ""


def test_blocks_that_are_counted_anew_are_not_held_against_each_other() -> None:
    """Without its second block an encoder's third is called the second: only their kind can be compared."""
    part = entry(10, 1.0, 1.0)
    before = {"enc_blocks.0.mlp": part, "enc_blocks.1.mlp": part, "enc_blocks.0.attn": part, "dec_blocks.0.mlp": part}
    after = {"enc_blocks.0.mlp": part, "enc_blocks.0.attn": part, "dec_blocks.0.mlp": part}
    rows = {row.name: row for row in held_against(before, after)}
    assert [name for name in rows if "blocks" in name] == ["dec_blocks.0.mlp"]
    assert rows["encoder MLPs"].params == (20, 10) and rows["encoder MLPs"].faster


PARTS = [f"{stack}_blocks.{i}.{what}" for stack in ("enc", "dec") for i in range(3) for what in ("attn", "mlp")]
SIDE = st.dictionaries(
    st.sampled_from([*PARTS, "downstream_head1", "downstream_head2", REST]),
    st.builds(entry, st.integers(0, 10**9), st.floats(0, 1e12), *[st.floats(0.01, 1e3)] * 3),
)


@given(SIDE, SIDE)
def test_kinds_add_up_to_the_whole(before: dict[str, Any], after: dict[str, Any]) -> None:
    kinds = [row for row in held_against(before, after) if row.name == row.kind]
    for side, model in enumerate((before, after)):
        assert sum(row.params[side] for row in kinds) == sum(part["params"] for part in model.values())
        assert sum(row.flops[side] for row in kinds) == pytest.approx(sum(part["flops"] for part in model.values()))
    for row in kinds:
        assert row.ratio is None or row.ratio[0] <= row.ratio[1] <= row.ratio[2]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
