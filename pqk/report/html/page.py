"""Writes a report as one HTML file that needs no network: `write_html`.

Everything is gathered into plain dictionaries and put into `template.html.j2`, where every text is escaped; charts are
data for plotly's script, which the file holds. Only the scripts of the file itself can run: its policy names their
sha256, and no address may be loaded. The same records give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pqk.errors import PqkError
from pqk.files import write_text
from pqk.record.deliverable import mean_std
from pqk.record.ledger import VARIANT, about, grouped, headline, line_of
from pqk.report.cells import Record, printable, tool_text
from pqk.report.drops import Drop, drop_of_record
from pqk.report.files import thresholds_of
from pqk.report.html.charts import charts_of, intervals
from pqk.report.html.extras import ablations_of, blocks_of, environments_of, evidence_of, parity_of, table
from pqk.report.html.reasons import in_language
from pqk.report.html.rows import Words, labels_of, table_of
from pqk.report.html.scene import read_points, scene_of
from pqk.report.html.sources import Found, find, tables_below
from pqk.report.html.words import words
from pqk.report.page.recipes import Recipe

MOST_BYTES = 10_000_000
_HERE = "pqk.report.html"
_VIEW = ("id", "sides", "ranges", "most", "colorscale")  # of a scene: what its 3D view needs
_SPEEDS = (("speedup_vs_own_f32", "speed_own"), ("speedup_vs_best_float", "speed_best"))


def write_html(name: str | None, out: Path, root: Path, language: str = "en", logs: Path | None = None) -> Path:
    """Writes the report of a card, a plan, a deliverable or (None) of all records; returns the file.

    Raises PqkError as `find` and `words` do, for another ending than .html, and above 10 MB.
    """
    t = words(language)
    if out.suffix != ".html":
        raise PqkError(f"--out {out}: the name of a report ends in .html")
    found = find(name, root, logs)
    text = render(gather(found, root, t), language)
    if len(text.encode()) > MOST_BYTES:
        raise PqkError(f"the report has more than {MOST_BYTES // 10**6} MB: name a card or a plan with fewer records")
    write_text(out, text)
    return out


def gather(found: Found, root: Path, t: Words) -> dict[str, Any]:
    """Returns everything that the page shows, as plain dictionaries and lists."""
    records, labels = list(found.records), labels_of(found.records)
    thresholds = thresholds_of(root)
    card = found.name if found.cards == (found.name,) else "CARD"
    charts = charts_of(records, labels, thresholds, t)
    recipes = [_recipe(recipe, t) for recipe in found.recipes]
    drops = _recipe_drops(found.recipes, t)
    return {
        "t": t,
        "title": f"pqk: {printable(found.name or t['all_records'])}",
        "heading": printable(found.title or found.name or t["all_records"]),
        "place": printable(found.place),
        "frozen": bool(found.rows),
        "count": len(records) or len(found.rows),
        "newest": max((row["datetime"] for row in (*records, *found.rows)), default=""),
        "recipes": recipes,
        "verdicts": [] if recipes else _verdicts(records, labels, t),
        "drops": drops,
        "table": table_of(records, labels, t) if records else None,
        "evaluations": _evaluations(found, t),
        "charts": charts,
        "parity": parity_of(found, t),
        "blocks": blocks_of(found, t),
        "ablations": ablations_of(found, t),
        "evidence": evidence_of(records, labels, found.files, t),
        "environments": environments_of(records, t),
        "scenes": _scenes(found),
        "commands": {
            "pareto": f"pqk run {card} --backend openvino",
            "parity": f"pqk parity {card} --backends openvino,onnxruntime",
            "explain": f"pqk parity {card} --backends openvino --explain",
            "blocks": f"pqk profile {card}",
            "ablations": "pqk run H1 --backend openvino",
            "points": f"pqk report {card} --show 4",
        },
    }


def render(page: Mapping[str, Any], language: str) -> str:
    """Returns the page as one HTML text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    own, library = _file("report.js"), _plotly()
    policy = " ".join(f"'sha256-{_digest(script)}'" for script in (own, library))
    figures = [chart for group in page["charts"].values() for chart in group]
    figures += [chart for chart in (page["drops"], *(each["chart"] for each in page["ablations"])) if chart]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file("template.html.j2")).render(
        **page,
        lang=language,
        policy=policy,
        css=Markup(_file("report.css")),
        own=Markup(own),
        library=Markup(library),
        figures=figures,
        views=[{name: scene[name] for name in _VIEW} for scene in page["scenes"]],
    )


