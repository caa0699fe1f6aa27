"""A family of another package, found through its entry point: what it goes through without a line of pqk for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from run_toys import REPOSITORY, Outcome, environment, make_project

OWN = ("--set", "quant.ptq.keep_list=[]", "--set", "quant.ptq.calibration_images=4")


@dataclass
class Project:
    """A project whose Teacher is the toy, and where the toy is installed."""

    root: Path
    packages: Path

    def pqk(self, *arguments: str | Path, code: int | tuple[int, ...] = 0) -> Outcome:
        """Run `pqk ...`, which must end with one of these exit codes."""
        places = [str(REPOSITORY), str(Path(__file__).parent), str(self.packages)]
        done = subprocess.run(
            [sys.executable, "-m", "pqk.cli", *map(str, arguments)],
            cwd=self.root,
            env={**environment(), "PYTHONPATH": os.pathsep.join(places)},
            text=True,
            capture_output=True,
            timeout=240,
        )
        assert done.returncode in ((code,) if isinstance(code, int) else code), done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    def python(self, code: str) -> str:
        """Run Python where the toy is installed."""
        places = [str(REPOSITORY), str(Path(__file__).parent), str(self.packages)]
        env = {**environment(), "PYTHONPATH": os.pathsep.join(places)}
        done = subprocess.run([sys.executable, "-c", code], cwd=self.root, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("families")
    about = folder / "packages" / "toy_family-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[pqk.families]\ntoy = toy_family:FAMILY\n")
    root = make_project(folder / "project")
    made = Project(root, about.parent)
    _configure(root)
    made.python(
        "from pqk.models import build_model, save_model\nsave_model(build_model('toy', {'width': 16}), 'models/toy')\n"
    )
    return made


def _configure(root: Path) -> None:
    """The toy as the project's Teacher, its own workload.yaml and eval.yaml, and its columns in the log's schema."""
    configs = root / "configs"
    (configs / "toy").mkdir()
    evaluation = yaml.safe_load((configs / "eval.yaml").read_text())
    evaluation["quality"] = {"main_metric": "error", "metrics": ["error"]}
    del evaluation["thresholds"]["ause_rise"]
    (configs / "toy" / "eval.yaml").write_text(yaml.safe_dump(evaluation))
    workload = {"version": "1.0", "seeds": {"train": 0, "eval": 0}, "side": 32, "images": 6}
    (configs / "toy" / "workload.yaml").write_text(yaml.safe_dump(workload))
    teacher = yaml.safe_load((configs / "teacher.yaml").read_text())
    (configs / "teacher.yaml").write_text(yaml.safe_dump({**teacher, "family": "toy", "model": "models/toy"}))
    path = root / "logs" / "unified_log_schema.json"
    schema = json.loads(path.read_text())
    properties = schema["properties"]
    properties["error"] = {**properties["absrel"], "description": "|value - mean of the pixels|."}
    properties["t_net_p50_ms"] = {**properties["t_encoder_p50_ms"], "description": "Median time of the net."}
    properties["main_metric"]["enum"].append("error")
    schema["required"] += ["error", "t_net_p50_ms"]
    path.write_text(json.dumps(schema))


@pytest.fixture(scope="module")
def ran(project: Project) -> Outcome:
    return project.pqk("run", "B1", "--json", *OWN, code=(0, 1, 4))


def test_it_runs_a_card(project: Project, ran: Outcome) -> None:
    record = ran.record
    assert (record["model"], record["precision"], record["measured"]) == ("toy", "int8", "engine")
    assert record["notes"].startswith("net calibrated on 4 images")
