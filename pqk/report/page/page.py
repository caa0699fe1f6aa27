"""Writes the page of a campaign, such as docs/results.md, from a frozen deliverable alone: `write_page`.

Every number is from the records and the evaluations of the deliverable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pqk.errors import CheckFailed, PqkError
from pqk.files import matching, write_text
from pqk.paths import shown
from pqk.record.deliverable import check_files, spread
from pqk.record.ledger import Stat, stat
from pqk.record.log import read_records
from pqk.record.pair_scores import SCORES, scores_in
from pqk.record.tsv import Row, markdown_cell
from pqk.report.cells import DASH, value_of
from pqk.report.drops import difference_of, drop_of_record
from pqk.report.page.figures import draw
from pqk.report.page.recipes import ONE_RUN_S, Recipe, Record, mean_of, recipes_of
from pqk.report.page.targets import targets_lines
from pqk.settings.seeds import seeds_text

PLAN = "plan.json"


def write_page(deliverable: Path, out: Path) -> list[Path]:
    """Writes the page, and its figures into a folder of its name; returns the files, the page last.

    Raises PqkError when there is no such deliverable or it was frozen without a plan, CheckFailed when its files have
    changed since.
    """
    if out.suffix != ".md":
        raise PqkError(f"--out {out}: the name of a page ends in .md")
    said, rows = check_files(deliverable)
    if said:
        raise CheckFailed(f"{shown(deliverable)} is not as it was frozen: {said[0]}")
    if not (deliverable / PLAN).is_file():
        raise PqkError(f"{shown(deliverable)} was frozen without a plan: pqk ledger freeze NAME --plan PLAN")
    plan = json.loads((deliverable / PLAN).read_text(encoding="utf-8"))
    records = {f"records/{item.source.name}": item.record for item in _records(deliverable)}
    recipes = recipes_of(plan, records, rows, scores_in(deliverable))
    figures = draw(recipes, out.with_suffix(""))
    write_text(out, page_text(deliverable, plan, records, rows, recipes, figures, out))
    return [*figures, out]


def _records(deliverable: Path) -> list[Any]:
    folder = deliverable / "records"
    return read_records(folder) if folder.is_dir() else []


# Text


def page_text(
    deliverable: Path,
    plan: dict[str, Any],
    records: dict[str, Record],
    rows: Sequence[Row],
    recipes: Sequence[Recipe],
    figures: Sequence[Path],
    out: Path,
) -> str:
    """Returns the whole page as Markdown."""
    name, metric = deliverable.name, rows[0]["main_metric"]
    parts = [
        "# Results",
        "",
        f"{plan['title']}. {plan['goal']}",
        "",
        f"Written by `pqk ledger page {name}` from [deliverables/{name}]({_link(deliverable, out)}), whose records and "
        "evaluations hold every number; do not edit it by hand.",
        "",
        *_conditions(plan, records, rows),
        "## Recipes",
        "",
        *_recipes_table(recipes, records, rows, metric),
        "",
        *_legend(metric, by_date=any(record["run_id"] is None for recipe in recipes for _, record, _ in recipe.runs)),
        "## Drops",
        "",
        *_drops(recipes, deliverable),
        "",
        "## Paired comparisons",
        "",
        *_comparisons(recipes),
        "",
        *targets_lines(plan.get("targets") or [], recipes),
        "## Not run yet",
        "",
        *_missing(plan, recipes, rows),
        "",
        "## Verdicts",
        "",
        *_verdicts(recipes),
        "",
        "## Figures",
        "",
        *(f"![{path.stem}]({_link(path, out)})\n" for path in figures),
        *_ablations(deliverable, plan, out),
        "## How to make it again",
        "",
        *_commands(plan, name, rows),
    ]
    return "\n".join(parts) + "\n"


def _link(path: Path, out: Path) -> str:
    import os

    return Path(os.path.relpath(path.absolute(), out.absolute().parent)).as_posix()


def _conditions(plan: dict[str, Any], records: dict[str, Record], rows: Sequence[Row]) -> list[str]:
    machines = sorted({(row["device"], row["isa"] or "unknown", row["cores"]) for row in rows}, key=str)
    others = sorted({r["device"] for r in records.values() if r["device"]} - {device for device, _, _ in machines})
    tools: dict[str, set[str]] = {}
    for record in records.values():
        for tool in ("openvino", "nncf", "tensorrt", "nvidia-modelopt", "onnxruntime", "torch"):
            if tool in (record["versions"] or {}):
                tools.setdefault(tool, set()).add(record["versions"][tool])
    told = [f"{device}, instruction sets {isa}, {cores or 'unknown'} cores" for device, isa, cores in machines] + others
    versions = ", ".join(f"{tool} {' and '.join(sorted(found))}" for tool, found in tools.items())
    emulated = {row["measured"] for row in rows} - {"engine"}
    return [
        f"- Device of all times: {markdown_cell('; '.join(told))}",
        f"- Backend: {plan['backend']}{f'; {markdown_cell(versions)}' if versions else ''}",
        f"- Evaluated from {min(row['datetime'] for row in rows)[:10]} to {max(row['datetime'] for row in rows)[:10]}, "
        f"draws of scenes: {len({row['scenes_sha256'] for row in rows})}, pairs in the first: {rows[0]['pairs']}",
        *(["- Some engines were emulated: those rows have no times"] if emulated else []),
        "",
    ]


_HEADINGS = (
    "recipe",
    "runs",
    "drop %",
    "METRIC",
    "params M",
    "GFLOPs",
    "file MB",
    "p50 ms",
    "x own f32",
    "x own best float",
    "x Teacher f32",
    "int8 share",
    "verdict",
    "hours",
)


def _recipes_table(
    recipes: Sequence[Recipe], records: dict[str, Record], rows: Sequence[Row], metric: str
) -> list[str]:
    headings = [metric if heading == "METRIC" else heading for heading in _HEADINGS]
    lines = [_line(headings), _line(["---"] * len(headings)), *_teacher_line(records, rows, metric)]
    for recipe in recipes:
        evaluated, lowered = recipe.over_runs(metric), {row["lowered"] for row in recipe.rows} - {None}
        how = f" ({' or '.join(sorted(lowered))})" if lowered else ""
        quality = evaluated or recipe.over_records(metric)
        quantized = any(record["quantizer"] for _, record, _ in recipe.runs)
        cells = [
            markdown_cell(f"{recipe.card} {recipe.combo}, {recipe.precision}{how}"),
            _counts(recipe),
            DASH if recipe.drop is None else recipe.drop.text,
            _mean(quality, ".4f"),
            _against(recipe, "params_M", ".2f"),
            _against(recipe, "flops_G", ".1f"),
            _against(recipe, "size_MB", ".1f"),
            _mean(recipe.over_records("t_pair_p50_ms"), ".1f"),
            _mean(recipe.over_records("speedup_vs_own_f32") if quantized else None, ".2f"),
            _mean(recipe.over_records("speedup_vs_best_float") if quantized else None, ".2f"),
            _mean(_inverse(recipe), ".2f"),
            _mean(recipe.int8_share, ".0%"),
            markdown_cell(_verdict(recipe)),
            _mean(recipe.over_records("gpu_hours"), ".2f"),
        ]
        lines.append(_line(cells))
    return lines


def _teacher_line(records: dict[str, Record], rows: Sequence[Row], metric: str) -> list[str]:
    """Returns the line of the Teacher in f32: its evaluations, and its newest record."""
    teachers = [r for r in records.values() if r["role"] == "teacher" and r["precision"] == "f32"]
    if not teachers:
        return []
    record = max(teachers, key=lambda r: r["datetime"])
    digest = record["hashes"]["model"]
    own = [row for row in rows if row["checkpoint_sha256"] == digest and row["precision"] == "f32"]
    quality = stat([row[metric] for row in own]) if own else mean_of([value_of(record, metric)])
    count = f"{len({row['eval_seed'] for row in own})} eval" if own else "1"
    cells = [f"Teacher {markdown_cell(str(record['model']))}, f32", count, "0", _mean(quality, ".4f")]
    cells += [f"{record[name]:{form}}" for name, form in (("params_M", ".2f"), ("flops_G", ".1f"), ("size_MB", ".1f"))]
    cells += [_mean(mean_of([record["t_pair_p50_ms"]]), ".1f"), DASH, DASH, "1", DASH, DASH, DASH]
    return [_line(cells)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(found: Stat | None, form: str) -> str:
    if found is None:
        return DASH
    if form.endswith("%"):
        return f"{found.mean:{form}}"
    shown_spread = "" if not found.std else spread(found.std)
    return f"{found.mean:{form}}{shown_spread}"


def _against(recipe: Recipe, name: str, form: str) -> str:
    """Returns a mean over the train seeds, with its change against the Teacher in percent."""
    found, ratio = recipe.over_records(name), recipe.ratios(name)
    text = DASH if found is None else f"{found.mean:{form}}"
    return text if ratio is None else f"{text} ({100 * (ratio.mean - 1):+.0f} %)"


def _inverse(recipe: Recipe) -> Stat | None:
    """Returns the speed against the Teacher in f32; for records of schema 1.0 without it, from the medians of a run."""

    def speed(record: Record, base: Record | None) -> float | None:
        known: float | None = record["speedup_vs_teacher_f32"]
        if known is None and base and base["t_pair_p50_ms"] and record["t_pair_p50_ms"]:
            known = base["t_pair_p50_ms"] / record["t_pair_p50_ms"]
        return known

    return mean_of([speed(record, base) for _, record, base in recipe.runs])


def _counts(recipe: Recipe) -> str:
    """Returns '3 train x 5 eval', with the number of runs when some are missing."""
    if not recipe.rows:
        return f"{len(recipe.runs)} train, record only"
    trains = {row["train_seed"] for row in recipe.rows}
    evals = {row["eval_seed"] for row in recipe.rows}
    whole = len(recipe.rows) == len(trains) * len(evals)
    return f"{len(trains)} train x {len(evals)} eval" + ("" if whole else f", {len(recipe.rows)} runs")


def _verdict(recipe: Recipe) -> str:
    """Returns 'pass', or 'fail: why'; with the train seeds where there are several."""
    told: dict[str, list[tuple[int, list[str]]]] = {}
    for run, record, _ in recipe.runs:
        word, reasons = _judged(recipe, run, record)
        told.setdefault(word, []).append((run["train_seed"], reasons))
    parts = []
    for word, seeds in told.items():
        seed, reasons = seeds[0]
        whose = f" (seed {seeds_text(each for each, _ in seeds)})" if len(recipe.runs) > 1 else ""
        first = f"seed {seed}: " if len(seeds) > 1 else ""  # those of the other seeds are under Verdicts
        parts.append(f"{word}{whose}" + (f": {first}{'; '.join(reasons)}" if reasons else ""))
    return "; ".join(parts) or "no record"


def _judged(recipe: Recipe, run: dict[str, Any], record: Record) -> tuple[str, list[str]]:
    """Returns the verdict on a run (drop by all evaluations, the rest by its record), and reasons against a pass."""
    drop, limit = recipe.drop_of_run(run, record), run["drop_limit_pct"]
    word = None if drop is None or limit is None else drop.judged(limit)
    if record["status"] != "ok" or drop is None or word is None:
        return _recorded(record), _failed(record)
    rest = _beside_the_drop(record)
    reasons = [text.partition(": ")[2] for text in rest if not text.startswith("ok: ")]
    reasons += [] if word == "pass" else [drop.sentence(limit)]
    if word == "fail" or any(text.startswith("FAILED: ") for text in rest):
        return "fail", reasons
    if word == "undecided" or any(text.startswith("undecided: ") for text in rest):
        return "undecided", reasons
    return ("not judged" if reasons or record["verdict"] is None else "pass"), reasons


def _beside_the_drop(record: Record) -> list[str]:
    """Returns the reasons of a record's verdict without that of its drop, which comes first (`pqk.recipe.verdict`)."""
    return list(record["verdict_reasons"] or [])[1:]


