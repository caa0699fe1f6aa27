"""What tegrastats, nvidia-smi, RAPL and the kernel's counters write, whole and cut."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import edge_power
from edge_power import (
    PowerMeter,
    parse_nvidia_smi,
    parse_tegrastats,
    rapl_joules,
    rapl_watts,
    read_rapl,
    tegrastats_throttled,
    tegrastats_watts,
    throttle_count,
)

ORIN_NX = (
    "11-21-2026 10:00:00 RAM 4722/7844MB (lfb 1x4MB) SWAP 149/3922MB (cached 6MB) CPU [14%@1190,0%@1190,off,off] "
    "EMC_FREQ 1%@1866 GR3D_FREQ 96%@918 NVENC off VIC_FREQ 115 APE 150 CPU@41.5C PMIC@50C GPU@40C thermal@41.2C "
    "VDD_IN 4943mW/4120mW VDD_CPU_GPU_CV 1000mW/900mW VDD_SOC 1438mW/1430mW"
)
NANO = (
    "RAM 1903/3964MB (lfb 21x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [20%@1479,19%@1479,9%,off] "
    "EMC_FREQ 9%@1600 GR3D_FREQ 99%@921 APE 25 PLL@31C POM_5V_IN 2532/2698 POM_5V_GPU 40/42 POM_5V_CPU 649/650"
)
AGX_ORIN = (
    "RAM 3005/30698MB (lfb 6x4MB) SWAP 0/15349MB (cached 0MB) CPU [0%@729,1%@729] EMC_FREQ 0%@665 "
    "GR3D_FREQ 14%@[407,407] tj@77.281C VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW "
    "NC 0mW/0mW VDDQ_VDD2_1V8AO 1091mW/1091mW NC 0mW/0mW"
)
XAVIER = "RAM 2/15823MB GR3D_FREQ 0%@318 GPU 100/90 CPU 311/311 SOC 1555/1550 CV 0/0 VDDRQ 155/155 SYS5V 1482/1480"
R39 = (  # L4T R39: now/average/peak
    "09-20-2026 12:19:33 RAM 999/62841MB (lfb 10x4MB) CPU [0%@729,off] EMC_FREQ 3%@3199 GR3D_FREQ 97%@[1300,1300] "
    "cpu@43.0C/43.1C tj@42.9C/43.0C VDD_GPU_SOC 22792mW/21000mW/23000mW VDD_CPU_CV 5000mW/4800mW/5100mW "
    "VIN_SYS_5V0 3918mW/3952mW/4019mW"
)
R39_THOR = (
    "RAM 8353/125749MB (lfb 31x4MB) CPU [90%@2601,off] GR3D_FREQ @[1574,1574,1574] VDD_GPU 37939mW/8660mW/37940mW "
    "VDD_CPU_SOC_MSS 30059mW/12281mW/30060mW VIN_SYS_5V0 15486mW/7424mW/15487mW VIN 124486mW/36487mW/124487mW"
)
LINES = [ORIN_NX, NANO, AGX_ORIN, XAVIER, R39, R39_THOR]


@pytest.mark.parametrize(
    ("line", "rails", "load", "mhz"),
    [
        (ORIN_NX, {"VDD_IN": 4.943, "VDD_CPU_GPU_CV": 1.0, "VDD_SOC": 1.438}, 96, 918),
        (NANO, {"POM_5V_IN": 2.532, "POM_5V_GPU": 0.04, "POM_5V_CPU": 0.649}, 99, 921),
        (XAVIER, {"GPU": 0.1, "CPU": 0.311, "SOC": 1.555, "CV": 0.0, "VDDRQ": 0.155, "SYS5V": 1.482}, 0, 318),
        (R39, {"VDD_GPU_SOC": 22.792, "VDD_CPU_CV": 5.0, "VIN_SYS_5V0": 3.918}, 97, 1300),
        (
            R39_THOR,
            {"VDD_GPU": 37.939, "VDD_CPU_SOC_MSS": 30.059, "VIN_SYS_5V0": 15.486, "VIN": 124.486},
            None,
            None,
        ),
        ("", {}, None, None),
        ("RAM 2/3MB GR3D_FREQ 5% VDD_IN NAmW/NAmW", {}, 5, None),
    ],
)
def test_tegrastats(line: str, rails: dict[str, float], load: int | None, mhz: int | None) -> None:
    assert parse_tegrastats(line + "\n") == {"rails": rails, "gpu_load": load, "gpu_mhz": mhz}


def test_tegrastats_total_or_sum() -> None:
    assert tegrastats_watts([parse_tegrastats(ORIN_NX)]) == ([4.943], "VDD_IN")
    assert tegrastats_watts([parse_tegrastats(NANO)]) == ([2.532], "POM_5V_IN")
    watts, rails = tegrastats_watts([parse_tegrastats(AGX_ORIN)])
    assert rails == "VDD_GPU_SOC+VDD_CPU_CV+VIN_SYS_5V0"
    assert watts == [pytest.approx(3.150 + 14.312 + 4.968)]
    watts, rails = tegrastats_watts([parse_tegrastats(R39)])
    assert (watts, rails) == ([pytest.approx(22.792 + 5.0 + 3.918)], "VDD_GPU_SOC+VDD_CPU_CV+VIN_SYS_5V0")
    assert tegrastats_watts([parse_tegrastats(R39_THOR)]) == ([124.486], "VIN")
    assert tegrastats_watts([]) == tegrastats_watts([parse_tegrastats("RAM 1/2MB")]) == ([], "")


@pytest.mark.parametrize("line", LINES)
def test_a_cut_tegrastats_line_never_gives_another_value(line: str) -> None:
    """Wherever the line is cut, a rail has the value of the whole line or is absent, and so has what is made of it."""
    whole = parse_tegrastats(line)
    watts, rails = tegrastats_watts([whole])
    for cut in range(len(line)):
        for part in (line[:cut], line[cut:]):
            found = parse_tegrastats(part)
            for name in set(found["rails"]) & set(whole["rails"]):
                assert found["rails"][name] == whole["rails"][name], part
            assert found["gpu_load"] in (None, whole["gpu_load"])
            assert found["gpu_mhz"] in (None, whole["gpu_mhz"])
            assert tegrastats_watts([whole, found])[1] == rails
            assert set(tegrastats_watts([whole, found])[0]) == set(watts), part
        assert set(parse_tegrastats(line[:cut])["rails"]) <= set(whole["rails"])


@pytest.mark.parametrize(
    ("clocks", "expected"),
    [
        ([(99, 306), (99, 918), (99, 918)], False),  # the governor raises the clock at the start
        ([(99, 918), (99, 918), (99, 714)], True),
        ([(99, 918), (3, 306), (99, 918)], False),  # idle, not throttled
        ([(99, 918)], None),
        ([(99, None), (99, None)], None),
        ([], None),
    ],
)
def test_tegrastats_throttling(clocks: list[tuple[int, int | None]], expected: bool | None) -> None:
    lines = [f"GR3D_FREQ {load}%" + (f"@{mhz}" if mhz else "") + " VIC off" for load, mhz in clocks]
    assert tegrastats_throttled([parse_tegrastats(line) for line in lines]) is expected


def test_nvidia_smi() -> None:
    assert parse_nvidia_smi("45.31, 0x0000000000000004\n") == (45.31, 4)
    assert parse_nvidia_smi("45, 0x0000000000000000") == (45.0, 0)
    assert parse_nvidia_smi("[N/A], 0x0000000000000001") == (None, 1)
    assert parse_nvidia_smi("61.20, [Not Supported]") == (61.20, None)
    assert parse_nvidia_smi("Unable to determine the device handle, reboot") == (None, None)
    line = "245.31, 0x00000000000000e4"
    for cut in range(len(line)):
        watts, reasons = parse_nvidia_smi(line[:cut])
        assert watts in (None, 245.31)
        assert reasons is None


def test_rapl_counter_starts_anew() -> None:
    limit = 262_143_328_850
    for before in (0, 1, limit // 2, limit - 5):
        for used in (0, 1, 7_000_000, limit // 3):
            after = before + used if before + used < limit else before + used - limit
            assert rapl_joules(before, after, limit) == pytest.approx(used / 1e6)


def test_rapl_watts() -> None:
    readings = [(0.0, {"a": (900, 1000)}), (1.0, {"a": (100, 1000)}), (3.0, {"a": (700, 1000)})]
    watts, mean = rapl_watts(readings)
    assert watts == pytest.approx([200e-6, 300e-6])
    assert mean == pytest.approx(800e-6 / 3)
    short = [*readings, (3.001, {"a": (999, 1000)})]  # too short for a peak, but energy all the same
    assert max(rapl_watts(short)[0]) == pytest.approx(300e-6)
    assert rapl_watts(short)[1] == pytest.approx(1099e-6 / 3.001)
    assert rapl_watts([]) == rapl_watts([(0.0, {}), (1.0, {})]) == ([], None)


def test_rapl_reads_packages_only(tmp_path: Path) -> None:
    zones = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:1": "package-1", "intel-rapl:2": "psys"}
    for number, (zone, name) in enumerate(zones.items()):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "energy_uj").write_text(f"{number + 10}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("1000\n")
    assert read_rapl(tmp_path) == {"intel-rapl:0": (10, 1000), "intel-rapl:1": (12, 1000)}
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("")  # cut
    assert set(read_rapl(tmp_path)) == {"intel-rapl:0"}
    assert read_rapl(tmp_path / "nowhere") == {}


def test_throttle_counters(tmp_path: Path) -> None:
    assert throttle_count(tmp_path) is None
    over_current = tmp_path / "class" / "hwmon" / "hwmon3"
    thermal = tmp_path / "devices" / "system" / "cpu" / "cpu0" / "thermal_throttle"
    for folder in (over_current, thermal):
        folder.mkdir(parents=True)
    (over_current / "oc3_event_cnt").write_text("37\n")
    (thermal / "core_throttle_count").write_text("2\n")
    (thermal / "core_throttle_max_time_ms").write_text("900\n")
    assert throttle_count(tmp_path) == 39


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def only_programs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first in PATH; the kernel of this machine has nothing to say."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(edge_power, "throttle_count", lambda: None)
    monkeypatch.setattr(edge_power, "read_rapl", dict)
    return tmp_path


def wait_for_lines(meter: PowerMeter, count: int) -> None:
    until = time.monotonic() + 10
    while len(meter.lines) < count and time.monotonic() < until:
        time.sleep(0.01)


def test_a_meter_reads_tegrastats_while_it_runs(only_programs_here: Path) -> None:
    other = ORIN_NX.replace("4943mW", "6943mW").replace("96%@918", "97%@714")
    lines = "\n".join(f"echo '{line}'" for line in (ORIN_NX, other, ORIN_NX[:60]))
    body = f'{lines}\necho "$@" > {only_programs_here}/asked\nexec sleep 60'
    program(only_programs_here, "tegrastats", body)
    began = time.monotonic()
    with PowerMeter(on_gpu=True) as meter:
        wait_for_lines(meter, 3)
    assert time.monotonic() - began < 20  # it was ended, not waited for
    result = meter.result()
    assert result == {
        "power_avg_W": pytest.approx(5.943),
        "power_peak_W": pytest.approx(6.943),
        "throttle": True,
        "source": "tegrastats VDD_IN, 2 samples",
    }
    assert (only_programs_here / "asked").read_text() == "--interval 100\n"


@pytest.mark.parametrize(
    ("body", "note"),
    [
        (
            f"trap '' TERM\nwhile :; do echo '{ORIN_NX}'; sleep 0.02; done",
            "did not end when it was asked to and was killed",
        ),
        (f"echo '{ORIN_NX}'\nexit 3", "ended early with exit code 3"),
        ("exec sleep 60", "no power in 0 lines of tegrastats"),
        ("echo RAM 1/2MB; exec sleep 60", "no power in 1 lines of tegrastats"),
        (
            f"echo '{ORIN_NX}'; printf 'VDD_IN \\377\\376\\n'; printf 'GR3D_FREQ {'9' * 5000}%%\\n'; exec sleep 60",
            "printed what",
        ),
        ("sleep 60 & exec sleep 60", "no power in 0 lines"),
    ],
)
def test_a_power_tool_that_fails_costs_the_power_only(
    only_programs_here: Path, monkeypatch: pytest.MonkeyPatch, body: str, note: str
) -> None:
    monkeypatch.setattr(edge_power, "END_S", 0.5)
    program(only_programs_here, "tegrastats", body)
    began = time.monotonic()
    with PowerMeter(on_gpu=False) as meter:
        time.sleep(0.3)
    result = meter.result()
    assert time.monotonic() - began < 5
    assert (result["power_avg_W"], result["power_peak_W"], result["throttle"]) == (None, None, None)
    assert result["source"].startswith("none (") and note in result["source"]
    assert meter._process.poll() is not None
    assert not meter._thread.is_alive()  # no child of it holds the pipe open


@pytest.mark.parametrize("content", [b"garbage", b"\x7fELF\2\1\1" + bytes(60), b"#!/no/such/interpreter\n"])
@pytest.mark.parametrize("name", ["tegrastats", "nvidia-smi"])
def test_a_power_tool_of_another_architecture(only_programs_here: Path, name: str, content: bytes) -> None:
    path = only_programs_here / name
    path.write_bytes(content)
    path.chmod(0o755)
    with PowerMeter(on_gpu=True) as meter:
        pass
    result = meter.result()
    assert result["power_avg_W"] is None and result["source"].startswith(f"none ({name} does not start: ")


def test_an_nvidia_smi_that_hangs_or_fails(only_programs_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_power, "ANSWER_S", 0.3)
    program(only_programs_here, "nvidia-smi", "trap '' TERM\nsleep 1000")
    began = time.monotonic()
    with PowerMeter(on_gpu=True) as meter:
        pass
    assert time.monotonic() - began < 5
    assert meter.result()["source"] == "none (nvidia-smi did not answer in 0.3 s)"
    program(only_programs_here, "nvidia-smi", "exit 9")
    with PowerMeter(on_gpu=True) as meter:
        pass
    assert meter.result()["source"] == "none (nvidia-smi ends with exit code 9)"
    digits = "9" * 400  # more than a float holds
    program(
        only_programs_here,
        "nvidia-smi",
        f"echo '{digits}, 0x0000000000000000'\ncase \"$*\" in *-lms*) exec sleep 60;; esac",
    )
    with PowerMeter(on_gpu=True) as meter:
        wait_for_lines(meter, 1)
    assert meter.result()["power_peak_W"] is None
    assert "nvidia-smi printed what cannot be read" in meter.result()["source"]


@pytest.mark.parametrize("known", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_a_meter_reads_nvidia_smi_under_both_names(only_programs_here: Path, known: str) -> None:
    lines = ["45.0, 0x0000000000000001", "55.0, 0x0000000000000000", "[N/A], 0x0000000000000000"]
    echo = "\n".join(f"echo '{line}'" for line in lines)
    body = f'case "$*" in *{known}*) ;; *) exit 2;; esac\n{echo}\ncase "$*" in *-lms*) exec sleep 60;; esac'
    program(only_programs_here, "nvidia-smi", body)
    with PowerMeter(on_gpu=True, gpu="0000:01:00.0") as meter:
        wait_for_lines(meter, 3)
    assert known in " ".join(meter.command)
    assert meter.result() == {
        "power_avg_W": 50.0,
        "power_peak_W": 55.0,
        "throttle": False,
        "source": "nvidia-smi power.draw, 2 samples",
    }
    assert not PowerMeter(on_gpu=False).command  # a CPU's run is not charged with a GPU's power


def test_a_meter_integrates_rapl(only_programs_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_power, "read_rapl", lambda: {"package": (int(time.monotonic() * 8e6) % 10_000, 10_000)})
    assert PowerMeter(on_gpu=True).rapl is False
    monkeypatch.setattr(edge_power, "read_rapl", lambda: {"package": (int(time.monotonic() * 8e6), 10**18)})
    with PowerMeter(on_gpu=False) as meter:
        time.sleep(0.35)
    result = meter.result()
    assert result["power_avg_W"] == pytest.approx(8, rel=0.5)  # the clock and the counter are read one after the other
    assert result["power_peak_W"] >= result["power_avg_W"] * 0.9
    assert result["source"].startswith("RAPL packages, ")
    assert result["throttle"] is None


def test_a_meter_without_any_source(only_programs_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PowerMeter(on_gpu=False) as meter:
        pass
    assert meter.result() == {"power_avg_W": None, "power_peak_W": None, "throttle": None, "source": "none"}
    counts = iter([3, 5])
    monkeypatch.setattr(edge_power, "throttle_count", lambda: next(counts))
    with PowerMeter(on_gpu=False) as meter:
        pass
    assert meter.result()["throttle"] is True
