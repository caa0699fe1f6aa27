"""The commit of a record is that of the code: not of what GIT_* variables or a repository around it name."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pqk.recipe.request import commit_of


def git(folder: Path, *words: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    who = {f"GIT_{role}_{what}": "x@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(["git", "-C", folder, *words], env=own | who, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository that tracks a package, and an untracked package beside it."""
    root = tmp_path / "checkout"
    for name in ("pqk", "site-packages/pqk"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text(f"# {name}\n")
    git(tmp_path, "init", "-q", "checkout")
    git(root, "add", "pqk")
    git(root, "commit", "-qm", "first")
    return root


def test_commit_and_dirt(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert commit_of(checkout / "pqk") == head
    (checkout / "untracked").write_text("x")
    assert commit_of(checkout / "pqk") == head
    (checkout / "pqk" / "__init__.py").write_text("# changed\n")
    assert commit_of(checkout / "pqk") == f"{head}-dirty"


@pytest.mark.parametrize("name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_CEILING_DIRECTORIES"])
def test_variables_of_the_caller_do_not_count(
    name: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    (checkout / "pqk" / "__init__.py").write_text("# changed\n")
    other = tmp_path / "other"
    git(tmp_path, "init", "-q", "other")
    git(other, "commit", "-qm", "another", "--allow-empty")
    value = {"GIT_DIR": other / ".git", "GIT_WORK_TREE": other, "GIT_INDEX_FILE": other / "index"}
    monkeypatch.setenv(name, str(value.get(name, checkout)))
    assert commit_of(checkout / "pqk") == f"{head}-dirty"


def test_a_package_that_the_repository_around_it_does_not_track(checkout: Path, tmp_path: Path) -> None:
    assert commit_of(checkout / "site-packages" / "pqk") is None
    assert commit_of(tmp_path) is None
    assert commit_of(tmp_path / "not-there") is None


def test_the_running_code() -> None:
    """Here it is a checkout, or it was unpacked from an archive."""
    root = Path(__file__).resolve().parents[2]
    assert ((root / ".git").exists()) == (commit_of() is not None)
