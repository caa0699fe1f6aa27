"""How many cores a process may use: the affinity mask, and the quota of its control groups on trees made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from pqk import cores
from pqk.cores import affinity_cores, allowed_cores, cpu_quota


def tree(root: Path, process: str, **files: str) -> tuple[Path, Path]:
    """A cgroup mount and a /proc/self/cgroup."""
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (root / "cgroup").mkdir(exist_ok=True)
    (root / "process").write_text(process)
    return root / "cgroup", root / "process"


V1 = "9:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/\n"


@pytest.mark.parametrize(
    ("process", "files", "quota"),
    [
        pytest.param("0::/\n", {"cpu.max": "150000 100000"}, 1.5, id="v2, in its own namespace"),
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, None, id="v2, none"),
        pytest.param(
            "0::/a/b\n",
            {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000", "cpu.max": "max 100000"},
            2.0,
            id="v2, of a group above",
        ),
        pytest.param(
            "0::/a/b\n", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "400000 100000"}, 0.5, id="v2, the smallest"
        ),
        pytest.param(
            V1,
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            2.5,
            id="v1, the host's path, its group mounted as the root",
        ),
        pytest.param(
            V1,
            {"cpu/docker/ab/cpu.cfs_quota_us": "30000", "cpu/docker/ab/cpu.cfs_period_us": "20000"},
            1.5,
            id="v1, under another name",
        ),
        pytest.param(
            V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, None, id="v1, none"
        ),
        pytest.param(
            "2:cpu:/x\n0::/y\n",
            {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000"},
            1.0,
            id="both versions",
        ),
        pytest.param("3:cpuset:/x\n", {"cpuset/x/cpu.cfs_quota_us": "1"}, None, id="another controller"),
        pytest.param("0::/\n", {"cpu.max": "nonsense"}, None, id="unreadable"),
        pytest.param("0::/\n", {}, None, id="no files"),
        pytest.param("", {"cpu.max": "100000 100000"}, 1.0, id="no /proc/self/cgroup"),
    ],
)  # fmt: skip
def test_quota(process: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cpu_quota(*tree(tmp_path, process, **files)) == quota


@pytest.mark.parametrize(("quota", "allowed"), [(None, 8), (1.5, 2), (0.2, 1), (64.0, 8)])
def test_allowed_cores(quota: float | None, allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "affinity_cores", lambda: 8)
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert allowed_cores() == allowed


def test_without_a_quota_all_of_the_mask() -> None:
    assert affinity_cores() >= allowed_cores() >= 1