def _recorded(record: Record) -> str:
    return str(record["status"]) if record["status"] != "ok" else str(record["verdict"] or "not judged")


def _failed(record: Record) -> list[str]:
    reasons = [r.removeprefix("FAILED: ") for r in record["verdict_reasons"] or [] if r.startswith("FAILED: ")]
    return reasons or ([str(record["notes"])] if record["status"] in ("failed", "unavailable") else [])


def _legend(metric: str, by_date: bool) -> list[str]:
    paired = (
        "- Records of schema 1.0 do not name their run: Teacher and candidate of one run were found by their dates, at "
        f"most {ONE_RUN_S / 60:g} minutes apart.",
    )
    return [
        f"- `drop %`: loss of {metric} against the Teacher in f32 on the same scenes and seeds, with its 95 % interval "
        f"(see Drops). `{metric}`: mean ± sample standard deviation over all runs. Where a row is not in the ledger, "
        "both are of the record (eval seed 0).",
        "- `params`, `GFLOPs` of a pair, `file`: with the change against the Teacher. `p50`: median time of a pair at "
        "batch size 1. Milliseconds of two rows are from different moments; the ratios beside them are not:",
        "- `x own f32`, `x own best float`: speed of the quantized model against the same model in float, within one "
        "interleaved timing; `x Teacher f32`: against the Teacher, likewise.",
        "- `int8 share`: of the FLOPs, read from the engine. `hours`: device hours that made one model.",
        "- `verdict`: of the drop by its interval under Drops, of everything else by the record (`configs/eval.yaml`).",
        *(paired if by_date else ()),
        "",
    ]


