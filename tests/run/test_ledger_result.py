"""`pqk ledger` of a card's own result: B1 as it was run, a student that is quantized and trained, and kept graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from run_toys import Outcome, written

from pqk.cli.app import app
from pqk.errors import told
from pqk.families.dust3r.settings import METRICS as KNOWN
from pqk.models import load_model
from pqk.recipe.columns import described_metrics
from pqk.recipe.request import count_parameters
from pqk.record.ledger import read_rows
from pqk.record.pair_scores import scores_here, scores_in

ABOUT = described_metrics(KNOWN)
METRICS = (*ABOUT, "absrel_p95")
pytest.importorskip("openvino")
pytest.importorskip("nncf")

pytestmark = pytest.mark.usefixtures("forked_workers")


Ledger = Callable[..., Outcome]


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ledger:
    """`pqk ledger VERB ...` in a project, in this process, which has its imports done; other verbs by `verb="run"`."""

    def call(root: Path, *words: str | Path, verb: str = "ledger") -> Outcome:
        monkeypatch.chdir(root)
        monkeypatch.setenv("COLUMNS", "400")
        capsys.readouterr()
        code = told(lambda: app([verb, *map(str, words)], standalone_mode=False) or 0)
        said = capsys.readouterr()
        return Outcome(int(code), said.out, said.err)

    return call


QUICK = ("--eval-seeds", "0", "--no-timing")


def of(card: str, model: Path, seed: int | None = None) -> tuple[str | Path, ...]:
    chosen = () if seed is None else ("--train-seed", str(seed))
    return ("--card", card, "--backend", "openvino", "--model", model, *chosen)


def test_the_result_of_a_run_is_the_one_of_its_record(
    copy_of: Callable[[], Path], finished: tuple[Path, Outcome], tiny_model: Path, ledger: Ledger
) -> None:
    root, record = copy_of(), finished[1].record
    before = {path.name: path.read_bytes() for path in (root / "logs").glob("*.json")}
    made = ledger(root, "eval", *of("B1", tiny_model), *QUICK)
    assert (made.code, made.out) == (0, "results/B1.openvino.tsv\n"), made.err
    assert "… " not in made.err  # everything was there
    (row,) = read_rows(root / "results" / "B1.openvino.tsv")
    assert [row[name] for name in METRICS if name in record] == [record[name] for name in METRICS if name in record]
    assert row["drop_pct"] == record["quality_drop_pct"]
    hashes = record["hashes"]
    assert (row["checkpoint_sha256"], row["float_sha256"]) == (hashes["engine"], hashes["model"])
    assert row["teacher_sha256"] == hashes["model"] and row["params"] == record["params"]
    assert (row["checkpoint"], row["lowered"], row["precision"]) == ("tiny+PTQ", "PTQ", "int8")
    assert (row["train_seed"], row["eval_seed"], row["settings"]) == (0, 0, None)
    assert row["isa"] and row["cores"] >= 1
    assert {path.name: path.read_bytes() for path in (root / "logs").glob("*.json")} == before  # the run's, untouched

    # Another draw of scenes, which the Teacher sees as well.
    made = ledger(root, "eval", *of("B1", tiny_model), "--eval-seeds", "0..1")
    assert made.code == 0 and made.err.count("as it was not timed") == 1, made.err
    first, second = read_rows(root / "results" / "B1.openvino.tsv")
    assert first["absrel"] == row["absrel"] and first["scenes_sha256"] != second["scenes_sha256"]
    assert second["drop_pct"] is not None and second["fps"] > 0
    file = "results/B1.openvino.tsv"
    same = ledger(root, "compare", file, file)  # from the scores of every pair, which the store has
    assert same.code == 0 and re.search(r"B - A over [2-9] scenes: \+0, ", same.out), same.out + same.err


def test_kept_graphs_are_measured_again(copy_of: Callable[[], Path], tiny_model: Path, ledger: Ledger) -> None:
    root = copy_of()
    words = of("B1", tiny_model)
    assert ledger(root, "eval", *words, *QUICK).code == 0
    frozen = ledger(root, "freeze", "demo")
    assert frozen.code == 0 and "scores per sample" not in frozen.out
    (evaluated,) = read_rows(root / "results" / "B1.openvino.tsv")
    (kept_scores,) = (root / "deliverables" / "demo" / "scores").iterdir()
    assert kept_scores.name == f"{Path(evaluated['output']).name}.tsv"
    pairs = scores_in(root / "deliverables" / "demo")(evaluated)
    assert pairs is not None and pairs == scores_here(root)(evaluated) and len(pairs) == evaluated["pairs"]
    lacking = ledger(root, "verify", "demo")
    assert lacking.code == 2 and "pqk ledger finalize --card B1 --train-seed 0 --backend openvino" in lacking.sentence
    kept = ledger(root, "finalize", *words)
    assert kept.code == 0 and "graphs of PTQ" in kept.out, kept.err
    folder = root / kept.out.splitlines()[-1]
    (row,) = read_rows(root / "results" / "B1.openvino.tsv")
    assert folder.name == f"B1-s0-{row['checkpoint_sha256'][:8]}"
    assert "was kept already" in ledger(root, "finalize", *words).out
    assert count_parameters(load_model(folder / "float")) == row["params"]

    again = ledger(root, "verify", "demo")
    assert again.code == 0, again.out + again.err
    assert "checkpoint tiny+PTQ: as it was" in again.out and "quantization" not in again.err
    by_name = ledger(root, "eval", folder.name, "--backend", "openvino", "-o", "k.tsv", *QUICK)
    assert by_name.code == 0, by_name.err
    (same,) = read_rows(root / "k.tsv")
    for name in (*METRICS, "checkpoint_sha256", "float_sha256", "config_sha256", "lowered", "train_seed", "precision"):
        assert same[name] == row[name], name
    refused = ledger(root, "eval", folder.name, "--precision", "fp32", "--backend", "openvino")
    assert "is quantized already" in refused.sentence

    weights = folder / "decoder.bin"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    assert ledger(root, "verify", "demo").code == 2  # these are not the graphs of the row
    assert "was changed after it was finalized" in ledger(root, "eval", folder.name).sentence


def test_a_trained_result_has_its_train_seed(
    copy_of: Callable[[], Path], finished: tuple[Path, Outcome], tiny_model: Path, ledger: Ledger
) -> None:
    """A1 is made where it is not there. Other settings are another run; a changed config is the same run, done anew."""
    root = copy_of()
    words = of("A1", tiny_model, 1)
    made = ledger(root, "eval", *words, *QUICK)
    assert made.code == 0 and "… distillation" in made.err, made.err
    (row,) = read_rows(root / "results" / "A1.openvino.tsv")
    assert row["train_seed"] == 1 and row["settings"] is None  # the seed has a column of its own
    assert (row["checkpoint"], row["precision"], row["lowered"]) == ("tiny+K", "f32", None)
    assert row["params"] < finished[1].record["params"]

    kept = ledger(root, "finalize", *words)
    assert kept.code == 0 and "train seed 1, task card A1" in kept.out, kept.err
    name = Path(kept.out.splitlines()[-1]).name
    assert name == f"A1-s1-{row['checkpoint_sha256'][:8]}"
    again = ledger(root, "eval", name, "--backend", "openvino", "-o", "k.tsv", *QUICK)
    assert again.code == 0, again.err
    (same,) = read_rows(root / "k.tsv")  # a checkpoint like any other
    assert [same[n] for n in (*METRICS, "config_sha256")] == [row[n] for n in (*METRICS, "config_sha256")]

    assert ledger(root, "eval", *words, *QUICK, "--set", "distill.student.ffn=0.3").code == 0
    assert len(read_rows(root / "results" / "A1.openvino.tsv")) == 2
    config = root / "configs" / "distill.yaml"
    text = config.read_text()
    assert text.count("ffn: 0.6") == 1
    config.write_text(text.replace("ffn: 0.6", "ffn: 0.4"))
    assert ledger(root, "eval", *words, *QUICK).code == 0
    rows = read_rows(root / "results" / "A1.openvino.tsv")
    assert len(rows) == 2 and row["checkpoint_sha256"] not in {r["checkpoint_sha256"] for r in rows}


def test_the_better_of_ptq_and_qat_is_the_result(copy_of: Callable[[], Path], tiny_model: Path, ledger: Ledger) -> None:
    root = copy_of()
    line = ("--set", "eval.quality.main_metric=delta1", "--set", "eval.thresholds.quality_drop_q_only_pct=0")
    made = ledger(root, "eval", *of("B1", tiny_model), *QUICK, *line)
    assert made.code == 0 and "… quantization-aware training" in made.err and "QAT: drop " in made.err, made.err
    (row,) = read_rows(root / "results" / "B1.openvino.tsv")
    run = ledger(
        root, "B1", "--backend", "openvino", "--model", tiny_model, "--no-rollback", "--json", *line, verb="run"
    )
    assert run.code in (0, 1, 4) and "… quantization" not in run.err, run.err
    (record,) = (r for r in written(root) if r["main_metric"] == "delta1" and r["role"] == "candidate")
    assert record["hashes"]["engine"] == row["checkpoint_sha256"] and record["quality_drop_pct"] == row["drop_pct"]
    assert row["lowered"] == ("QAT" if "QAT: " in record["notes"] else "PTQ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "give a CKPT, or --card for the own result of a card"),
        (("--card", "B1", "--precision", "bf16"), "--precision bf16 is for a CKPT"),
        (("--card", "Z9"), "there is no card 'Z9'"),
        (("--card", "H1"), "is a matrix of"),
        (("--card", "B1", "--train-seed", "1", "--set", "workload.seeds.train=2"), "contradict each other"),
        (("models", "--card", "B1", "--model", "m"), "no checkpoint 'models'"),
    ],
)
def test_wrong_words(project: Path, ledger: Ledger, words: tuple[str, ...], sentence: str) -> None:
    outcome = ledger(project, "eval", *words, "--backend", "openvino")
    assert outcome.code == 2 and sentence in outcome.sentence
    assert not (project / "outputs" / "store").exists()