def _file(name: str) -> str:
    return resources.files(_HERE).joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Returns plotly's script, which its Python package brings along."""
    return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _verdicts(records: Sequence[Record], labels: Sequence[str], t: Words) -> list[dict[str, Any]]:
    """Returns a card per candidate, the newest first where one was run several times."""
    found = []
    for number, (record, label) in enumerate(zip(records, labels, strict=True), 1):
        if record["role"] != "candidate":
            continue
        drop = drop_of_record(dict(record))
        facts = [_fact(t["drop"], _drop_text(drop, t))]
        for name, word in _SPEEDS:
            if record[name] is not None:
                ends = (record["intervals"] or {}).get(name)
                text = f"{record[name]:.2f}×" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
                facts.append(_fact(t[word], text))
        if record["size_MB"] is not None:
            ratio = f" ({record['size_ratio']:.0%} {t['of_teacher']})" if record["size_ratio"] else ""
            facts.append(_fact(t["size"], f"{record['size_MB']:.1f} MB{ratio}"))
        word = record["verdict"] or (record["status"] if record["status"] != "ok" else "not_judged")
        found.append(
            {
                "label": label,
                "row": number,
                "tool": printable(tool_text(record)),
                "word": t.get(word, printable(word)),
                "kind": record["verdict"] or "undecided",
                "facts": facts,
                "reasons": [printable(in_language(each, t["language"])) for each in record["verdict_reasons"] or ()],
                "date": record["measured_at"] or record["datetime"],
            }
        )
    return found


def _fact(name: str, text: str) -> dict[str, str]:
    return {"name": name, "text": printable(text)}


def _drop_text(drop: Drop | None, t: Words) -> str:
    if drop is None:
        return t["not_judged"]
    low, high = drop.interval.low, drop.interval.high
    if low is None or high is None:
        return f"{drop.interval.value:+.2f} % ({t['no_interval']})"
    over = t["over"].format(in_language(drop.over, t["language"]))
    return f"{drop.interval.value:+.2f} % [{low:+.2f}, {high:+.2f}], {over}"


def _recipe(recipe: Recipe, t: Words) -> dict[str, Any]:
    """Returns a campaign's recipe: its drop over all evaluations, judged at the limit of its plan."""
    drop, limit = recipe.drop, recipe.planned[0]["drop_limit_pct"]
    word = None if drop is None or limit is None else drop.judged(limit)
    return {
        "label": printable(f"{recipe.card} {recipe.combo} {recipe.precision}"),
        "word": t[word or "not_judged"],
        "kind": word or "undecided",
        "drop": printable(_drop_text(drop, t)),
        "limit": "" if limit is None else t["limit_drop"].format(f"{limit:g}"),
    }


def _recipe_drops(recipes: Sequence[Recipe], t: Words) -> dict[str, Any] | None:
    rows = [
        (
            f"{r.card} {r.combo} {r.precision} ({r.drop.over})",
            r.drop.interval.value,
            r.drop.interval.low,
            r.drop.interval.high,
        )
        for r in recipes
        if r.drop is not None
    ]
    limits = {recipe.planned[0]["drop_limit_pct"] for recipe in recipes} - {None}
    if not rows:
        return None
    axis = html.escape(t["drop_axis"])
    return intervals("recipes", t["verdict"], rows, axis, limits.pop() if len(limits) == 1 else None)


def _evaluations(found: Found, t: Words) -> dict[str, Any] | None:
    """Returns mean and spread of the evaluations of a deliverable, a line per file and variant."""
    if not found.rows:
        return None
    metrics = headline(found.rows)
    units = [about(next(row for row in found.rows if name in row), name)["unit"] for name in metrics]
    headings = [t["row"], t["precision"], t["toolchain"], t["runs"]]
    headings += [f"{name} ({unit})" if unit else name for name, unit in zip(metrics, units, strict=True)]
    rows = []
    for own in grouped(found.rows, ("file", *VARIANT)).values():
        first, line = own[0], line_of("file", own)
        tool = "/".join(first[name] for name in ("backend", "quantizer") if first[name])
        cells = [str(first["file"]).removesuffix(".tsv"), first["precision"], tool, len(own)]
        rows.append([*cells, *(mean_std(line, name) for name in metrics)])
    return table(t["evaluations"], headings, rows, t["evaluations_note"])


def _scenes(found: Found) -> list[dict[str, Any]]:
    """Returns the kept point maps whose candidate is one of the records."""
    engines = {(record["hashes"] or {}).get("engine") for record in found.records} - {None}
    kept = [read_points(path) for path in tables_below(found.reports / "show", "*.npz")]
    mine = [maps for maps in kept if maps is not None and maps.about.get("engine") in engines]
    return [scene_of(maps, f"scene-{number}") for number, maps in enumerate(mine[:2])]