def _drops(recipes: Sequence[Recipe], deliverable: Path) -> list[str]:
    """Returns a row per run: drop with interval, its verdict at the limit, and the verdict by the record alone."""
    headings = ("run", "drop %, 95 % interval", "over", "at most", "by the interval", "by the record alone")
    table = [_line(headings), _line(["---"] * len(headings))]
    undecided, units = [], set()
    for recipe in recipes:
        records = {run["id"]: record for run, record, _ in recipe.runs}
        evaluated = {row["train_seed"] for row in recipe.rows}
        for run in recipe.planned:
            record = records.get(run["id"])
            drop = recipe.drop_of_run(run, record)
            if drop is None or (record is None and run["train_seed"] not in evaluated):
                continue
            limit = run["drop_limit_pct"]
            word = None if limit is None else drop.judged(limit)
            units.add(drop.unit)
            alone, one_draw = DASH, None if record is None else record["quality_drop_pct"]
            if one_draw is not None and limit is not None:
                own = None if record is None else drop_of_record(record)
                told = own.judged(limit) if own is not None else None
                alone = f"{one_draw:+.2f}: {told or ('pass' if one_draw <= limit else 'fail')}"
            if word == "undecided":
                undecided.append(f"{run['id']} ({alone.partition(': ')[2] or 'no record'})")
            least = DASH if limit is None else f"{limit:g}"
            table.append(_line([markdown_cell(run["id"]), drop.text, drop.over, least, word or DASH, alone]))
    said = []
    if "draws" in units:
        draws = [record["scenes"] for recipe in recipes for _, record, _ in recipe.runs if record["scenes"]]
        size = f" of {len(draws[0])} scenes" if draws else ""
        said.append(
            f"A draw{size} shares no scene with another, so it is what an interval is over: the mean over draws, by "
            "Student's t."
        )
    if "scenes" in units:
        said.append(
            "Over scenes: ratio of sums over pairs, linearised, with scenes as clusters (docs/methods.md, Evidence)."
        )
    if not (deliverable / SCORES).is_dir():
        said.append("The deliverable does not hold the scores of single pairs, which would give intervals over scenes.")
    said.append("Nothing here is about other trainings of a recipe.")
    lines = [" ".join(said), "", *table]
    if undecided:
        lines += [
            "",
            f"Their drop leaves undecided: {markdown_cell(', '.join(undecided))}. In brackets: what the record says of "
            "its drop, which is a statement about one draw.",
        ]
    return lines


