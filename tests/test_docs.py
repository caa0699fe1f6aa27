"""What a newcomer reads must be true: commands parse, links lead somewhere, both READMEs say the same."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from pqk.cli.app import app
from pqk.cli.run_output import settings_of
from pqk.errors import PqkError
from pqk.families.registry import family
from pqk.recipe.experiment import resolve
from pqk.settings.card import Overrides, list_cards, load_card

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
OURS = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*OURS, *sorted((ROOT / "schedule" / "TaskCards").glob("*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("logs", "reports", "outputs")]
TABLE = "<!-- table: pqk run B1 --backend openvino -->"
MADE = ("results/", "logs/", "reports/", "outputs/")  # results: they exist after a run, not in a checkout


def commands(page: str) -> list[str]:
    """Every `pqk ...` command line of a page's shell blocks and inline code, without the `pqk`.

    A verb that is only mentioned in a sentence (`pqk run`) gets --help, as it lacks what it needs to run.
    """
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        line = " ".join(code.split())
        lines.append(f"{line} --help" if re.fullmatch(r"pqk( [a-z]+)+", line) else line)
    matches = [re.match(r"(?:torchrun .* -m pqk\.cli|pqk) (\S.*)", line) for line in lines]
    return [match[1] for match in matches if match]


@cache
def whole() -> Any:
    """The command `pqk`; to build it takes a tenth of a second, and the pages have hundreds of lines."""
    return typer.main.get_command(app)


@cache
def tests() -> list[str]:
    return [path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")]


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Resolve the verb and parse its options without running it; typer raises for what it does not know."""
    command = whole()
    context = command.make_context("pqk", list(arguments))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        if rest == ["--help"]:
            return str(name), {}
        context = command.make_context(name, rest, parent=context)
    return str(command.name), context.params


def cases() -> list[tuple[str, str]]:
    return [(str(page.relative_to(ROOT)), line) for page in PAGES for line in commands(page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "line"), cases())
def test_every_command_parses(page: str, line: str) -> None:
    verb, parameters = parse(shlex.split(line))
    if verb == "run" and parameters:
        assert parameters["card"] in list_cards(ROOT), f"{page} names a card that is not there"
    for item in parameters.get("setting") or ():
        key, sign, _ = item.partition("=")
        assert sign and key.split(".")[0] in Overrides.model_fields
    for word in shlex.split(line):
        if re.match(r"(configs|schedule)/", word):
            assert (ROOT / word).exists(), f"{page} names {word}"


def settled(page: str) -> list[tuple[str, list[str]]]:
    """Card and settings of every command that has both."""
    found = [parse(shlex.split(line))[1] for line in commands(page)]
    return [(one["card"], list(one["setting"])) for one in found if one.get("card") and one.get("setting")]


DETECTION = ROOT / "docs" / "howto-detection.md"


@pytest.mark.parametrize(("card", "items"), settled(DETECTION.read_text("utf-8")))
def test_settings_of_the_detectors_go_together(card: str, items: list[str]) -> None:
    """Such as a quality head where scores come from it."""
    settings = settings_of(items)
    found = resolve(load_card(card, ROOT), ROOT, of=family("diffusiondet"), settings=settings)
    for key, value in settings.items():
        part: Any = found
        for name in key.split("."):
            part = getattr(part, name)
        assert part == value or isinstance(value, list)


def test_settings_that_do_not_go_together_are_noticed() -> None:
    (case,) = settled("`pqk ledger eval OUT --card S1 --set workload.sampler.scores=quality`")
    with pytest.raises(PqkError, match="quality_head"):
        test_settings_of_the_detectors_go_together(*case)


def test_a_wrong_command_is_noticed() -> None:
    assert commands("`pqk run B1 --bogus 1` and\n```bash\npqk runs B1  # why\n```\n") == ["runs B1", "run B1 --bogus 1"]
    assert commands("`pqk run` and `pqk train teachers`") == ["run --help", "train teachers --help"]
    for line in ("runs B1", "run B1 --bogus 1", "train teachers --help", "run"):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(shlex.split(line))


def test_the_commands_of_the_guides_are_found() -> None:
    assert len(cases()) > 25
    verbs = {line.split()[0] for _, line in cases()}
    assert {"run", "check", "table", "env", "data", "train", "bench"} <= verbs


def verbs_of(line: str) -> tuple[str, ...]:
    """The verbs of a command line: ("ledger", "eval")."""
    command = whole()
    found: list[str] = []
    for word in shlex.split(line):
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        found.append(word)
    return tuple(found)


IN_PROCESS = {("bench", "teacher"): "bench_teacher(", ("ledger", "page"): "write_page("}
"""Verbs whose tests call the function behind them."""


@pytest.mark.parametrize("verbs", sorted({verbs_of(line) for _, line in cases()} - {()}), ids=" ".join)
def test_every_verb_of_the_guides_is_run_by_a_test(verbs: tuple[str, ...]) -> None:
    called = re.compile(r"[(\[*]\s*(?:\w+,\s*)?" + r",\s*".join(f'"{verb}"' for verb in verbs))
    assert any(called.search(text) or IN_PROCESS.get(verbs, "no test") in text for text in tests())


