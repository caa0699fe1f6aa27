"""Power and throttling while something runs: what tegrastats, nvidia-smi, RAPL and the kernel's counters tell.

Used by edge_eval.py, which lies beside it; the standard library is enough. What a device does not tell is None. A power
tool that fails in any way (does not start, ends early, hangs, has to be killed) costs the power, never the measurement.
Formats read here:

- tegrastats: "NVIDIA Jetson Linux Developer Guide", tegrastats utility, table of reported statistics;
- nvidia-smi: its --help-query-gpu, and for the bits nvmlClocksEventReasons (once nvmlClocksThrottleReasons) of the
  "NVML API Reference Guide";
- RAPL: "Power Capping Framework" of the Linux kernel documentation (energy_uj, max_energy_range_uj);
- throttling counters: oc*_event_cnt of the Jetson guide's chapter on platform power and performance, and
  thermal_throttle/*_throttle_count of the Linux kernel on x86.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")  # the whole module; where there is none, the other rails are summed
PART_OF_ANOTHER = ("VDDQ_VDD2_1V8AO", "NC")  # fed from VIN_SYS_5V0; and inputs that are not connected
LOWERED_CLOCKS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80  # power cap, hardware, software thermal, hardware thermal, power brake
NVIDIA_SMI_INTERVAL_MS, TEGRASTATS_INTERVAL_MS, RAPL_INTERVAL_S = 100, 100, 0.1
ANSWER_S, END_S = 20.0, 3.0  # how long a tool may take to answer a query, and to end when it is asked to


# Parsers. All take text that may be cut anywhere, and give None for what is not there.


def parse_tegrastats(line: str) -> dict:
    """One line -> rails {name: W, as it is now}, gpu_load (percent or None), gpu_mhz (or None).

    A rail is "VDD_IN 4943mW/4120mW", now and on average; since L4T R39 a third number follows (the peak), and numbers
    have had no unit before.
    """
    rails = {
        name: int(now) / 1000
        for name, now in re.findall(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d{1,9})(?:mW)?(?:/\d*(?:mW?)?){1,2}(?=\s|$)", line)
        if name not in ("RAM", "SWAP", "IRAM")
    }
    load = re.search(r"(?<!\S)GR3D_FREQ (\d+)%(?:@\[?(\d+)(?=[\],\s]))?", line)
    mhz = int(load[2]) if load and load[2] else None
    return {"rails": rails, "gpu_load": int(load[1]) if load else None, "gpu_mhz": mhz}


def tegrastats_watts(parsed: list[dict]) -> tuple[list[float], str]:
    """Watts of each whole line, and the rails they are of. A total rail wins; else all rails of the fullest line."""
    seen = {name for line in parsed for name in line["rails"]}
    total = next((name for name in TOTAL_RAILS if name in seen), None)
    if total:
        return [line["rails"][total] for line in parsed if total in line["rails"]], total
    fullest = max((line["rails"] for line in parsed), key=len, default={})
    wanted = [name for name in fullest if name not in PART_OF_ANOTHER]
    whole = [line["rails"] for line in parsed if all(name in line["rails"] for name in wanted)]
    return ([sum(rails[name] for name in wanted) for rails in whole], "+".join(wanted)) if wanted else ([], "")


def tegrastats_throttled(parsed: list[dict]) -> bool | None:
    """Whether the GPU's clock fell below 95 % of its highest while it was busy (90 %); None without clocks.

    Only what comes after the highest clock counts: before it, the governor may still be raising the clock.
    """
    clocks = [p["gpu_mhz"] for p in parsed if p["gpu_mhz"] and (p["gpu_load"] or 0) >= 90]
    if len(clocks) < 2:
        return None
    after = clocks[clocks.index(max(clocks)) :]
    return min(after) < 0.95 * max(clocks)


def parse_nvidia_smi(line: str) -> tuple[float | None, int | None]:
    """'45.31, 0x0000000000000004' -> (watts, bits of reasons); [N/A] and a number that is cut are None."""
    watts, comma, reasons = line.partition(",")
    power = float(watts) if comma and re.fullmatch(r"\s*\d+(\.\d+)?\s*", watts) else None
    bits = re.fullmatch(r"\s*0x([0-9a-fA-F]{16})\s*", reasons)
    return power, int(bits[1], 16) if bits else None


def rapl_joules(before_uj: int, after_uj: int, range_uj: int) -> float:
    """Energy between two readings of a counter that starts at 0 again after `range_uj`."""
    return (after_uj - before_uj + (range_uj if after_uj < before_uj else 0)) / 1e6


def read_rapl(root: Path = Path("/sys/class/powercap")) -> dict[str, tuple[int, int]]:
    """Package zones -> (energy_uj, max_energy_range_uj); zones inside a package are parts of it and left out.

    Empty where the kernel has none, or lets only root read them.
    """
    found = {}
    for zone in sorted(root.glob("intel-rapl:*")):
        with contextlib.suppress(OSError, ValueError):
            if re.fullmatch(r"intel-rapl:\d+", zone.name) and (zone / "name").read_text().startswith("package"):
                ends = [int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")]
                found[zone.name] = (ends[0], ends[1])
    return found


def throttle_count(sys_root: Path = Path("/sys")) -> int | None:
    """Sum of the kernel's counters of over-current (Jetson) and thermal (x86) throttling; None without any."""
    patterns = (
        "class/hwmon/hwmon*/oc*_event_cnt",
        "devices/system/cpu/cpu*/thermal_throttle/*_throttle_count",
    )
    counts = []
    for path in (path for pattern in patterns for path in sys_root.glob(pattern)):
        with contextlib.suppress(OSError, ValueError):
            counts.append(int(path.read_text()))
    return sum(counts) if counts else None