def _comparisons(recipes: Sequence[Recipe]) -> list[str]:
    """Returns the pairs of recipes whose drops differ by more than their interval, and the number of the others."""
    found = []
    for place, one in enumerate(recipes):
        for other in recipes[place + 1 :]:
            drop = difference_of(other.rows, one.rows, other.teachers, other.scores)
            if drop is not None and drop.interval.low is not None and drop.interval.high is not None:
                apart = not drop.interval.low <= 0 <= drop.interval.high
                found.append((apart, [_name(other), _name(one), drop.text, drop.over]))
    if not found:
        return ["No two recipes were evaluated on two draws of the same scenes."]
    count = "1 pair of recipes" if len(found) == 1 else f"{len(found)} pairs of recipes"
    lines = [
        f"By how many points one drop exceeds another, on the same scenes: {count}. Listed are those that are "
        f"distinguishable, {sum(apart for apart, _ in found)}, where the 95 % interval does not hold 0. "
        "Of pairs that do not differ one in twenty is listed by chance."
    ]
    rows = [_line(cells) for apart, cells in found if apart]
    if rows:
        lines += ["", _line(["recipe", "against", "points, 95 % interval", "over"]), _line(["---"] * 4), *rows]
    return lines


def _name(recipe: Recipe) -> str:
    return markdown_cell(f"{recipe.card} {recipe.combo}, {recipe.precision}")