def test_the_conventions_have_a_command_each() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", (ROOT / "docs" / "conventions.md").read_text("utf-8"), re.M
    )
    assert len(rows[2:]) == 20 and len({name for name, _ in rows}) == len(rows)
    assert all(re.match(r"`(pqk|make|pip) [^`]+`$", command) for _, command in rows[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in link:
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name} links to {link}"
    folders = "|".join(sorted(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")))
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        if not name.startswith(MADE) or name.endswith(("README.md", "schema.json")):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_path_of_one_machine(page: Path) -> None:
    assert not re.findall(r"(?<![\w.~:/])/(?:root|home|work|tmp|Users|opt|mnt)\b", page.read_text("utf-8"))


def test_both_readmes_say_the_same() -> None:
    english, chinese = (page.read_text("utf-8") for page in READMES)
    assert commands(english) == commands(chinese)
    for pattern in (r"```bash\n", r"^## ", r"^\| ", r"\]\((?!README)([^)]+)\)"):
        found = [re.findall(pattern, text, flags=re.MULTILINE) for text in (english, chinese)]
        assert found[0] == found[1], pattern


@pytest.mark.parametrize("page", READMES, ids=lambda path: path.name)
def test_readme_is_short_and_has_a_place_for_the_table(page: Path) -> None:
    text = page.read_text("utf-8")
    assert len(text.splitlines()) < 180
    assert re.search(rf"^{re.escape(TABLE)}\n```text\n(?:.*\n)*?```\n<!-- end of table -->$", text, re.MULTILINE)


def normal(name: str) -> str:
    """A requirement's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", name.strip())[0]).lower()


def test_constraints_pin_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {normal(pin.split("==")[0]) for pin in pins}
    assert len(pinned) == len(pins)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    asked = setup["options"]["install_requires"] + "".join(extras[name] for name in extras if name != "trt")
    assert {normal(line) for line in asked.splitlines() if line.strip()} <= pinned
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    assert f"TORCH := {torch}\n" in (ROOT / "Makefile").read_text("utf-8")


def test_no_host_of_a_package_index() -> None:
    for name in ("Makefile", "constraints.txt", ".ci/run", "setup.cfg"):
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", (ROOT / name).read_text("utf-8")), name


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 == 0o111
    assert script.read_text("utf-8").startswith("#!/usr/bin/env bash\n")
    dry = ["make", "-n", "-C", str(ROOT), "PYTHON=python3", "test"]
    planned = subprocess.run(dry, capture_output=True, text=True, check=True).stdout
    for step in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert step in planned


def test_make_run_fails_only_for_other_codes_than_a_threshold(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv" / "installed").touch()
    program = tmp_path / ".venv" / "bin" / "pqk"
    for code, ends_well in ((0, True), (1, True), (2, False), (3, False)):
        program.write_text(f"#!/bin/sh\necho asked: $@\nexit {code}\n")
        program.chmod(0o755)
        done = subprocess.run(["make", "-C", str(tmp_path), "run"], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == ends_well, code
        assert "asked: run B1 --backend openvino" in done.stdout
        assert ("a threshold failed" in done.stdout) == (code == 1)


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("describe_record", ROOT / "scripts" / "describe_record.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_fields_is_up_to_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    describe = script()
    page: str = describe.PAGE.read_text("utf-8")
    assert describe.renewed(page) == page, "run python scripts/describe_record.py"
    old = tmp_path / "page.md"
    old.write_text(page.replace("`absrel`", "`abs_rel`"), "utf-8")
    schema = tmp_path / "schema" / "record.schema.json"
    words = ["describe_record.py", "--page", str(old), "--schema", str(schema)]
    monkeypatch.setattr("sys.argv", [*words, "--check"])
    assert describe.main() == 1
    assert not schema.exists()
    monkeypatch.setattr("sys.argv", words)
    assert describe.main() == 0
    assert schema.read_bytes() == describe.SCHEMA.read_bytes()
    monkeypatch.setattr("sys.argv", [*words, "--check"])
    assert describe.main() == 0
    assert old.read_text("utf-8").count("| `absrel` | number |") == 1
    old.write_text("no marks", "utf-8")
    assert describe.main() == 2


def test_the_published_schema_is_that_of_the_code_and_judges_as_it_does(make_record: Any) -> None:
    from jsonschema import Draft202012Validator

    from pqk.record.log import read_records
    from pqk.record.schema import columns, schema_version

    describe = script()
    text = describe.SCHEMA.read_text("utf-8")
    assert text == describe.published(), "run python scripts/describe_record.py"
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:pqk:record:{schema_version()}"
    assert list(schema["properties"]) == [column.name for column in columns()]
    judge = Draft202012Validator(schema)
    records = [item.record for item in read_records(ROOT / "deliverables" / "results-3" / "records")]
    assert len(records) > 30 and all(judge.is_valid(record) for record in records)
    for wrong in ({"absrell": 1.0}, {"absrel": -1.0}, {"role": "boss"}, {"measured": "emulated", "t_pair_p50_ms": 1.0}):
        assert judge.is_valid(make_record()) and not judge.is_valid(make_record(**wrong))


def test_examples_that_change_the_config_hold(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "howto-train-teacher.md").read_text("utf-8")
    from pqk.settings.training import load_training

    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "mini.yaml").write_text(blocks[0], "utf-8")
    assert load_training(tmp_path / "mini.yaml").steps == 3


def test_the_example_card_is_a_card(tmp_path: Path) -> None:
    from pqk.settings.card import read_card

    page = (ROOT / "docs" / "howto-add-a-task-card.md").read_text("utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    path = tmp_path / "H2.md"
    path.write_text(f"---\n{block}---\n# H2\n", "utf-8")
    assert resolve(read_card(path), ROOT).workload.pair_graph.k == 2
