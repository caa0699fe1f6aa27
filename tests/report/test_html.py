"""The HTML report: what it holds, what it refuses, and that nothing from a record is ever markup."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from report_toys import ENGINE, EVIL, REPOSITORY, project_of, records_of, toy_points

from pqk.cli.app import app
from pqk.errors import CheckFailed, PqkError
from pqk.report.html.charts import charts_of, intervals
from pqk.report.html.extras import command_of, environments_of
from pqk.report.html.page import gather, render, write_html
from pqk.report.html.rows import labels_of, table_of
from pqk.report.html.scene import read_points, scene_of, write_points
from pqk.report.html.sources import find
from pqk.report.html.words import _WORDS, words

T = words("en")


class Page(HTMLParser):
    """The tags of a page, with what must never come from a record: scripts, handlers, addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.tags or self.tags[-1][0] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture
def records(make_record: Any) -> list[dict[str, Any]]:
    return records_of(make_record)


@pytest.fixture
def root(tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    return project_of(tmp_path / "project", records)


def test_one_file_with_everything_and_no_address(root: Path) -> None:
    written = write_html("B1", root / "reports" / "B1.html", root)
    text = written.read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < 10_000_000
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
    assert [tag for tag, _ in page.tags].count("script") == 4  # two of data, plotly's, our own
    shown = " ".join(page.text)
    for said in (
        "+0.40 % [-0.10, +0.90], over 3 scenes",
        "ok: quality drop 0.4 % (at most 1 %)",
        "int8 90 % / f32 10 %",
    ):
        assert said in shown
    for said in ("pqk run B1 --backend openvino --quantizer nncf", ENGINE, "MLPs", "8 images", "40.0 %", "a CPU"):
        assert said in shown
    write_html("B1", root / "reports" / "again.html", root)
    assert (root / "reports" / "again.html").read_bytes() == written.read_bytes()


def test_a_hostile_record_is_only_text(root: Path, records: list[dict[str, Any]]) -> None:
    texts = ("model", "device", "notes", "run_id", "backend", "quantizer", "workload_version", "eval_version", "commit")
    evil = {**records[1], **dict.fromkeys(texts, EVIL), "scenes": [EVIL], "verdict_reasons": [EVIL]}
    evil |= {"exp_id": EVIL, "machine": {EVIL: EVIL}, "versions": {"torch": EVIL}}
    evil["samples"] = {"pair": [1.0, 2.0], EVIL: [0.5, 0.7]}
    (root / "logs" / "evil.json").write_text(json.dumps(evil), encoding="utf-8")
    page = Page(write_html(None, root / "r.html", root).read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in page.tags)
    assert EVIL in "".join(page.text)


def test_texts_of_charts_are_escaped_for_plotly_too(records: list[dict[str, Any]]) -> None:
    evil = {**records[1], "exp_id": "<a href='javascript:x'>", "samples": {"pair": [1.0], "<b>": [1.0]}}
    charts = charts_of([evil], labels_of([evil]), None, T)
    drawn = json.dumps(charts)
    assert "<a" not in drawn and "<b>" not in drawn and "&lt;a href" in drawn


@pytest.mark.parametrize("section", ["parity", "explain", "blocks", "ablations", "points"])
def test_a_section_without_data_names_its_command(tmp_path: Path, records: list[dict[str, Any]], section: str) -> None:
    root = project_of(tmp_path / "p", records)
    shutil.rmtree(root / "reports")
    text = render(gather(find("B1", root), root, T), "en")
    part = text.split(f'<section id="{section}">')[1].split("</section>")[0]
    said = re.findall(r"Not there\.[^<]* (?i:make it): <code>(pqk [^<]+)</code>", part)
    assert len(said) == 1
    command: Any = typer.main.get_command(app)
    verb, *rest = shlex.split(said[0])[1:]
    command.get_command(None, verb).make_context(verb, rest)


def test_commands_are_as_given_where_the_record_has_them(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    for number, given in enumerate((None, "pqk run B1 --model OUTSIDE/mine")):
        root = project_of(tmp_path / str(number), [{**each, "command": given} for each in records])
        text = render(gather(find("B1", root), root, T), "en")
        assert ("Records before schema 2.1" in text) is (given is None)
        assert ("<code>pqk run B1 --model OUTSIDE/mine</code>" in text) is (given is not None)


def test_names(root: Path, records: list[dict[str, Any]]) -> None:
    assert find("B1", root).cards == ("B1",)
    assert find(None, root).cards is None
    with pytest.raises(PqkError, match=r"'B2' is no card, plan or deliverable here \(did you mean 'B1'\?\); cards: B1"):
        find("B2", root)
    with pytest.raises(PqkError, match="no card, plan or deliverable"):
        find("../../etc", root)
    (root / "schedule" / "plans").mkdir()
    shutil.copy(REPOSITORY / "schedule" / "plans" / "results.yaml", root / "schedule" / "plans")
    assert find("results", root).records
    for path in (root / "logs").glob("*.json"):
        path.unlink()
    with pytest.raises(PqkError, match=r"no record of B1 in .*logs; first: pqk run B1 --backend openvino$"):
        find("B1", root)
    with pytest.raises(PqkError, match=r"no record of results in .*logs; first: pqk plan results --run$"):
        find("results", root)
    with pytest.raises(PqkError, match=r"no records in .*logs; first: pqk run B1 --backend openvino$"):
        write_html(None, root / "reports" / "all.html", root)
    assert not (root / "reports" / "all.html").exists()


def test_wrong_language_and_ending(root: Path) -> None:
    with pytest.raises(PqkError, match=r"--lang fr: there are en, zh"):
        write_html("B1", root / "r.html", root, "fr")
    with pytest.raises(PqkError, match=r"the name of a report ends in \.html"):
        write_html("B1", root / "r.htm", root)


def test_every_word_is_there_in_both_languages_and_used() -> None:
    html = REPOSITORY / "pqk" / "report" / "html"
    source = "".join(path.read_text(encoding="utf-8") for path in html.iterdir() if path.suffix in (".py", ".j2"))
    source = source.replace((html / "words.py").read_text(encoding="utf-8"), "")
    for name, (english, chinese) in _WORDS.items():
        assert (english and chinese and english != chinese) or name in ("teacher",), name
        assert re.findall(r"\{\d\}", english) == sorted(re.findall(r"\{\d\}", english)), name
        assert sorted(re.findall(r"\{\d\}", english)) == sorted(re.findall(r"\{\d\}", chinese)), name
        known = ("pass", "fail", "undecided", "stopped", "failed", "unavailable", "agree", "differ", "not compared")
        assert name in (*known, "lower", "higher", "teacher", "candidate", "baseline") or re.search(
            rf"""t\.{name}\b|["']{name}["']""", source
        ), name


def test_a_deliverable_has_intervals_over_its_draws(tmp_path: Path) -> None:
    project = project_of(tmp_path / "p", [])
    shutil.copytree(REPOSITORY / "deliverables" / "results-3", project / "deliverables" / "results-3")
    page = gather(find("results-3", project), project, T)
    assert [recipe["word"] for recipe in page["recipes"]].count("undecided") == 2
    assert all("over 5 draws" in recipe["drop"] for recipe in page["recipes"])
    assert len(page["table"]["rows"]) == 32 and len(page["ablations"]) == 5
    (project / "deliverables" / "results-3" / "runs.tsv").open("a").write("\n")
    with pytest.raises(CheckFailed, match="is not as it was frozen"):
        find("results-3", project)


def test_a_deliverable_without_records_shows_its_evaluations(tmp_path: Path) -> None:
    project = project_of(tmp_path / "p", [])
    shutil.copytree(REPOSITORY / "deliverables" / "detection", project / "deliverables" / "detection")
    text = render(gather(find("deliverables/detection/", project), project, T), "en")
    assert "Evaluations" in text and "Not part of this deliverable." in text


def test_labels_are_short_and_differ(records: list[dict[str, Any]]) -> None:
    assert labels_of(records) == ["B1 teacher f32", "B1 candidate int8"]
    again = [*records, {**records[1], "train_seed": 1}, records[1]]
    assert len(set(labels_of(again))) == 4


def test_the_table_sorts_by_numbers_and_leaves_equal_texts_out(records: list[dict[str, Any]]) -> None:
    table = table_of(records, labels_of(records), T)
    names = [heading["text"] for heading in table["headings"]]
    assert "drop % ↓" in names and "against" not in names
    drop = names.index("drop % ↓")
    assert [row["cells"][drop]["sort"] for row in table["rows"]] == [0.0, 0.4]
    assert table["rows"][1]["cells"][drop]["below"] == "±0.50"


def test_no_axis_is_narrower_than_what_is_known(records: list[dict[str, Any]]) -> None:
    (chart,) = charts_of(records, labels_of(records), None, T)["pareto"]
    low, high = chart["layout"]["yaxis"]["range"]
    assert low < -0.1 and high > 0.9
    left, right = chart["layout"]["xaxis"]["range"]
    assert left < 1.0 and right > 2.1
    close = intervals("x", "x", [("a", 0.01, None, None), ("b", 0.02, None, None)], "drop")
    low, high = close["layout"]["xaxis"]["range"]
    assert high - low >= 1.0


def test_graphs_are_summed_over_their_calls(records: list[dict[str, Any]]) -> None:
    twice = {**records[0], "samples": {"pair": [10.0, 10.0], "first": [1.0, 2.0, 1.0, 2.0], "odd": [1.0, 1.0, 1.0]}}
    (chart,) = charts_of([twice], ["x"], None, T)["graphs"]
    assert {trace["name"]: trace["x"] for trace in chart["data"]} == {"first": [3.0], "glue": [7.0]}


def test_commands_and_machines(records: list[dict[str, Any]]) -> None:
    assert command_of({**records[1], "train_seed": 2, "eval_seed": 2}).endswith("--quantizer nncf --seed 2")
    assert command_of({**records[1], "train_seed": 2}).endswith("--set workload.seeds.train=2")
    other = {**records[1], "device": "another", "machine": None}
    assert [each["rows"] for each in environments_of([*records, other, *records], T)] == ["1-2, 4-5", "3"]


def test_point_maps_come_back_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    maps = toy_points()
    again = read_points(write_points(tmp_path / "a.npz", maps))
    assert again is not None and again.about == maps.about
    np.testing.assert_array_equal(again.points, maps.points)
    scene = scene_of(again, "scene-0")
    assert scene["drawn"] == 2000 and scene["pictures"][0]["mean"] == 1.5 and scene["pictures"][1]["mean"] is None
    (tmp_path / "b.npz").write_bytes(b"PK not a file")
    assert read_points(tmp_path / "b.npz") is None
    whole = (tmp_path / "a.npz").read_bytes()
    for damaged in (b"", whole[:100], whole[:-100], whole[:200] + bytes(64) + whole[264:]):
        (tmp_path / "c.npz").write_bytes(damaged)
        assert read_points(tmp_path / "c.npz") is None


def test_point_maps_of_another_candidate_are_not_shown(root: Path, records: list[dict[str, Any]]) -> None:
    assert len(gather(find("B1", root), root, T)["scenes"]) == 1
    other = {**records[1], "hashes": {"engine": "ef" * 32}}
    (root / "logs" / "1.json").write_text(json.dumps(other))
    assert gather(find("B1", root), root, T)["scenes"] == []
