"""Plans: the shipped ones, their order, hours and dollars, and what is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pqk.cli.check import dry_run
from pqk.errors import PqkError
from pqk.settings.plan import A100_FACTOR, cost, hours_on, list_plans, load_plan, ordered, rate_on, total, waits_for
from pqk.study.plan_table import plan_data, print_plan, range_text

REPOSITORY = Path(__file__).resolve().parents[2]
# the lab's tables: hours on one H100, and the dollars that they come to
HOURS = {
    "minimal": {"Baseline": 3, "A1": 20, "B1": 10, "D1": 12},
    "medium": {"Baseline": 3, "A1": 24, "B1": 10, "C1": 14, "E1": 14, "D1": 10},
    "best": {"Baseline": 3, "A1": 28, "B1": 12, "C1": 16, "D1": 12, "E1": 14, "F1": 20, "G1": 25, "H1": 10},
}
DOLLARS = {"minimal": (300, 320), "medium": (510, 600), "best": (950, 1050)}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    shutil.copytree(REPOSITORY / "configs", root / "configs")
    shutil.copytree(REPOSITORY / "schedule", root / "schedule")
    (root / "logs").mkdir()
    shutil.copy(REPOSITORY / "logs" / "unified_log_schema.json", root / "logs")
    return root


def edit(root: Path, old: str, new: str, name: str = "minimal") -> None:
    path = root / "schedule" / "plans" / f"{name}.yaml"
    text = path.read_text("utf-8")
    assert text.count(old) == 1, (old, text.count(old))
    path.write_text(text.replace(old, new), "utf-8")


def test_the_shipped_plans() -> None:
    assert list_plans(REPOSITORY) == ["best", "medium", "minimal", "results"]
    for name, hours in HOURS.items():
        plan = load_plan(name, REPOSITORY)
        assert plan.name == name
        assert {e.id: e.hours for e in plan.experiments} == hours
        assert (plan.device, plan.rate) == ("H100", 6.88)
        low, high = DOLLARS[name]
        assert low <= sum(hours.values()) * plan.rate <= high


def test_order() -> None:
    orders = {name: [step.id for step in ordered(load_plan(name, REPOSITORY), REPOSITORY)] for name in HOURS}
    assert orders == {
        "minimal": ["Baseline", "A1", "B1", "D1"],
        "medium": ["Baseline", "A1", "C1", "B1", "E1", "D1"],
        "best": ["Baseline", "A1", "C1", "B1", "D1", "E1", "F1", "G1", "H1"],
    }
    steps = {step.id: step for step in ordered(load_plan("best", REPOSITORY), REPOSITORY)}
    assert waits_for(steps["F1"], steps) == {"E1", "C1", "B1"}
    assert steps["Baseline"].card is None and steps["A1"].combo == "K-only"


def test_recipes_without_training_have_their_place() -> None:
    plan = load_plan("best", REPOSITORY)
    more = [plan.experiments[2].model_copy(update={"id": name}) for name in ("KTQ1", "TQ1", "T2", "T1")]
    found = [
        step.id for step in ordered(plan.model_copy(update={"experiments": (*plan.experiments, *more)}), REPOSITORY)
    ]
    assert found == ["Baseline", "A1", "C1", "T1", "T2", "B1", "D1", "E1", "TQ1", "F1", "KTQ1", "G1", "H1"]


def test_the_campaign_has_every_recipe_with_its_seeds() -> None:
    plan = load_plan("results", REPOSITORY)
    steps = {step.id: step for step in ordered(plan, REPOSITORY)}
    assert not plan.rollback and load_plan("best", REPOSITORY).rollback
    trained = [f"{card}-s{seed}" for card in ("A1", "D1") for seed in (0, 1, 2)]
    assert sorted(steps) == sorted([*trained, "Baseline", "B1", "C1", "C1-rho30", "E1", "F1", "G1", "H1"])
    assert {step.eval_seeds for name, step in steps.items() if name != "H1"} == {"0..4"}
    # A training of the same seed, or else the first one.
    assert steps["D1-s2"].requires == ("A1-s2", "B1") and steps["D1-s2"].settings == {"workload.seeds.train": 2}
    assert steps["H1"].requires == ("A1-s0", "B1") and steps["H1"].eval_seeds is None and steps["B1"].settings == {}
    data = plan_data(plan, list(steps.values()), "CPU", None)
    assert data["cost"] == [0, 0] and data["hours"][0] == sum(s.hours for s in steps.values())


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("student\", train_seeds: [0, 1, 2]", "student\", train_seeds: [1, 1]", "must be one or more different"),
        ("door: baseline_eval", "door: baseline_eval, train_seeds: [0]", "'Baseline' is a script and trains nothing"),
        ("what: \"the ablations\"", "what: a, eval_seeds: 0..4", "H1 is a matrix and has no result of its own"),
        ("what: \"pruned at 0.1\", eval_seeds: \"0..4\"", "what: a, eval_seeds: 4..0", "seeds '4..0': write them as"),
        ("id: C1, hours", "id: A1-s1, hours", "there is no card 'A1-s1'"),
    ],
)  # fmt: skip
def test_wrong_seeds_are_one_sentence(project: Path, old: str, new: str, sentence: str) -> None:
    edit(project, old, new, "results")
    with pytest.raises(PqkError, match=sentence):
        ordered(load_plan("results", project), project)


@settings(max_examples=12, deadline=None)
@given(st.permutations(list(HOURS["best"])))
def test_the_order_of_the_file_does_not_break_dependencies(names: list[str]) -> None:
    plan = load_plan("best", REPOSITORY)
    by_name = {experiment.id: experiment for experiment in plan.experiments}
    shuffled = plan.model_copy(update={"experiments": tuple(by_name[name] for name in names)})
    done: set[str] = set()
    for step in ordered(shuffled, REPOSITORY):
        assert done.issuperset(step.requires)
        done.add(step.id)
    assert done == set(names)
    assert next(iter(ordered(shuffled, REPOSITORY))).id == "Baseline"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("rate: 6.88", "rat: 6.88", r"minimal\.yaml:\d+: unknown key 'rat' \(did you mean 'rate'\?\)"),
        ("hours: 20", "hour: 20", r"unknown key 'experiments\[1\]\.hour' \(did you mean 'hours'\?\)"),
        ("hours: 20", "hours: 0", r"experiments\[1\]\.hours is 0 but must be more than 0"),
        ("device: H100", "device: H10", r"device is 'H10' but must be 'H100' or 'CPU' \(did you mean 'H100'\?\)"),
        ("door: baseline_eval", "door: baselin_eval", r"did you mean 'baseline_eval'"),
        ("id: D1", "id: A1", r"lists the experiment 'A1' twice"),
        ("id: B1", "id: B11", r"there is no card 'B11' in .* \(did you mean 'B1'\?\)"),
        ("id: Baseline", "id: C1", r"C1 is a card, so it cannot name the script baseline_eval"),
        ("id: B1", "id: C1", r"D1 requires B1, which the plan does not have; add it under experiments"),
    ],
)
def test_wrong_plans_are_one_sentence(project: Path, old: str, new: str, sentence: str) -> None:
    edit(project, old, new)
    with pytest.raises(PqkError, match=sentence):
        ordered(load_plan("minimal", project), project)
    assert any(re.search(sentence, finding.message) for finding in dry_run(project))


def test_cards_in_a_circle(project: Path) -> None:
    card = project / "schedule" / "TaskCards" / "A1.md"
    card.write_text(card.read_text("utf-8").replace("requires: []", "requires: [D1]"), "utf-8")
    with pytest.raises(PqkError, match=r"these cards require each other: A1, D1$"):
        ordered(load_plan("minimal", project), project)


def test_the_example_of_the_guide_is_a_plan(project: Path) -> None:
    page = (REPOSITORY / "docs" / "howto-plan.md").read_text("utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (project / "schedule" / "plans" / "mine.yaml").write_text(block, "utf-8")
    assert [step.id for step in ordered(load_plan("mine", project), project)] == ["Baseline", "B1"]
    for name in ("minimal", "medium", "best"):
        plan = load_plan(name, project)
        hours = sum(experiment.hours for experiment in plan.experiments)
        (row,) = re.findall(rf"^\| {name} \|.*$", page, flags=re.MULTILINE)
        assert row.endswith(f"| {hours:g} | {hours * plan.rate:.0f} $ |")


def test_names(project: Path) -> None:
    for wrong, near in {"minmal": "minimal", "statsu": "status", "../minimal": "minimal"}.items():
        with pytest.raises(PqkError, match=rf"there is no plan .* \(did you mean '{near}'\?\)"):
            load_plan(wrong, project)
    shutil.copy(project / "schedule" / "plans" / "best.yaml", project / "schedule" / "plans" / "status.yaml")
    assert "status" not in list_plans(project)  # `pqk plan status` is something else
    shutil.copy(project / "schedule" / "plans" / "best.yaml", project / "schedule" / "plans" / "mine.yaml")
    assert load_plan("mine", project).name == "mine"
    shutil.rmtree(project / "schedule" / "plans")
    assert list_plans(project) == []
    with pytest.raises(PqkError, match="plans: none"):
        load_plan("best", project)


@settings(deadline=None)
@given(st.floats(0.1, 1000))
def test_an_a100_takes_between_the_factors(hours: float) -> None:
    low, high = hours_on("A100", hours)
    assert (low / hours, high / hours) == pytest.approx(A100_FACTOR)
    assert hours_on("H100", hours) == (hours, hours)


def test_price() -> None:
    plan = load_plan("minimal", REPOSITORY)
    assert [rate_on(plan, d, r) for d, r in (("H100", None), ("H100", 2.0), ("A100", None), ("A100", 2.0))] == [
        6.88, 2.0, None, 2.0,
    ]  # fmt: skip
    assert cost((10, 20), 2.0) == (20, 40) and cost((10, 20), None) is None
    assert total([(1, 2), (3, 5)]) == (4, 7) and total([]) == (0, 0)
    with pytest.raises(PqkError, match=r"--device h100: .* \(did you mean 'H100'\?\)"):
        hours_on("h100", 1)


def test_numbers_as_they_are_shown() -> None:
    assert [range_text(r) for r in ((20, 20), (34, 44.2), (1637.4, 2119), (5.1, 6.6), None)] == [
        "20", "34–44", "1,637–2,119", "5.1–6.6", "–",
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["H100", "A100"])
@pytest.mark.parametrize("name", list(HOURS))
def test_the_table_fits_80_columns(name: str, device: str) -> None:
    plan = load_plan(name, REPOSITORY)
    data: dict[str, Any] = plan_data(plan, ordered(plan, REPOSITORY), device, 12.5)
    json.dumps(data)
    console = Console(width=80, record=True, file=io.StringIO())
    print_plan(data, console)
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text  # nothing was cut off
    for step in data["experiments"]:
        row = next(line for line in lines if line.startswith(f" {step['id']} "))
        assert range_text(step["hours"]) in row and range_text(step["cost"]) in row
    hours = sum(HOURS[name].values())
    low, high = (1, 1) if device == "H100" else A100_FACTOR
    assert data["hours"] == pytest.approx([hours * low, hours * high])
    assert data["cost"] == pytest.approx([hours * low * 12.5, hours * high * 12.5])
    (sums,) = [line for line in lines if line.startswith(" total ")]
    assert range_text(data["hours"]) in sums and range_text(data["cost"]) in sums
    assert "estimates" in text


def test_loading_is_quick(project: Path) -> None:
    began = time.process_time()
    ordered(load_plan("best", project), project)
    assert time.process_time() - began < 1.0