def _missing(plan: dict[str, Any], recipes: Sequence[Recipe], rows: Sequence[Row]) -> list[str]:
    """Returns a line, with the reason, for every planned run without its record or some of its evaluations."""
    lines = []
    for run in plan["rows"]:
        if run["card"] is None:
            done = {row["eval_seed"] for row in rows if row["teacher_sha256"] is None}
        else:
            own = [r for recipe in recipes if recipe.card == run["card"] for r in recipe.rows]
            done = {row["eval_seed"] for row in own if row["train_seed"] == run["train_seed"]}
        lacking = set(run["eval_seeds"]) - done
        missing = []
        if run["card"] is not None and not run["matrix"] and run["candidate"] is None:
            missing.append("not run yet")
        if run["matrix"] and run["status"] != "done":
            missing.append("not run yet, or not whole")
        if lacking:
            missing.append(f"not evaluated with eval seeds {seeds_text(lacking)}")
        if missing:
            state = "" if run["status"] in ("waiting", "done") else f" ({run['status']}{_colon(run['detail'])})"
            lines.append(f"- {markdown_cell(run['id'] + ': ' + ', '.join(missing) + state)}")
    for recipe in recipes:
        for run, record, _ in recipe.runs:
            digests = {row["checkpoint_sha256"] for row in recipe.rows if row["train_seed"] == run["train_seed"]}
            if digests - set((record["hashes"] or {}).values()):
                lines.append(
                    f"- {markdown_cell(run['id'])}: its evaluations are of another checkpoint than its record; "
                    "run and evaluate it again"
                )
    return lines or ["Nothing: every planned run was measured and evaluated."]


def _colon(detail: str | None) -> str:
    return f": {detail}" if detail else ""


def _verdicts(recipes: Sequence[Recipe]) -> list[str]:
    lines = []
    for recipe in recipes:
        for run, record, _ in recipe.runs:
            word, _ = _judged(recipe, run, record)
            lines.append(f"- **{markdown_cell(run['id'])}** ({recipe.precision}): {word}")
            drop, limit = recipe.drop_of_run(run, record), run["drop_limit_pct"]
            decided = None if drop is None or limit is None else drop.judged(limit)
            if record["status"] != "ok" or drop is None or decided is None:
                reasons = record["verdict_reasons"] or _failed(record)
            else:
                prefix = {"pass": "ok", "fail": "FAILED"}.get(decided, decided)
                reasons = [f"{prefix}: {drop.sentence(limit)}", *_beside_the_drop(record)]
            lines += [f"  - {markdown_cell(reason)}" for reason in reasons]
    return lines or ["No recipe has run yet."]


def _ablations(deliverable: Path, plan: dict[str, Any], out: Path) -> list[str]:
    tables = matching(deliverable / "ablation", "*.md")
    if not any(run["matrix"] for run in plan["rows"]):
        return []
    lines = ["## Ablations", ""]
    if tables:
        lines += [
            "Each point was scored on one draw of scenes (eval seed 0): how far a draw may be off is seen under Drops. "
            "A drop without an interval, and the verdict beside it, are statements about that draw.",
            "",
        ]
    for path in tables:
        heading, _, table = path.read_text(encoding="utf-8").partition("\n")
        lines += [f"### {heading.lstrip('# ')}", "", table.strip(), ""]
        if path.with_suffix(".png").is_file():
            lines += [f"![{path.stem}]({_link(path.with_suffix('.png'), out)})", ""]
    return [*lines, *([] if tables else ["Not run yet.", ""])]


def _commands(plan: dict[str, Any], name: str, rows: Sequence[Row]) -> list[str]:
    commits = sorted({row["commit"] or "unknown" for row in rows})
    return [
        "```bash",
        f"pqk plan {plan['plan']} --run --backend {plan['backend']}   # runs and evaluates what is not there yet",
        f"pqk ledger freeze {name} --plan {plan['plan']}",
        f"pqk ledger page {name}",
        f"pqk ledger verify {name}                  # hashes everything, and measures one run again",
        "```",
        "",
        f"Commits of the evaluations: {', '.join(markdown_cell(commit) for commit in commits)}.",
    ]
