"""The official answers (tests/golden), and what scripts/check_vectors.py says of cases that are wrong in some way."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pqk.bench.vectors import main, run_case
from pqk.errors import told
from pqk.families.vectors import Case, compare, find_cases

GOLDEN = Path(__file__).parents[1] / "golden"
UNREAD = ("must hold one JSON object", "has no 'kind'")  # the kind, so --only cannot leave the case out
SLOW = {"dust3r_512_dpt_fullsize_recipe": [pytest.mark.slow]}  # 2.5 GB, about 20 seconds


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.name, marks=SLOW.get(path.name, [])) for path in find_cases(GOLDEN)]
)
def test_official_answers(path):
    outcome = run_case(path)
    assert outcome.state == "passes", outcome.report()
    assert not outcome.not_handled


@pytest.fixture
def case(tmp_path):
    """A copy of a small case, to spoil."""
    return Path(shutil.copytree(GOLDEN / "dust3r_rope", tmp_path / "cases" / "dust3r_rope"))


def check(capsys, *arguments):
    """Exit code, output and message of the script."""
    code = told(lambda: main(list(map(str, arguments))))
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return code, said.out, said.err


def change(case, **arrays):
    with np.load(case / "io.npz") as stored:
        np.savez(case / "io.npz", **{**{name: stored[name] for name in stored.files}, **arrays})


def edit(case, **entries):
    (case / "case.json").write_text(json.dumps({**json.loads((case / "case.json").read_text()), **entries}))


def test_a_case_that_agrees(case, capsys):
    for folder in (case, case.parent):
        code, out, _ = check(capsys, folder, "--only", "dust3r_r*")
        assert code == 0
        assert "dust3r_rope (dust3r_rope): passes" in out and "1 cases: 1 passes" in out
        assert "out_0, out_1, out_2: largest relative error" in out and "pass mark 1e-05" in out


@pytest.mark.parametrize("wrong", [3e-5, np.nan, np.inf])
def test_a_wrong_number_names_its_tensor(case, capsys, wrong):
    expected = Case(case)["out_1"].copy()
    expected.flat[5] += np.abs(expected).max() * wrong
    change(case, out_1=expected)
    code, out, _ = check(capsys, case)
    assert code == 1
    assert "dust3r_rope (dust3r_rope): fails" in out and "FAILS out_1: " in out and "FAILS out_0" not in out


def test_a_wrong_shape_and_a_wrong_integer(case, capsys):
    change(case, out_0=np.zeros((1, 3, 9, 16), np.float32), mid_pos1=Case(case)["mid_pos1"] + 1)
    code, out, _ = check(capsys, case)
    assert code == 1
    assert "FAILS out_0: its shape is (2, 3, 9, 16) instead of (1, 3, 9, 16)" in out
    assert "FAILS mid_pos1: 24 of 24 values differ" in out


def test_what_no_code_handles_is_named(case, capsys):
    change(case, out_new=np.ones(2))
    edit(case, answers={"scores": [{"a": 1.0, "b": 2.0}, {"a": 3.0}], "word": "x", "c_for_contrast": 1.0})
    code, out, _ = check(capsys, case)
    assert code == 1
    assert "partly handled" in out and "no code handles out_new, answers" in out
    edit(case, kind="teapot_model")
    code, out, _ = check(capsys, case)
    assert code == 1
    assert "no code handles the kind teapot_model" in out and "kinds that no code handles: teapot_model" in out
    shutil.copytree(GOLDEN / "dust3r_pairs", case.parent / "pairs")
    assert check(capsys, case.parent)[0] == 1
    assert check(capsys, case.parent, "--only", "dust3r_pairs")[0] == 0


def test_answers_are_counted_as_read_one_by_one(case):
    edit(case, answers={"scores": [{"a": 1.0, "b": {"x": 2.0}}, {"a": 3.0}], "clip 1..2": {"a": 1}})
    opened = Case(case)
    assert opened.check_answer(1.0, "scores", 0, "a", mark=0).passes
    expected = ["out_0", "out_1", "out_2", "answers.scores.0.b", "answers.scores.1", "answers.clip 1..2"]
    assert opened.not_handled() == expected


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda case: (case / "case.json").unlink(), "case.json cannot be read"),
        (lambda case: (case / "case.json").write_text('{"kind": '), "case.json is not valid JSON"),
        (lambda case: (case / "case.json").write_text("[]"), "must hold one JSON object"),
        (lambda case: (case / "case.json").write_text("{}"), "has no 'kind'"),
        (lambda case: (case / "io.npz").write_bytes((case / "io.npz").read_bytes()[:-900]), "io.npz is damaged"),
        (lambda case: (case / "io.npz").write_text("no arrays"), "io.npz is damaged"),
        (lambda case: change(case, out_0=np.array([{}], dtype=object)), "io.npz is damaged"),
        (lambda case: (case / "io.npz").unlink() or edit(case, io={"out_0": ["float32", [1]]}), "has no array out_0"),
        (lambda case: edit(case, io={"in_q0": ["float64", [2]]}), "in_q0 is float32 [2, 3, 9, 16]"),
        (lambda case: edit(case, io=[3]), "'io' must give"),
        (lambda case: edit(case, subcases=[]), "in_q1 has neither in_pos1 nor a grid"),
        (lambda case: edit(case, kind="dust3r_blocks"), "has no 'config'"),
    ],
)
def test_a_damaged_case_is_one_sentence_and_the_others_run(case, capsys, spoil, sentence):
    spoil(case)
    shutil.copytree(GOLDEN / "dust3r_pairs", case.parent / "pairs")
    code, out, err = check(capsys, case.parent)
    assert code == 2
    assert sentence in err and err.startswith("pqk: ") and err.count("\n") == 1
    assert "1 damaged" in out and "pairs (dust3r_pairs): passes" in out
    assert check(capsys, case.parent, "--only", "dust3r_pairs")[0] == (
        2 if "case.json" in sentence or sentence in UNREAD else 0
    )


def test_bad_folders_and_kinds(case, capsys):
    (case.parent / "empty").mkdir()
    for arguments, sentence in (
        ([case.parent / "absent"], "absent is no folder"),
        ([case / "io.npz"], "io.npz is no folder"),
        ([case.parent / "empty"], "holds no case"),
        ([case, "--only", "dust3r_rop"], "no case is of the kind dust3r_rop (did you mean 'dust3r_rope'?)"),
    ):
        code, _, err = check(capsys, *arguments)
        assert code == 2 and sentence in err


def test_a_runner_that_raises_is_a_failure(tmp_path, capsys):
    """Weights of another shape, and a value of another type: never a traceback."""
    case = tmp_path / "blocks"
    shutil.copytree(GOLDEN / "dust3r_blocks", case)
    weights = load_file(case / "weights.safetensors")
    save_file({**weights, "enc.norm1.weight": torch.zeros(3)}, case / "weights.safetensors")
    code, out, _ = check(capsys, case)
    assert code == 1 and "FAILS: RuntimeError" in out and "size mismatch" in out
    edit(case, config={"enc_dim": "wide", "enc_heads": None})
    assert check(capsys, case)[0] == 1
    (case / "weights.safetensors").write_bytes(b"12345678")
    code, _, err = check(capsys, case)
    assert code == 2 and "weights.safetensors is missing, damaged or no safetensors file" in err


def test_comparing():
    assert compare("a", [1.0, np.nan, np.inf], [1.0, np.nan, np.inf]).error == 0
    assert compare("a", [1.0, -np.inf], [1.0, np.inf]).error == np.inf
    assert compare("a", [2.0, 100.001], [2.0, 100.0]).error == pytest.approx(1e-5)
    assert compare("a", [0.0, 1e-6], [0.0, 0.0]).error == 1e-6
    assert not compare("a", [1.0], [1]).why and compare("a", [1.2], [1]).why == "1 of 1 values differ"
    assert compare("a", np.zeros((0, 3)), np.zeros((0, 3))).passes


def metrics_case(folder, name, **entries):
    """A case of an evaluation protocol with exact answers in closed form."""
    case = folder / name
    case.mkdir()
    arrays = {key: value for key, value in entries.items() if isinstance(value, np.ndarray)}
    info = {key: value for key, value in entries.items() if key not in arrays}
    (case / "case.json").write_text(json.dumps(info))
    np.savez(case / "io.npz", **arrays)
    return case


def test_cases_of_the_metrics(tmp_path):
    gt = np.array([[1.0, 2.0, 4.0, 80.0]])
    pred = np.array([[0.5, 1.0, 2.5, 1.0]], np.float32)
    scores = {"Abs Rel": 0.25 / 3, "RMSE": 1 / 3**0.5, "delta1": 2 / 3, "delta2": 1.0, "valid_pixels": 3}
    frame = {"max_depth": 70, "post_clip_max": None, "derived_float64": {"median_numpy": scores}}
    frame["factors_float64"] = {"median_ratio_numpy": 2.0}
    depth = {"kind": "proto_depth", "in_pred_0": pred, "in_gt_0": gt}
    case = metrics_case(tmp_path, "depth", **depth, answers={"frames": [frame]})
    outcome = run_case(case)
    assert outcome.state == "passes" and len(outcome.compared) == 6, outcome.report()
    scores["RMSE"] *= 1.00001
    edit(case, answers={"frames": [frame]})
    assert "FAILS answers.frames.0.derived_float64.median_numpy.RMSE" in run_case(case).report()
