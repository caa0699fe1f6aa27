"""Trainings that several processes share: the numbers are those of one process with the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch

HERE = Path(__file__).parent
METHODS = ["pruned", "distilled", "quantized", "detector", "few_steps", "consistent", "frames", "detr"]


def trained(folder: Path, processes: int, *names: str) -> list[str]:
    """What each of the processes said; they meet as torchrun lets them."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": str(processes)}
    ranks = []
    for rank in map(str, range(processes)):
        environment = {**os.environ, **alone, **meeting, "RANK": rank, "LOCAL_RANK": rank}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parents[1])))
        command = [preloaded.python(), str(HERE / "shared_toys.py"), str(folder), *names]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env=environment, **pipes))
    said = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * processes, said
    return [out for out, _ in said]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    pytest.importorskip("nncf")
    folder = tmp_path_factory.mktemp("shared")
    trained(folder / "one", 1, *METHODS)
    return folder / "one", folder / "two", trained(folder / "two", 2, "too_small", *METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one_with_the_whole_batch(both: tuple[Path, Path, list[str]], method: str) -> None:
    one, two, _ = both
    alone = torch.load(one / f"{method}-0.pt", weights_only=True)
    first, second = (torch.load(two / f"{method}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(alone["losses"]) == len(first["losses"]) >= 2
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert (
        first["scores"] == pytest.approx(alone["scores"], rel=1e-2 if method == "quantized" else 1e-4)
        and not second["scores"]
    )
    assert second["losses"] == [], "only the first process reports"
    for name, value in alone["last"].items():
        torch.testing.assert_close(
            first["last"][name], value, rtol=0, atol=1e-4, msg=lambda said, n=name: f"{n}: {said}"
        )
        assert torch.equal(first["last"][name], second["last"][name]), name


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(both: tuple[Path, Path, list[str]]) -> None:
    said = [json.loads(out.splitlines()[0])["refused"] for out in both[2]]
    assert said == ["train.stages: a batch of 1 pairs cannot be shared by the 2 processes of --processes"] * 2
