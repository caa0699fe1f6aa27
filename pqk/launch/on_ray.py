"""Runs cells as tasks of a Ray cluster: an existing one, or one that is started on this machine for as long as needed.

Ray queues nothing here: as many cells begin as the machines have room for, so that what the plan calls running does
run. Where a worker process or a machine dies, Ray begins the cell again, and where only its command is killed, this
module does; its finished stages are in the store.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pqk.errors import PqkError, first_line
from pqk.launch.cell import Cell, Done, carry_out, lost, why_not
from pqk.launch.needs import Needs, missing

_LOOK_S = 5.0  # between two looks at the machines while cells run


class OnRay:
    """A connection to a Ray cluster. address: such as 10.0.0.1:6379, or auto for that of this machine; '': own one."""

    def __init__(self, address: str, needs: Needs, say: Callable[[str], None]) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray would report its use to its makers
        if not address:  # its own cluster is found at 127.0.0.1 alone, as Ray's own are outside Linux
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        try:
            import ray
        except ImportError:
            raise missing("Ray", "ray") from None
        self._ray: Any = ray
        self._address, self._needs, self._say = address, needs, say
        self._running: dict[Any, tuple[Cell, float, int]] = {}  # cell, begin, and how often its command was killed
        self._other: set[str] = set()  # ids of machines of another kind than the plan's

    def __enter__(self) -> OnRay:
        known: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not self._address:
            known |= {"include_dashboard": False}
        try:
            self._ray.init(address=self._address or "local", **known)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise PqkError(f"--on ray:{self._address}: no cluster answers ({first_line(error)})") from None
        nodes = self._nodes()
        self._task = self._ray.remote(_on_node)
        self._say(f"Ray: {len(nodes)} machines, {self.places()} cells at once")
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()  # which ends the tasks of this driver

    def _nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ray.nodes()
        return [node for node in found if node["Alive"] and node["Resources"].get("CPU")]

    def _cores(self, nodes: list[dict[str, Any]]) -> int:
        """Returns the cores of a cell: those asked for, else those of the smallest machine."""
        return self._needs.cores or int(min(node["Resources"]["CPU"] for node in nodes))

    def places(self) -> int:
        nodes = [node for node in self._nodes() if node["NodeID"] not in self._other]
        if not nodes:
            if self._running:
                return 0
            if self._other:
                return 1  # it is refused, with the reason
            raise PqkError(f"--on ray{':' * bool(self._address)}{self._address}: no machine of the cluster is left")
        wants = {"CPU": self._cores(nodes), "GPU": self._needs.gpus, "memory": (self._needs.memory_gb or 0) * 2**30}
        most = sum(
            int(min(node["Resources"].get(name, 0) // much for name, much in wants.items() if much)) for node in nodes
        )
        if most == 0 and not self._running:
            asked = ", ".join(f"{much:g} {name}" for name, much in wants.items() if much)
            raise PqkError(f"no machine of the Ray cluster has what each cell needs: {asked}; see --each")
        return most - len(self._running)

    def begin(self, cell: Cell) -> None:
        self._begin(cell, time.time(), killed=0)

    def _begin(self, cell: Cell, began: float, killed: int) -> None:
        nodes = [node for node in self._nodes() if node["NodeID"] not in self._other] or self._nodes()
        cores = self._cores(nodes)
        options: dict[str, Any] = {"num_cpus": cores, "max_retries": self._needs.retries - killed, "name": cell.name}
        if self._needs.gpus:
            options["num_gpus"] = self._needs.gpus
        if self._needs.memory_gb:
            options["memory"] = int(self._needs.memory_gb * 2**30)
        if self._other and len(self._other) < len(self._nodes()):
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self._other))})"}
        reference = self._task.options(**options).remote(replace(cell, cores=cores, gpus=self._needs.gpus))
        self._running[reference] = (cell, began, killed)

    def wait(self) -> list[Done]:
        ended: list[Done] = []
        while self._running and not ended:
            ready, _ = self._ray.wait(list(self._running), timeout=_LOOK_S)
            for reference in ready:
                done = self._end(reference, *self._running.pop(reference))
                if done is not None:
                    ended.append(done)
        return ended

    def _end(self, reference: Any, cell: Cell, began: float, killed: int) -> Done | None:
        """Returns the end of a cell; None where it begins again: after a kill, or on a machine of the right kind."""
        try:
            node, done = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return lost(cell, f"its process or its machine was lost: {first_line(error)}", began)
        if done.refused:
            self._other.add(node)
            if {found["NodeID"] for found in self._nodes()} - self._other:
                self._say(f"{done.node} is left out: {done.outcome['said']}")
                self._begin(cell, began, killed)
                return None
        if done.killed:
            if killed == self._needs.retries:
                return lost(cell, why_not(done), began)
            self._begin(cell, began, killed + 1)
            return None
        found: Done = done
        return found


def _on_node(cell: Cell) -> tuple[str, Done]:
    """Runs in a worker process of Ray: returns the id of its machine, and the end of the cell."""
    import ray

    return str(ray.get_runtime_context().get_node_id()), carry_out(cell)
