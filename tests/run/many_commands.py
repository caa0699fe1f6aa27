"""Run as a program: runs commands of pqk, each with the permissions of one path taken away.

    many_commands.py PROJECT CASES.json      CASES: a list of [path or null, [argument, ...]]

Prints a JSON list of [exit code, stderr]. One process runs them all, as each command would import torch anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path


def main() -> None:
    from pqk import cli

    os.chdir(sys.argv[1])
    found = []
    for name, arguments in json.loads(Path(sys.argv[2]).read_text()):
        path = Path(name or ".")
        mode = path.stat().st_mode & 0o777
        if name:
            path.chmod(0)
        sys.argv = ["pqk", *arguments]
        said, code = io.StringIO(), 0
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            path.chmod(mode)
        found.append([code, said.getvalue()])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
