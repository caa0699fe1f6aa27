"""`pqk env`: what each toolchain can do on this machine, or why it cannot and what mends it."""

from __future__ import annotations

import json
import platform

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from backends import registry
from pqk import __version__
from pqk.cores import affinity_cores, cpu_quota


def show_environment(as_json: bool) -> None:
    """Print the machine and every backend; `as_json` prints one JSON object instead."""
    found = registry.availabilities()
    machine = {
        "pqk": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": affinity_cores(),
        "cpu_quota": cpu_quota(),
    }
    if as_json:
        backends = {
            name: {
                "available": a.available,
                "devices": list(a.devices),
                "versions": dict(a.versions),
                "details": dict(a.details),
                "reason": a.reason or None,
                "mend": a.remedy or None,
            }
            for name, a in found.items()
        }
        print(json.dumps({**machine, "backends": backends}))
        return
    console = Console(highlight=False)
    console.print("  ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    table = Table(show_lines=True)
    for title in ("backend", "state", "what is there, or what mends it"):
        table.add_column(title)
    for name, a in found.items():
        if a.available:
            versions = ", ".join(f"{k} {v}" for k, v in a.versions.items())
            lines = [versions, f"devices: {', '.join(a.devices)}", *(f"{k}: {v}" for k, v in a.details.items())]
            table.add_row(name, "[green]available[/]", escape("\n".join(line for line in lines if line)))
        else:
            table.add_row(name, "[red]unavailable[/]", escape(f"{a.reason}\n→ {a.remedy}"))
    console.print(table)
