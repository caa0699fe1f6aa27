"""From what a plan left behind to its page: which records and ledgers belong to it. The records are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pqk.cli.app import app
from pqk.errors import PqkError, told
from pqk.families.dust3r.settings import METRICS as KNOWN
from pqk.files import sha256_json
from pqk.recipe.columns import described_metrics
from pqk.recipe.experiment import resolve
from pqk.record.ledger import COLUMNS, write_rows
from pqk.record.log import write_record
from pqk.record.schema import empty_record
from pqk.settings.card import load_card
from pqk.study.campaign import gather

ABOUT = described_metrics(KNOWN)
METRICS = (*ABOUT, "absrel_p95")
SEED = "workload.seeds.train"


def record(root: Path, card: str, role: str, seed: int = 0, day: int = 1, **more: Any) -> dict[str, Any]:
    """A record of `pqk run CARD` with the project's configs, written to logs/."""
    asked = resolve(load_card(card, root), root, settings={SEED: seed})
    model = sha256_json([card, seed, day] if role == "candidate" else "teacher")
    hashes = {"model": model, "workload": asked.workload.sha256, "eval": asked.evaluation.sha256}
    hashes |= {"quant": asked.quant.sha256, "distill": asked.distill.sha256, "engine": sha256_json([model, "engine"])}
    known = {
        "exp_id": card,
        "role": role,
        "model": f"tiny{day}",
        "backend": "openvino",
        "device": "a CPU",
        "precision": "f32",
        "status": "ok",
        "train_seed": seed,
        "main_metric": "absrel",
        "absrel": 0.1,
        "quality_drop_pct": 0.4,
        "verdict": "pass" if role == "candidate" else None,
        "params_M": 9.0,
        "flops_G": 60.0,
        "size_MB": 36.0,
        "t_pair_p50_ms": 80.0,
        "datetime": f"2026-01-0{day}T00:00:00Z",
        "hashes": hashes,
    }
    made = empty_record() | known | more
    write_record(root / "logs", made)
    return made


def ledger(root: Path, name: str, records: list[dict[str, Any]]) -> None:
    rows = []
    for found in records:
        for seed in range(5):
            row = dict.fromkeys(COLUMNS) | dict.fromkeys(METRICS, 0.1 + 0.001 * seed) | {"metrics": json.dumps(ABOUT)}
            row |= {name: found[name] for name in ("train_seed", "main_metric", "backend", "device", "precision")}
            row |= {"card": found["exp_id"], "eval_seed": seed, "drop_pct": 0.1 * seed, "pairs": 9, "params": 9}
            row |= {"scenes": "8", "scenes_sha256": f"s{seed}", "measured": "engine", "checkpoint": found["model"]}
            row |= {"checkpoint_sha256": found["hashes"]["model"], "teacher_sha256": sha256_json("teacher")}
            row |= {"workload_sha256": "w", "eval_sha256": "e", "config_sha256": "c", "code_sha256": "k"}
            row |= {"datetime": "2026-01-09T00:00:00Z"}
            rows.append(row)
    write_rows(root / "results" / f"{name}.openvino.tsv", rows)


@pytest.fixture
def campaign(project: Path) -> Path:
    """A1 has run with the train seeds 0 and 1, B1 has not, and other things lie beside them."""
    for seed in (0, 1):
        record(project, "A1", "teacher", seed, day=2)
    record(project, "A1", "candidate", 0)  # an earlier attempt
    ledger(project, "A1", [record(project, "A1", "candidate", seed, day=2) for seed in (0, 1)])
    other = {"hashes": {"workload": "1" * 64, "eval": "2" * 64, "model": "3" * 64}}
    record(project, "D1", "candidate", 0, **other)  # of other configs
    record(project, "D1", "candidate", 1, backend="trt")
    folder = project / "reports" / "ablation" / "H1"
    folder.mkdir(parents=True)
    (folder / "loss.md").write_text("# H1 loss\n\n| point | drop % |\n| --- | --- |\n| KL only | +0.31 |\n")
    return project


def test_only_what_belongs_to_the_plan_is_frozen(campaign: Path) -> None:
    files, more = gather("results", campaign, None)
    assert [path.name for path in files] == ["A1.openvino.tsv"]
    rows = {row["id"]: row for row in json.loads(more["plan.json"])["rows"]}
    assert len(rows) == 14 and rows["G1"]["card"] == "G1" and rows["H1"]["matrix"] and rows["Baseline"]["card"] is None
    chosen = {name: row["candidate"] for name, row in rows.items() if row["candidate"]}
    assert chosen.keys() == {"A1-s0", "A1-s1"}
    kept = [json.loads(more[path]) for path in chosen.values()]
    assert [(r["train_seed"], r["datetime"][:10]) for r in kept] == [(0, "2026-01-02"), (1, "2026-01-02")]
    assert sorted(name for name in more if name.startswith("ablation")) == ["ablation/loss.md"]
    assert len([name for name in more if name.startswith("records")]) == 4  # two Teachers, two candidates
    assert rows["D1-s1"]["drop_limit_pct"] == 1.0 and rows["C1"]["drop_limit_pct"] == 3.0
    with pytest.raises(PqkError, match="plan results has no ledger in results/ yet; make them with pqk plan results"):
        gather("results", campaign, "trt")


def test_a_changed_config_is_not_passed_for_the_old_one(campaign: Path) -> None:
    config = campaign / "configs" / "distill.yaml"
    text = config.read_text()
    assert text.count("learning_rate: 1.0e-5") == 1
    config.write_text(text.replace("learning_rate: 1.0e-5", "learning_rate: 3.0e-5"))
    _, more = gather("results", campaign, None)
    rows = json.loads(more["plan.json"])["rows"]
    assert not [row["id"] for row in rows if row["candidate"]]


def test_from_the_command_line(
    campaign: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pqk(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = told(lambda: app(["ledger", *words], standalone_mode=False) or 0)
        said: Any = capsys.readouterr()
        return int(code), said.out, said.err

    monkeypatch.chdir(campaign)
    assert pqk("page", "one")[0] == 2
    code, out, err = pqk("freeze", "one", "--plan", "results")
    assert (code, out.splitlines()[-1]) == (0, "deliverables/one"), err
    assert "records/A1-candidate-openvino-f32-" in (campaign / "deliverables" / "one" / "README.md").read_text()
    code, out, err = pqk("page", "one")
    assert code == 0, err
    assert out.splitlines() == ["docs/results/tradeoff.png", "docs/results/drop.png", "docs/results.md"]
    text = (campaign / "docs" / "results.md").read_text()
    assert "| A1 K-only, f32 | 2 train x 5 eval | +0.20 [+0.00, +0.40] |" in text and "KL only" in text
    missing = text.split("## Not run yet")[1].split("## Verdicts")[0]
    for name in ("Baseline", "A1-s2", "B1", "C1", "C1-rho30", "D1-s0", "E1", "F1", "G1", "H1"):
        assert f"- {name}: not " in missing
    assert "- A1-s0" not in missing and "- A1-s1" not in missing
    assert pqk("verify", "one", "--no-rerun")[0] == 0
    for words, sentence in (
        (("two", "--plan", "mine"), "there is no plan 'mine'"),
        (("two", "--backend", "openvino"), "--backend goes with --plan"),
        (("two", "--plan", "results", "--results", "results"), "--plan chooses its files"),
    ):
        code, _, err = pqk("freeze", *words)
        assert code == 2 and sentence in err
