"""The three configs: the shipped ones, every kind of bad input, overrides, seeds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pqk.errors import PqkError
from pqk.families.dust3r.settings import Evaluation, load_evaluation, load_workload
from pqk.settings.evaluation import loosened
from pqk.settings.quant import load_quant
from pqk.settings.yamlfile import SpecError, expand, merge, parse_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
LOADERS: dict[str, Callable[..., Any]] = {
    "workload.yaml": load_workload,
    "eval.yaml": load_evaluation,
    "quant.yaml": load_quant,
}


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (old, text.count(old))
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_the_shipped_configs_hold_the_numbers_of_the_lab(configs: Path) -> None:
    workload, evaluation, quant = load_workload(), load_evaluation(), load_quant()
    assert workload.input.shape == (1, 3, 512, 512)
    assert (workload.pair_graph.kind, workload.pair_graph.k) == ("neighbor", 4)
    assert workload.calibration.images == quant.ptq.calibration_images == 512
    assert set(evaluation.quality.metrics) == {
        *("chamfer", "absrel", "rmse", "delta1", "reproj_px"),
        *("ause", "chamfer_paired"),
    }
    assert evaluation.thresholds.quality_drop_mainline_pct == 1.0
    assert evaluation.thresholds.t_pair_p50_reduction_pct == 50
    assert evaluation.stop_loss.no_improve_ckpt == 3
    assert quant.ptq.keep_list == ("LayerNorm", "Softmax", "AttentionScales")
    assert workload.source == configs / "workload.yaml"


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        # Unknown keys, with the nearest one.
        (
            "workload.yaml",
            "  k: 4",
            "  k: 4\n  symetrize: true",
            "workload.yaml:12: unknown key 'pair_graph.symetrize'",
        ),
        ("eval.yaml", "quality_drop_q_only_pct", "quality_drop_qonly_pct", r"did you mean 'quality_drop_q_only_pct'\?"),
        ("quant.yaml", "  bits_w: 8", "  zzz: 8\n  bits_w: 8", r"unknown key 'ptq.zzz' \(allowed here: bits_w, bits_a"),
        ("quant.yaml", "float_rest: auto", "flot_rest: auto", r"unknown key 'flot_rest' \(did you mean 'float_rest'"),
        ("quant.yaml", "  workspace_mb: 4096", "  workspce_mb: 1", r"unknown key 'trt.workspce_mb' \(did you mean"),
        ("quant.yaml", "optimization_level: null", "optimization_level: 6", "trt.optimization_level is 6 but must be"),
        # Missing keys.
        ("workload.yaml", "  k: 4\n", "", "workload.yaml:9: the key 'pair_graph.k' is missing"),
        ("eval.yaml", "  no_improve_ckpt: 3  ", "  ", "the key 'stop_loss.no_improve_ckpt' is missing"),
        # Wrong types.
        ("workload.yaml", "  k: 4", "  k: four", "pair_graph.k is 'four' but must be a whole number"),
        ("workload.yaml", "  k: 4", '  k: "4"', "pair_graph.k is '4' but must be a whole number"),
        ("workload.yaml", "  k: 4", "  k: true", "pair_graph.k is true but must be a whole number"),
        ("workload.yaml", "  k: 4", "  k: 4.5", "pair_graph.k is 4.5 but must be a whole number"),
        ("workload.yaml", "  k: 4", "  k:", "pair_graph.k is null but must be a whole number"),
        ("workload.yaml", "symmetrize: false", "symmetrize: 1", "symmetrize is 1 but must be true or false"),
        ("workload.yaml", 'version: "1.1"', "version: 1.1", r"version is 1\.1 but must be text \(put it in quotes\)"),
        ("workload.yaml", "[1, 3, 512, 512]", "512", "input.shape is 512 but must be a list"),
        ("workload.yaml", "[1, 3, 512, 512]", "[1, 3, 512, x]", r"input.shape\[3\] is 'x' but must be a whole number"),
        ("workload.yaml", "{train: 0, eval: 0}", "0", "seeds is 0 but must be a mapping"),
        ("eval.yaml", "size_ratio_min: 3.5", "size_ratio_min: high", "is 'high' but must be a number"),
        # Shapes.
        (
            "workload.yaml",
            "512, 512]",
            "500, 512]",
            r"is \[1, 3, 500, 512\] but must be \[1, 3, H, W\] .* multiples of 16",
        ),
        ("workload.yaml", "512, 512]", "512, 0]", "multiples of 16"),
        ("workload.yaml", "512, 512]", "512, -16]", "multiples of 16"),
        ("workload.yaml", "[1, 3, 512, 512]", "[2, 3, 512, 512]", "multiples of 16"),
        ("workload.yaml", "[1, 3, 512, 512]", "[1, 3, 512]", "multiples of 16"),
        # Ranges.
        ("workload.yaml", "  k: 4", "  k: 0", "workload.yaml:11: pair_graph.k is 0 but must be from 1 to 64"),
        ("workload.yaml", "min_covisibility: 0.30", "min_covisibility: 30", "must be from 0 to 1"),
        ("workload.yaml", "train: 0", "train: -1", "seeds.train is -1 but must be at least 0 and less than 1024"),
        ("eval.yaml", "quality_drop_mainline_pct: 1.0", "quality_drop_mainline_pct: -1", "must be from 0 to 20"),
        ("eval.yaml", "t_pair_p50_reduction_pct: 50", "t_pair_p50_reduction_pct: 150", "must be from 0 to 95"),
        ("eval.yaml", "as_planned_min: 0.98", "as_planned_min: 98", "must be from 0 to 1"),
        ("eval.yaml", "float_pct: 0 ", "float_pct: 6 ", "must be from 0 to 5"),
        (
            "eval.yaml",
            "max_seconds: 20",
            "max_seconds: 0",
            "max_seconds is 0 but must be more than 0 and at most 86400",
        ),
        (
            "eval.yaml",
            "min_rounds: 30",
            "min_pairs: 30",
            r"unknown key 'efficiency.min_pairs' \(did you mean 'min_rounds'\?\)",
        ),
        ("eval.yaml", "min_seconds: 2", "min_seconds: 30", "min_seconds 30, which must be at most max_seconds, 20"),
        ("eval.yaml", "enough_pct: null", "enough_pct: 0", "enough_pct is 0 but must be more than 0 and at most 100"),
        ("eval.yaml", "max_load: 0.25", "max_load: -1", "max_load is -1 but must be from 0 to 10000"),
        ("eval.yaml", "gpu_hours_overrun_pct: 120", "gpu_hours_overrun_pct: 20", "must be from 100 to 300"),
        ("quant.yaml", "smooth_quant_alpha: null", "smooth_quant_alpha: 1.5", "must be from 0 to 1"),
        ("quant.yaml", "calibration_images: 512", "calibration_images: 0", "must be from 2 to 100000"),
        # Choices.
        (
            "workload.yaml",
            "kind: neighbor",
            "kind: neighbour",
            r"must be 'neighbor', .* \(did you mean 'neighbor'\?\)",
        ),
        ("eval.yaml", "main_metric: absrel", "main_metric: abs_rel", r"main_metric 'abs_rel'.*did you mean 'absrel'\?"),
        ("eval.yaml", "chamfer, absrel, rmse", "chamfer, rmse", "main_metric 'absrel', which is not among its metrics"),
        ("eval.yaml", "chamfer, absrel, rmse", "absrel, absrel, rmse", "lists a metric twice"),
        (
            "eval.yaml",
            "scale_alignment: median",
            "scale_alignment: mean",
            "scale_alignment is 'mean' but must be 'median'",
        ),
        ("quant.yaml", "bits_w: 8", "bits_w: 4", "ptq must hold bits_w 8 with bits_a 8, or bits_w 4 with bits_a 16"),
        (
            "quant.yaml",
            "LayerNorm, Softmax",
            "LayerNrom, Softmax",
            r"'LayerNrom' is neither \(did you mean 'LayerNorm'\?\)",
        ),
        (
            "quant.yaml",
            "LayerNorm, Softmax",
            "'/blocks(', Softmax",
            "must hold regular expressions, and '/blocks\\(' is not one",
        ),
        ("quant.yaml", "LayerNorm, Softmax", "Softmax, Softmax", "must not hold an entry twice"),
        # Relations.
        (
            "eval.yaml",
            "quality_drop_q_only_pct: 1.0",
            "quality_drop_q_only_pct: 2.5",
            r"must be at most stop_loss.drop_stop_q_pct, 2",
        ),
        (
            "workload.yaml",
            "{source: synthetic, count: 52, views: 2",
            "{source: synthetic, count: 52",
            "needs both 'count' and 'views'",
        ),
        ("workload.yaml", "count: 52, views: 2", "count: 52, views: 2, names: [a]", "takes no 'names'"),
        (
            "workload.yaml",
            "synthetic, count: 52",
            "data/eth3d, names: [../a], count: 52",
            "plain folder names, and '../a' is not one",
        ),
        ("eval.yaml", "plots: reports/plots", "plots: ../plots", "must be a relative path inside the project"),
        ("eval.yaml", "plots: reports/plots", "plots: /plots", "must be a relative path inside the project"),
        # YAML itself.
        ("workload.yaml", "  k: 4", "  k: 4\n  k: 5", "workload.yaml:12: the key pair_graph.k is given twice"),
        (
            "workload.yaml",
            "  k: 4",
            "\tk: 4",
            "workload.yaml:11: not valid YAML: a tab is used where YAML wants spaces",
        ),
        ("workload.yaml", "[1, 3, 512, 512]", "[1, 3, 512, 512", "workload.yaml:9: not valid YAML"),
        ("workload.yaml", "{train: 0, eval: 0}", "&a {train: 0, eval: *a}", "aliases .* are not used"),
        ("workload.yaml", "{train: 0, eval: 0}", "{train: 0, eval: 0, on: 1}", "the key on is not text"),
        (
            "workload.yaml",
            "{train: 0, eval: 0}",
            "!!python/object:os.system {}",
            "is read as 'python/object:os.system'",
        ),
        # Tags that are written out: some of PyYAML's constructors fail on these with a KeyError or an IndexError.
        (
            "workload.yaml",
            "symmetrize: false",
            "symmetrize: !!bool x",
            r":12: tags \(!!bool\) are not used",
        ),
        ("workload.yaml", "  k: 4", '  k: !!int ""', r"workload.yaml:11: tags \(!!int\) are not used"),
        ("workload.yaml", "  k: 4", '  k: !!int "-"', r"workload.yaml:11: tags \(!!int\) are not used"),
        ("workload.yaml", "  k: 4", '  k: !!float ""', "a value cannot be read"),
        ("workload.yaml", "  k: 4", "  k: !!str 4", r"workload.yaml:11: tags \(!!str\) are not used"),
        ("workload.yaml", "  k: 4", "  k: ! 4", r"workload.yaml:11: tags \(!\) are not used"),
        ("workload.yaml", "{train: 0, eval: 0}", "!!map {train: 0, eval: 0}", r"tags \(!!map\) are not used"),
        ("workload.yaml", "min_covisibility: 0.30", "min_covisibility: .nan", "must be a finite number"),
        ("workload.yaml", "min_covisibility: 0.30", "min_covisibility: -.inf", "must be a finite number"),
        ("workload.yaml", "min_covisibility: 0.30", "min_covisibility: 1:30", "is read as a number in base 60"),
        ("workload.yaml", "  k: 4", "  k: 010", "k is 010, which YAML may read in base 8: write the number without"),
        ("workload.yaml", "  k: 4", "  k: +0_7", "k is [+]0_7, which YAML may read in base 8"),
        ("workload.yaml", "  k: 4", "  k: 08", "k is '08' but must be a whole number"),
        (
            "workload.yaml",
            "min_covisibility: 0.30",
            "min_covisibility: 00.30",
            "is 00.30, which YAML may read in base 8",
        ),
        (
            "workload.yaml",
            "min_covisibility: 0.30",
            "min_covisibility: -01.5",
            "is -01.5, which YAML may read in base 8",
        ),
        ("workload.yaml", "min_covisibility: 0.30", "min_covisibility: 1e999", "must be a finite number"),
        (
            "workload.yaml",
            'version: "1.1"',
            "version: 2025-10-08",
            "version is read as 'timestamp'; put text in quotes",
        ),
    ],
)
def test_bad_values_get_one_sentence(configs: Path, name: str, old: str, new: str, message: str) -> None:
    edit(configs / name, old, new)
    with pytest.raises(PqkError, match=message) as caught:
        LOADERS[name]()
    text = str(caught.value)
    assert text.startswith(f"configs/{name}")
    assert "\n" not in text
    assert not re.search("pydantic|validation error|Traceback", text)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", ":1: must be a mapping of keys to values at the top"),
        (b"just text\n", "must be a mapping"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"version: \xff\xfe\n", r"is not UTF-8 text \(byte 9 cannot be read\)"),
        (b"version: \x00\n", "not valid YAML"),
        (b"a: " + b"[" * 3000, "is nested too deeply|not valid YAML"),
        (b"a: " + b"9" * 5000, "a value cannot be read"),
        (b"#" * 1_000_001, "is larger than 1000000 bytes"),
    ],
)
def test_bad_files_get_one_sentence(configs: Path, name: str, content: bytes, message: str) -> None:
    (configs / name).write_bytes(content)
    with pytest.raises(PqkError, match=message) as caught:
        LOADERS[name](configs / name)
    assert str(caught.value).startswith(f"configs/{name}")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(configs: Path) -> None:
    with pytest.raises(PqkError, match=r"^configs/workloads\.yaml: no such file \(did you mean 'workload'\?\)$"):
        load_workload(configs / "workloads.yaml")
    with pytest.raises(PqkError, match=r"^configs: is not a file$"):
        load_workload(configs)


def test_all_problems_are_kept(configs: Path) -> None:
    edit(configs / "workload.yaml", "  k: 4", "  k: 0")
    edit(configs / "workload.yaml", "kind: neighbor", "kind: ring")
    with pytest.raises(SpecError) as caught:
        load_workload()
    assert len(caught.value.problems) == 2
    assert str(caught.value).endswith("(and 1 more)")


def test_frozen(configs: Path) -> None:
    workload = load_workload()
    with pytest.raises(ValidationError, match="frozen"):
        workload.pair_graph.k = 9
    with pytest.raises(ValidationError, match="frozen"):
        workload.seeds = workload.seeds


def test_sha256_follows_values_not_layout(configs: Path) -> None:
    before = {name: load().sha256 for name, load in LOADERS.items()}
    for name in LOADERS:
        values = yaml.safe_load((configs / name).read_text(encoding="utf-8"))
        (configs / name).write_text(yaml.safe_dump(values, sort_keys=True), encoding="utf-8")
    assert {name: load().sha256 for name, load in LOADERS.items()} == before
    assert load_workload(overrides={"pair_graph.k": 4}).sha256 == before["workload.yaml"]
    assert load_workload(overrides={"pair_graph.k": 2}).sha256 != before["workload.yaml"]


def test_a_number_with_an_exponent_is_a_number(configs: Path) -> None:
    edit(configs / "quant.yaml", "learning_rate: 2.0e-6", "learning_rate: 1e-5")
    assert load_quant().qat.learning_rate == 1e-5


def test_overrides(configs: Path) -> None:
    changed = load_workload(
        overrides={"pair_graph.k": 2, "pair_graph": {"symmetrize": True}, "input": {"shape": [1, 3, 64, 96]}}
    )
    assert (changed.pair_graph.k, changed.pair_graph.symmetrize, changed.pair_graph.kind) == (2, True, "neighbor")
    assert (changed.input.height, changed.input.width) == (64, 96)
    folder = load_workload(overrides={"scenes.test": {"source": "data/eth3d", "names": ["b", "a"]}})
    assert folder.scenes.test.names == ("b", "a")
    assert load_quant(overrides={"ptq.smooth_quant_alpha": 0.95}).ptq.smooth_quant_alpha == 0.95


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pair_graph.kk": 2}, r"^card: unknown key 'workload.pair_graph.kk'"),
        ({"pair_grph": {"k": 2}}, r"^card: unknown key 'workload.pair_grph' \(did you mean 'pair_graph'\?\)$"),
        ({"pair_graph.k": 0}, r"^card: workload.pair_graph.k is 0 but must be from 1 to 64$"),
        ({"pair_graph": 3}, r"^card: workload.pair_graph is 3 but must be a mapping"),
        ({"input.shape": [1, 3, 100, 100]}, "^card: workload.input.shape is .* multiples of 16"),
        ({"pair_graph.k": 2, "pair_graph": {"k": 2}}, r"^card: the key pair_graph.k is given twice$"),
        ({"pair_graph..k": 2}, r"^card: 'pair_graph..k' is not a key$"),
        ({"pair_graph.k.deep": 2}, "^card: workload.pair_graph.k is .* but must be a whole number"),
    ],
)
def test_bad_overrides_name_their_origin(configs: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(PqkError, match=message):
        load_workload(overrides=overrides, origin="card")


def test_splits_of_one_folder(configs: Path) -> None:
    """Each split names its scenes, and no scene twice; a calibration set without names keeps its old sha256."""
    mine = {"source": "data/rooms"}
    splits = {
        "scenes.validation": {**mine, "names": ["a"]},
        "scenes.test": {**mine, "names": ["b", "c\\d"]},
        "calibration": {**mine, "names": ["e"]},
    }
    workload = load_workload(overrides=splits)
    assert workload.scenes.test.names == ("b", "c\\d") and workload.calibration.names == ("e",)
    assert workload.model_dump(mode="json")["calibration"]["names"] == ["e"]
    assert "names" not in load_workload().model_dump(mode="json")["calibration"]
    for part, value, message in (
        ("scenes.validation", {**mine, "names": ["c", "b"]}, "scenes.validation and scenes.test both name scene 'b'"),
        (
            "calibration",
            {**mine, "names": ["a"]},
            "scenes.validation and calibration both name scene 'a' of data/rooms",
        ),
        ("calibration", mine, "scenes.validation and calibration take scenes of the same source, so both need 'names'"),
        ("calibration", {"names": ["a"]}, "calibration with source 'synthetic' takes no 'names'"),
        ("calibration", {**mine, "names": []}, "must hold at least one name and none twice"),
        ("calibration", {**mine, "names": ["../a"]}, "plain folder names, and '../a' is not one"),
    ):
        with pytest.raises(PqkError, match=re.escape(message)):
            load_workload(overrides={**splits, part: value})


THRESHOLDS = list(Evaluation.model_fields["thresholds"].annotation.model_fields)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", THRESHOLDS)
def test_loosening_is_seen_in_the_right_direction(configs: Path, name: str) -> None:
    base = load_evaluation(overrides={"thresholds.not_slower_than_best_float_pct": 1.0})
    value = getattr(base.thresholds, name)
    found = []
    for factor in (0.99, 1.01):
        changed = load_evaluation(
            overrides={
                "thresholds.not_slower_than_best_float_pct": 1.0,
                "stop_loss.drop_stop_p_pct": 5.0,
            }
            | {f"thresholds.{name}": value * factor}
        )
        found.append(f"thresholds.{name}" in loosened(base, changed))
    at_least = name in {
        "t_pair_p50_reduction_pct", "size_reduction_p_only_pct", "size_ratio_min", "as_planned_min"
    }  # fmt: skip
    assert found == [at_least, not at_least]


names = st.sampled_from(["a", "b", "c"])
nested = st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=8)
mappings = st.dictionaries(names, nested, max_size=3)


@given(mappings, mappings)
def test_merge_laws(base: dict[str, Any], over: dict[str, Any]) -> None:
    merged = merge(base, over)
    assert merge(merged, over) == merged
    assert merge(base, {}) == base
    assert merge({}, over) == over
    for name, value in over.items():
        if not isinstance(value, dict):
            assert merged[name] == value


@given(mappings)
def test_dotted_and_nested_keys_mean_the_same(values: dict[str, Any]) -> None:
    def dotted(part: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in part.items():
            flat |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
        return flat

    assert expand(dotted(values), "test") == values == expand(values, "test")


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused_in_one_sentence(text: str) -> None:
    try:
        document = parse_yaml(text, "file")
    except PqkError as error:
        assert str(error).startswith("file")
        assert "\n" not in str(error)
    else:
        assert all(isinstance(name, str) for name in document.values)
