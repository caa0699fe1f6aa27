"""Trackers get every record of a run, against the real libraries; one that fails costs a warning and no record."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from pqk.errors import NotBuilt, PqkError
from pqk.record.log import read_records, record_filename, write_record
from pqk.record.schema import columns
from pqk.track.track import Tracked, open_tracker, track, tracked

RECORDS = Path(__file__).resolve().parents[2] / "deliverables" / "results-3" / "records"
SHOW = "trackio show --project"
NAME = "D1-candidate-openvino-nncf-int8-11b79a28.json"


def record() -> dict[str, Any]:
    found = read_records(RECORDS / NAME)[0].record
    return {**found, "intervals": {"quality_drop_pct": [-1.0, 2.0]}, "run_id": "run-1"}


@pytest.fixture
def logged(tmp_path: Path) -> dict[str, Any]:
    found = record()
    write_record(tmp_path / "logs" / record_filename(found), found)
    return found


class Memory:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.runs: list[Tracked] = []

    def check(self) -> None:
        pass

    def log(self, run: Tracked) -> str:
        self.runs.append(run)
        return "memory"


class Broken(Memory):
    def log(self, run: Tracked) -> str:
        raise ConnectionError("no route to host\nmore")


def test_a_record_becomes_params_metrics_with_intervals_and_files(logged: dict[str, Any], tmp_path: Path) -> None:
    found = tracked(logged, [tmp_path])
    assert found.metrics["absrel"] == logged["absrel"]
    assert (found.metrics["quality_drop_pct_low"], found.metrics["quality_drop_pct_high"]) == (-1.0, 2.0)
    assert found.metrics["executed_int8"] == logged["executed_precision"]["int8"]
    assert found.params["exp_id"] == "D1" and found.params["quantizer"] == "nncf" and found.params["verdict"] == "fail"
    assert found.params["hash_model"] == logged["hashes"]["model"]
    nothing = {column.name for column in columns() if logged[column.name] is None}
    assert not nothing & (found.metrics.keys() | found.params.keys()) and "power_avg_W" in nothing
    assert (found.group, found.name) == ("run-1", record_filename(logged).removesuffix(".json"))


def test_a_tracker_that_fails_loses_nothing(logged: dict[str, Any], tmp_path: Path) -> None:
    memory, said = Memory(), list[str]()
    before = {path: path.read_bytes() for path in (tmp_path / "logs").iterdir()}
    report = tmp_path / "parts.csv"
    report.write_text("x")
    gone = tmp_path / "gone.csv"
    track({"mlflow": Broken(), "memory": memory}, [logged], tmp_path, said.append, [report, gone])
    assert said == [
        "warning: mlflow did not take all records (ConnectionError: no route to host); those in logs/ are complete",
        "1 records in memory: memory",
    ]
    assert [path.name for path in memory.runs[0].files] == [record_filename(logged), "parts.csv"]
    assert {path: path.read_bytes() for path in (tmp_path / "logs").iterdir()} == before


def test_a_run_of_the_command_keeps_its_records_when_a_tracker_fails(
    logged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`pqk run --track`: opened before anything runs, fed after the records are written; the exit code is the run's."""
    from types import SimpleNamespace

    from pqk.cli import run_output
    from pqk.recipe.request import Request

    order: list[str] = []

    def opened(name: str, root: Path) -> Memory:
        order.append(f"open {name}")
        return Broken()

    def ran(*_: Any) -> Any:
        order.append("run")
        return SimpleNamespace(records=[logged], parts=[])

    monkeypatch.setattr(run_output, "open_tracker", opened)
    monkeypatch.setattr(run_output, "run", ran)
    monkeypatch.setattr(run_output.paths, "project_root", lambda: tmp_path)
    monkeypatch.setattr(run_output, "load_card", lambda *_: SimpleNamespace(id="D1", matrix={}))
    code = run_output.run_card(Request("D1", "openvino"), as_json=True, track=["mlflow"])
    said = capsys.readouterr()
    assert order == ["open mlflow", "run"] and code == 1
    assert json.loads(said.out)["exp_id"] == "D1"
    assert "mlflow did not take all records" in " ".join(said.err.split())


def test_unknown_trackers_and_missing_libraries_are_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    with pytest.raises(
        PqkError, match=r"--track mlflo: a tracker is one of mlflow, trackio \(did you mean 'mlflow'\?\)"
    ):
        open_tracker("mlflo", tmp_path)
    for name in ("mlflow", "trackio"):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, name, None)
            with pytest.raises(NotBuilt, match=rf"--track {name} needs .*{name}.*pip install 'pqk\[{name}\]'"):
                open_tracker(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_mlflow_takes_a_record_into_sqlite(logged: dict[str, Any], tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny (extra mlflow)")
    pytest.importorskip("alembic", reason="needs alembic and sqlalchemy (extra mlflow)")
    said: list[str] = []
    tracker = open_tracker("mlflow", tmp_path)
    assert not (tmp_path / "outputs").exists()  # nothing is written before there is a result
    track({"mlflow": tracker}, [logged, logged], tmp_path, said.append)
    assert said[0].startswith("2 records in mlflow: sqlite:///") and len(said) == 1
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'outputs' / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("pqk")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    data = runs[0].data
    want = tracked(logged, [])
    assert data.metrics == pytest.approx(dict(want.metrics)) and data.metrics["quality_drop_pct_high"] == 2.0
    assert data.params == want.params and data.tags["pqk.run"] == "run-1"
    assert runs[0].info.status == "FINISHED" and runs[0].info.run_name == want.name
    assert [item.path for item in client.list_artifacts(runs[0].info.run_id)] == [record_filename(logged)]
    kept = list((tmp_path / "outputs" / "mlflow" / "artifacts").rglob("*.json"))
    assert json.loads(kept[0].read_text())["absrel"] == logged["absrel"]


def test_mlflow_that_cannot_write_is_a_warning(logged: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs mlflow-skinny (extra mlflow)")
    pytest.importorskip("alembic", reason="needs alembic and sqlalchemy (extra mlflow)")
    with pytest.raises(PqkError, match="write the place as a URI"):
        open_tracker("mlflow:runs.db", tmp_path)
    said: list[str] = []
    (tmp_path / "text.db").write_text("this is no database, and it stays as it is")
    track({"mlflow": open_tracker(f"mlflow:sqlite:///{tmp_path}/text.db", tmp_path)}, [logged], tmp_path, said.append)
    assert len(said) == 1 and said[0].startswith("warning: mlflow did not take all records (")
    assert (tmp_path / "text.db").read_text().startswith("this is no database")


def test_trackio_takes_a_record_into_its_store(
    logged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("needs trackio, which `make install` leaves out: it asks for pillow < 13")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    from trackio.sqlite_storage import SQLiteStorage

    with pytest.raises(PqkError, match="a project's name is letters"):
        open_tracker("trackio:a/b", tmp_path)
    said: list[str] = []
    project = f"pqk-test-{tmp_path.name}"[:64]
    tracker = open_tracker(f"trackio:{project}", tmp_path)
    capsys.readouterr()
    track({"trackio": tracker}, [logged], tmp_path, said.append)
    assert capsys.readouterr().out == ""  # stdout belongs to --json
    assert said == [f"1 records in trackio: {tmp_path}/trackio, project {project}; see it with {SHOW} {project}"]
    want = tracked(logged, [])
    (row,) = SQLiteStorage.get_logs(project, want.name)
    assert {name: row[name] for name in want.metrics} == pytest.approx(dict(want.metrics))
    config = SQLiteStorage.get_run_config(project, want.name)
    assert {name: config[name] for name in want.params} == dict(want.params)
