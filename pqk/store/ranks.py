"""Starts the processes that share one training, as torchrun does on one machine: `run_shared`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from pqk.cores import allowed_cores


def run_shared(arguments: Sequence[str], processes: int) -> str | None:
    """Runs Python with these arguments in so many processes, and waits; they know each other by torchrun's variables.

    Where one ends in any way but well, the others are ended. Returns a sentence for one that a signal ended, None where
    all went well. Another failure raises torch's ChildFailedError, with the traceback of the process on stderr.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, allowed_cores() // processes)))  # torchrun would say 1
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="pqk",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        codes = {rank: found.exitcode for rank, found in error.failures.items()}
        lost = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
        if not lost and any(code > 0 for code in codes.values()):  # a defect; SIGTERM ended the others
            raise
        rank = lost[0] if lost else error.get_first_failure()[0]
        number = -codes[rank]
        return (
            f"process {rank} of {processes} was ended ({signal.Signals(number).name}), and the others with it; "
            "the same command goes on from the last checkpoint"
        )
    return None
