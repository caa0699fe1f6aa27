"""Trackio as a tracker: a run per record in a local project, below outputs/trackio (or `TRACKIO_DIR`)."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

from pqk.errors import PqkError
from pqk.track.track import Tracked, safe_key

PROJECT = "pqk"


class Tracker:
    """Trackio's local store, unless its own variables name a server; place: the name of a project, '' for pqk."""

    def __init__(self, place: str, root: Path) -> None:
        self.project = place or PROJECT
        self._folder = root / "outputs" / "trackio"

    def check(self) -> None:
        """Raises ImportError, or PqkError for a name that cannot be a project's."""
        os.environ.setdefault("TRACKIO_DIR", str(self._folder))  # read when it is imported
        import trackio

        del trackio
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.project):
            raise PqkError(f"--track trackio:{self.project[:80]}: a project's name is letters, digits, '_' and '-'")

    def log(self, run: Tracked) -> str:
        """Writes a run with its parameters, metrics and files."""
        import trackio

        with contextlib.redirect_stdout(sys.stderr):  # it greets; stdout belongs to --json
            found = trackio.init(
                project=self.project,
                name=run.name,
                group=run.group,
                config={safe_key(name): value for name, value in run.params.items()},
                resume="allow",  # the same record measured again is the same run
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            try:
                found.log({safe_key(name): value for name, value in run.metrics.items()})
                files = trackio.Artifact(safe_key(run.name).replace("/", "_"), type="record")
                for path in run.files:
                    files.add_file(str(path))
                if run.files:
                    found.log_artifact(files)
            finally:
                trackio.finish()
        return f"{os.environ['TRACKIO_DIR']}, project {self.project}; see it with trackio show --project {self.project}"