class PowerMeter:
    """Reads power beside the timed loop: tegrastats on a Jetson, nvidia-smi for a GPU, RAPL for a CPU; else nothing.

    Nothing here raises: what goes wrong is in `fault`, in words, and leaves power and throttling unknown.
    """

    def __init__(self, on_gpu: bool, gpu: str = "0") -> None:
        self.lines: list[str] = []
        self.energy: list[tuple[float, dict[str, tuple[int, int]]]] = []
        self.command: list[str] = []
        self.fault = ""
        self.count_before: int | None = None
        self.count_after: int | None = None
        self._process: subprocess.Popen | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        if shutil.which("tegrastats"):
            self.command = ["tegrastats", "--interval", str(TEGRASTATS_INTERVAL_MS)]
        elif on_gpu and shutil.which("nvidia-smi"):
            self.command = self._nvidia_smi(gpu)
        self.rapl = not self.command and not on_gpu and bool(read_rapl())

    def _nvidia_smi(self, gpu: str) -> list[str]:
        """The command that prints power and throttling again and again; [] when it does not answer once."""
        for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # new and old name
            query = ["nvidia-smi", "-i", gpu, f"--query-gpu=power.draw,{reasons}", "--format=csv,noheader,nounits"]
            try:
                process = started(query, subprocess.DEVNULL)
                code = process.wait(timeout=ANSWER_S)
            except OSError as error:
                self.fault = f"nvidia-smi does not start: {error.strerror or error}"
                return []
            except subprocess.TimeoutExpired:
                kill(process)
                self.fault = f"nvidia-smi did not answer in {ANSWER_S:g} s"
                return []
            if code == 0:
                return [*query, "-lms", str(NVIDIA_SMI_INTERVAL_MS)]
        self.fault = f"nvidia-smi ends with exit code {code}"
        return []

    def __enter__(self) -> PowerMeter:
        self.count_before = throttle_count()
        if self.command:
            try:
                self._process = started(self.command, subprocess.PIPE)
            except OSError as error:
                self.fault = f"{self.command[0]} does not start: {error.strerror or error}"
        if self._process or self.rapl:
            work = self._read_lines if self._process else self._read_energy
            self._thread = threading.Thread(target=work, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self._process:
            name = self.command[0]
            if self._process.poll() is not None:
                self.fault = f"{name} ended early with exit code {self._process.returncode}"
            else:
                self._process.terminate()
                try:
                    self._process.wait(timeout=END_S)
                except subprocess.TimeoutExpired:
                    self.fault = f"{name} did not end when it was asked to and was killed"
            kill(self._process)  # also what it may have started
        if self._thread:
            self._thread.join(timeout=2)
        self.count_after = throttle_count()

    def _read_lines(self) -> None:
        for line in self._process.stdout:
            self.lines.append(line)

    def _read_energy(self) -> None:
        last = False
        while True:
            self.energy.append((time.monotonic(), read_rapl()))
            if last:
                return
            last = self._ended.wait(RAPL_INTERVAL_S)

    def result(self) -> dict:
        """power_avg_W, power_peak_W, throttle (each None when unknown), and `source` in words."""
        unknown = {"power_avg_W": None, "power_peak_W": None, "throttle": None}
        try:
            found = unknown if self.fault else self._read()
            if self.count_before is not None and self.count_after is not None:
                found = {**found, "throttle": bool(found["throttle"]) or self.count_after > self.count_before}
        except Exception as error:  # whatever a tool printed
            self.fault, found = f"{' '.join(self.command[:1])} printed what cannot be read: {error!r}", unknown
        if found["power_avg_W"] is None:
            return {**found, "source": f"none ({self.fault})" if self.fault else "none"}
        return found

    def _read(self) -> dict:
        """What the tool's lines or the counters tell; sets `fault` when a tool gave no power."""
        watts: list[float] = []
        throttle: bool | None = None
        source, average = "none", None
        lines = list(self.lines)
        if self.command and self.command[0] == "tegrastats":
            parsed = [parse_tegrastats(line) for line in lines]
            watts, rails = tegrastats_watts(parsed)
            throttle, source = tegrastats_throttled(parsed), f"tegrastats {rails}"
        elif self.command:
            values = [parse_nvidia_smi(line) for line in lines]
            watts = [power for power, _ in values if power is not None]
            reasons = [bits for _, bits in values if bits is not None]
            throttle = any(bits & LOWERED_CLOCKS for bits in reasons) if reasons else None
            source = "nvidia-smi power.draw"
        elif self.rapl:
            watts, average = rapl_watts(self.energy)
            source = "RAPL packages"
        if self.command and not watts:
            self.fault = f"no power in {len(lines)} lines of {self.command[0]}"
        if average is None and watts:
            average = sum(watts) / len(watts)
        peak = max(watts) if watts else None
        if any(value is not None and not math.isfinite(value) for value in (average, peak)):
            raise ValueError(f"a power of {peak} W")
        return {
            "power_avg_W": average,
            "power_peak_W": peak,
            "throttle": throttle,
            "source": f"{source}, {len(watts)} samples",
        }


def started(command: list[str], out: int) -> subprocess.Popen:
    """A program without input, in a group of its own so that `kill` reaches its children. Raises OSError."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command, stdin=quiet, stdout=out, stderr=quiet, text=True, errors="replace", start_new_session=True
    )


def kill(process: subprocess.Popen) -> None:
    """Ends a program and its children for good; one that even the kernel cannot end is left behind."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=END_S)


def rapl_watts(readings: list[tuple[float, dict[str, tuple[int, int]]]]) -> tuple[list[float], float | None]:
    """Watts of each interval of (seconds, packages) readings, all packages together, and the mean over all of them."""
    watts, joules, seconds = [], 0.0, 0.0
    for (t0, before), (t1, after) in itertools.pairwise(readings):
        if t1 > t0 and before and set(before) == set(after):
            energy = sum(rapl_joules(before[name][0], after[name][0], after[name][1]) for name in after)
            joules, seconds = joules + energy, seconds + t1 - t0
            if t1 - t0 >= RAPL_INTERVAL_S / 2:  # a counter is renewed about every ms: short intervals are noise
                watts.append(energy / (t1 - t0))
    return watts, joules / seconds if seconds else None
