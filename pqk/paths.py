"""Where things lie in a project: its root, the configs, the task cards, the artifact store."""

from __future__ import annotations

from pathlib import Path

from pqk.errors import PqkError
from pqk.oserrors import printable

MARK = Path("configs") / "workload.yaml"
"""The file that makes a folder a project root."""


def project_root(start: Path | str | None = None) -> Path:
    """The nearest of `start` (default: the current directory) and its parents that holds configs/workload.yaml.

    Without one, the repository that this package lies in. Raises PqkError when that is no project either, and when its
    path is not UTF-8: exporters, engines and JSON cannot name files there.
    """
    begin = Path(start).resolve() if start is not None else Path.cwd()
    repository = Path(__file__).resolve().parents[1]
    for folder in (begin, *begin.parents, repository):
        if (folder / MARK).is_file():
            if printable(folder) != str(folder):
                raise PqkError(f"the path of the project is not UTF-8: {printable(folder)}; rename that folder")
            return folder
    raise PqkError(f"no project here: neither {begin} nor a parent of it holds {MARK}; change into a checkout of pqk")


def configs(root: Path) -> Path:
    """The folder of workload.yaml, eval.yaml and the method configs."""
    return root / "configs"


def task_cards(root: Path) -> Path:
    """The folder of the task cards."""
    return root / "schedule" / "TaskCards"


def log_schema(root: Path) -> Path:
    """The JSON Schema that every record follows."""
    return root / "logs" / "unified_log_schema.json"


def store(root: Path) -> Path:
    """The folder of the artifact store."""
    return root / "outputs" / "store"


def shown(path: Path | str, root: Path | None = None) -> str:
    """`path` as messages show it: relative to `root` (default: the current directory) when it lies inside it."""
    base = root or Path.cwd()
    try:
        return Path(path).absolute().relative_to(base).as_posix()
    except ValueError:
        return str(path)
