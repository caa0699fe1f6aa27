"""Runs cells as jobs of SLURM through `submitit`, or as processes of this machine through its local executor."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pqk.cores import allowed_cores
from pqk.errors import PqkError, first_line
from pqk.launch.cell import Cell, Done, carry_out, lost, why_not
from pqk.launch.needs import Needs, missing

_MOST_QUEUED = 1000  # jobs at once; SLURM's own limit for a user is often near it
_POLL_S = {True: 0.2, False: 5.0}  # between two looks, by whether the jobs run here


@dataclass
class _Job:
    cell: Cell
    job: Any
    began: float
    tried: int = 1


class OnSlurm:
    """Jobs in a partition ('': the default one). here: processes of this machine, as many as its cores allow.

    folder: shared by all machines; submitit keeps what it sends and gets, and the output of its jobs, in it.
    """

    def __init__(self, partition: str, needs: Needs, folder: Path, here: bool) -> None:
        try:
            import submitit
        except ImportError:
            raise missing("submitit", "slurm") from None
        self._submitit: Any = submitit
        self._partition, self._needs, self._folder, self._here = partition, needs, folder / "jobs", here
        self._jobs: list[_Job] = []

    def __enter__(self) -> OnSlurm:
        cluster = "local" if self._here else "slurm"
        try:
            self._executor = self._submitit.AutoExecutor(folder=self._folder, cluster=cluster)
        except RuntimeError as error:  # no srun here
            raise PqkError(f"--on slurm: {first_line(error)}") from None
        needs = self._needs
        known: dict[str, Any] = {"timeout_min": max(1, round(60 * needs.hours)), "name": "pqk"}
        known |= {"gpus_per_node": needs.gpus} if needs.gpus else {}
        known |= {"mem_gb": needs.memory_gb} if needs.memory_gb else {}
        if not self._here:
            known |= {"cpus_per_task": needs.cores} if needs.cores else {"slurm_exclusive": True}
            known |= {"slurm_partition": self._partition} if self._partition else {}
        self._executor.update_parameters(**known)
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._jobs:
            job.job.cancel(check=False)

    def places(self) -> int:
        most = max(1, allowed_cores() // (self._needs.cores or allowed_cores())) if self._here else _MOST_QUEUED
        return most - len(self._jobs)

    def begin(self, cell: Cell) -> None:
        cores = self._needs.cores if self._here else None  # SLURM binds its jobs itself
        sent = replace(cell, cores=cores, gpus=self._needs.gpus)
        self._jobs.append(_Job(sent, self._submit(sent), time.time()))

    def _submit(self, cell: Cell) -> Any:
        try:
            return self._executor.submit(carry_out, cell)
        except self._submitit.core.utils.FailedJobError as error:  # sbatch refused it
            raise PqkError(f"SLURM refused the job of {cell.name}: {first_line(error)}") from None

    def wait(self) -> list[Done]:
        ended: list[Done] = []
        while self._jobs and not ended:
            for job in list(self._jobs):
                if job.job.done():
                    done = self._end(job)
                    if done is not None:
                        self._jobs.remove(job)
                        ended.append(done)
            if not ended:
                time.sleep(_POLL_S[self._here])
        return ended

    def _end(self, job: _Job) -> Done | None:
        """Returns the end of a job; None where it, or its command, was killed and is sent again."""
        failed = self._submitit.core.utils.FailedJobError
        why, again = "", True
        try:
            found: Done = job.job.result()
            if not found.killed:
                return found
            why = why_not(found)
        except (self._submitit.core.utils.UncompletedJobError, failed) as error:
            why, again = f"its job was lost: {first_line(error)}", not isinstance(error, failed)
        if again and job.tried <= self._needs.retries:
            job.tried += 1
            job.job = self._submit(job.cell)
            return None
        return lost(job.cell, why, job.began)
