"""Files that may not be read: one sentence that names them, exit code 2, and never "damaged" or "not there"."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_toys import environment, many

from pqk.files import check_readable, write_json
from pqk.store.store import Store

PLAIN = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
"""Begins a command whose permissions count; for root they do not, unless it gives up this right."""


@pytest.fixture(scope="module", autouse=True)
def permissions_count(tmp_path_factory: pytest.TempPathFactory) -> None:
    if PLAIN and shutil.which(PLAIN[0]) is None:
        pytest.skip("root may read everything, and setpriv is not there to give that up")
    secret = tmp_path_factory.mktemp("secret") / "file"
    secret.write_text("x")
    secret.chmod(0)
    if subprocess.run([*PLAIN, "cat", secret], capture_output=True).returncode == 0:
        pytest.skip("this user may read everything")


RUN = ["run", "B1", "--backend", "openvino"]
CASES: list[tuple[str, list[str], str]] = [
    ("configs", ["check"], "configs/workload.yaml"),
    ("configs/quant.yaml", RUN, "configs/quant.yaml"),
    ("schedule/TaskCards", ["check"], "schedule/TaskCards"),
    ("schedule/TaskCards", RUN, "schedule/TaskCards/B1.md"),
    ("schedule/TaskCards/B1.md", RUN, "schedule/TaskCards/B1.md"),
    ("schedule/plans", ["plan", "best"], "schedule/plans"),
    ("schedule/plans/best.yaml", ["plan", "best"], "schedule/plans/best.yaml"),
    ("logs", ["table"], "logs"),
    ("logs/unified_log_schema.json", ["table"], "logs/unified_log_schema.json"),
    ("logs/B1.json", ["table"], "logs/B1.json"),
    ("results", ["ledger", "manifest"], "results"),
    ("results/a.tsv", ["ledger", "manifest"], "results/a.tsv"),
    ("outputs/plans/minimal/state.json", ["plan", "status", "minimal"], "outputs/plans/minimal/state.json"),
    ("model", [*RUN, "--model", "model"], "model/config.json"),
    ("model/config.json", [*RUN, "--model", "model"], "model/config.json"),
    ("model/model.safetensors", [*RUN, "--model", "model"], "model/model.safetensors"),
    ("model.pth", [*RUN, "--model", "model.pth"], "model.pth"),
    ("outputs/store/scenes", [*RUN, "--model", "model"], "outputs/store/scenes"),
    ("export/manifest.json", ["export", "B1", "--backend", "openvino", "-o", "export"], "export/manifest.json"),
]


def test_every_input_by_name(project: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, project / "model")
    for folder in ("results", "export", "outputs/plans/minimal", "outputs/store/scenes"):
        (project / folder).mkdir(parents=True)
    for file in ("logs/B1.json", "outputs/plans/minimal/state.json", "export/manifest.json"):
        (project / file).write_text("{}")
    for file in ("results/a.tsv", "model.pth"):
        (project / file).write_text("x\n")
    found = many(project, tmp_path, [(path, arguments) for path, arguments, _ in CASES], PLAIN)
    for (path, arguments, named), (code, said) in zip(CASES, found, strict=True):
        last = said.splitlines()[-1].replace(f"{project}/", "")
        assert (code, last) == (2, f"pqk: cannot read {named}: permission denied"), (path, arguments, said)


SCRIPT = """
import sys
from pathlib import Path
from pqk.errors import told
from pqk.store.store import Store

def make(folder):
    raise AssertionError("made again")

def work():
    Store(Path(sys.argv[1])).get_or_make("stage", {"x": 1}, make)
    return 0

sys.exit(told(work))
"""


@pytest.mark.parametrize("name", ["", "manifest.json", "part", "part/file", ".."])
def test_an_artifact_of_another_user_is_not_damaged(name: str, tmp_path: Path) -> None:
    """It stays as it is: neither made again nor removed."""

    def make(folder: Path) -> None:
        (folder / "part").mkdir()
        write_json(folder / "part" / "file", 1)

    made = Store(tmp_path).get_or_make("stage", {"x": 1}, make).path
    shut = (made / name).resolve()
    mode = shut.stat().st_mode & 0o777
    shut.chmod(0)
    done = subprocess.run(
        [*PLAIN, sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment(), capture_output=True, text=True
    )
    shut.chmod(mode)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("pqk: cannot read ") and done.stderr.endswith(": permission denied\n"), done.stderr
    check_readable(made / "part" / "file")
    assert Store(tmp_path).get_or_make("stage", {"x": 1}, make).reused


WORKER = """
import os, sys
from pqk.store import worker

worker.TASKS["read"] = "builtins:open"
sys.argv[1:1] = ["read"]
sys.argv.append(str(os.getppid()))
worker.main()
"""


def test_in_a_worker(tmp_path: Path) -> None:
    """What a worker may not read is an answer for its parent, and no traceback."""
    asked, answered, secret = (tmp_path / name for name in ("asked.json", "answered.json", "secret"))
    asked.write_text(json.dumps({"request": str(secret), "code": {}, "known": {}}))
    secret.touch(mode=0)
    command = [*PLAIN, sys.executable, "-c", WORKER, str(asked), str(answered)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(answered.read_text()) == {"error": f"cannot read {secret}: permission denied", "exit_code": 2}
