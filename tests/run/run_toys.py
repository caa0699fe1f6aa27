"""A small project and a tiny model, so that a whole `pqk run` takes seconds; and the command line as a process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqk.families.contract import SampleSet
    from pqk.recipe.experiment import Experiment

import preloaded
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]

# Widths are multiples of 64, and a head is 32 wide: what int8 kernels of a CPU want.
TINY: dict[str, Any] = {
    "head_type": "linear",
    "img_size": [64, 64],
    "landscape_only": False,
    "enc_embed_dim": 64,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "enc_blocks": [{"heads": 2, "ffn": 256}, {"heads": 1, "ffn": 128}],
    "enc_head_dim": 32,
    "dec_embed_dim": 64,
    "dec_depth": 1,
    "dec_num_heads": 2,
}
_STAGES = "  stages:\n    - {size: 32, batch: 2, until: 0.80}\n    - {size: 64, batch: 1, until: 1.00}\n"
SMALLER = {
    "workload.yaml": {
        r"shape: \[1, 3, 512, 512\]": "shape: [1, 3, 64, 64]",
        r"(  validation: \{source: synthetic), count: \d+, views: 2": r"\1, count: 2, views: 3",
        r"(  test: \{source: synthetic), count: \d+, views: 2": r"\1, count: 2, views: 3",
        r"images: 512(?=, views_per_scene: 8)": "images: 8",
    },
    "eval.yaml": {
        r"min_rounds: 30": "min_rounds: 4",
        r"min_seconds: 2": "min_seconds: 0",
        r"warmup: 3": "warmup: 1",
        r"max_seconds: 20": "max_seconds: 5",
        r"max_load: 0.25": "max_load: 10000",  # whatever else this machine does
    },
    "quant.yaml": {
        r"calibration_images: 512": "calibration_images: 8",
        r"epochs: 12": "epochs: 2",
        r"steps_per_epoch: \d+": "steps_per_epoch: 2",
        r"size: 256": "size: 32",
        r"validation: \{size: \d+, pairs: \d+\}": "validation: {size: 64, pairs: 2}",
    },
    "distill.yaml": {
        r"epochs: \d+": "epochs: 2",
        r"steps_per_epoch: \d+": "steps_per_epoch: 3",
        r"fold_size: \d+": "fold_size: 32",
        r"  stages:[^\n]*\n(    - [^\n]*\n)+": f"{_STAGES}",
        r"validation: \{size: \d+, pairs: \d+\}": "validation: {size: 64, pairs: 2}",
    },
    "prune.yaml": {
        r"epochs: \d+": "epochs: 2",
        r"steps_per_epoch: \d+": "steps_per_epoch: 3",
        r"samples: \{pairs: \d+, size: \d+\}": "samples: {pairs: 2, size: 32}",
        r"  pairs: \d+\n  size: \d+": "  pairs: 2\n  size: 32",
        r"  stages:[^\n]*\n(    - [^\n]*\n)+": f"{_STAGES}",
        r"validation: \{size: \d+, pairs: \d+\}": "validation: {size: 64, pairs: 2}",
    },
    "joint.yaml": {
        r"samples: \{pairs: \d+, size: \d+\}": "samples: {pairs: 2, size: 32}",
        r"round_to: \d+": "round_to: 32",
        r"epochs: 4": "epochs: 2",
        r"  epochs: 10": "  epochs: 4",
        r"steps_per_epoch: \d+": "steps_per_epoch: 3",
        r"calibration_images: \d+": "calibration_images: 4",
        r"size: 256": "size: 32",
        r"validation: \{size: \d+, pairs: \d+\}": "validation: {size: 64, pairs: 2}",
    },
}


@dataclass(frozen=True)
class Outcome:
    """What a finished command left behind."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found

    @property
    def sentence(self) -> str:
        """The one line with which a user's error ends; asserts that there is exactly one, and no traceback."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("pqk: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        return lines[0].removeprefix("pqk: ")


def environment() -> dict[str, str]:
    """The tests' environment, wide enough a terminal that no message is wrapped; Python keeps what it compiled."""
    variables = {**os.environ, "COLUMNS": "500", "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    return variables


def hear_ctrl_c() -> None:
    """For a new process: a shell starts what it runs in the background, such as these tests, deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(arguments: Sequence[str | Path], root: Path, python: str = sys.executable) -> subprocess.Popen[str]:
    """`pqk ...` as a process in `root`."""
    command = [python, "-m", "pqk.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=root,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    )


def pqk(root: Path, *arguments: str | Path) -> Outcome:
    """Run `pqk ...` in `root` to its end."""
    process = start(arguments, root, preloaded.python())
    out, err = process.communicate(timeout=240)
    return Outcome(process.returncode, out, err)


def script(root: Path, name: str, *arguments: str | Path) -> Outcome:
    """Run scripts/NAME.py in `root` to its end."""
    command = [preloaded.python(), str(REPOSITORY / "scripts" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def kill(process: subprocess.Popen[str], root: Path) -> None:
    """Sends SIGKILL, and waits until no process works in the project's folder; a survivor fails the test."""
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while alive := [found for found in psutil.process_iter(["cwd"]) if found.info["cwd"] == str(root)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def many(
    root: Path, scratch: Path, cases: Sequence[tuple[str | None, Sequence[str]]], prefix: Sequence[str] = ()
) -> list[tuple[int, str]]:
    """Exit code and stderr of many commands of pqk, run by one process; see `many_commands`."""
    asked = scratch / "cases.json"
    asked.write_text(json.dumps(cases))
    python = sys.executable if prefix else preloaded.python()  # forks do not see what the prefix changes
    command = [*prefix, python, str(Path(__file__).with_name("many_commands.py")), str(root), str(asked)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(code, said) for code, said in json.loads(done.stdout.splitlines()[-1])]


def make_project(root: Path) -> Path:
    """A project whose workload is tiny: 2 test scenes of 3 views of 64x64, 8 calibration images, 4 timed pairs."""
    shutil.copytree(REPOSITORY / "configs", root / "configs")
    shutil.copytree(REPOSITORY / "schedule", root / "schedule")
    (root / "logs").mkdir()
    shutil.copy(REPOSITORY / "logs" / "unified_log_schema.json", root / "logs")
    for name, edits in SMALLER.items():
        path = root / "configs" / name
        text = path.read_text(encoding="utf-8")
        for old, new in edits.items():
            text, count = re.subn(old, new, text)
            assert count == 1, (name, old)
        path.write_text(text, encoding="utf-8")
    return root


def make_model(folder: Path) -> Path:
    """A DUSt3R of a few hundred thousand random weights, whose points lie in front of the camera."""
    import torch

    from pqk.models import build_model, save_model

    model = build_model("dust3r", TINY, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for head in (model.downstream_head1, model.downstream_head2):
            z = head.proj.bias.view(4, -1)[2]
            z += 1.5
    return save_model(model, folder)


def small_experiment(settings: Mapping[str, Any] | None = None, card: str = "B1") -> Experiment:
    """A card of this repository at 64x64 pixels, with settings such as {"workload.pair_graph.k": 2} laid over it."""
    from pqk.families.registry import family
    from pqk.recipe.experiment import resolve
    from pqk.settings.card import load_card

    given = {"workload.input.shape": [1, 3, 64, 64], **(settings or {})}
    return resolve(load_card(card, REPOSITORY), REPOSITORY, of=family("dust3r"), settings=given)


def scene_samples(
    folders: Sequence[Path], sha256: str = "0" * 64, views: int | None = None, truthful: bool = True
) -> SampleSet:
    """The samples of scenes that lie in folders, as a worker is given them."""
    from pqk.families.contract import SampleSet

    where = {"folders": [str(folder) for folder in folders]}
    return SampleSet(where, {"views": views}, tuple(folder.name for folder in folders), sha256, truthful)


def times_as_fast(record: dict[str, Any], other: dict[str, Any]) -> float:
    """The median over rounds of the other's time over this one's, of two records of one timing."""
    both = zip(other["samples"]["pair"], record["samples"]["pair"], strict=True)
    return statistics.median(theirs / ours for theirs, ours in both)


def written(root: Path) -> list[dict[str, Any]]:
    """The records of a project."""
    from pqk.record.log import read_records

    return [item.record for item in read_records(root / "logs")]
