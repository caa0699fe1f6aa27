"""Builds the documentation site from the README, docs/ and the docstrings. Any warning is an error.

The pages stay readable where they lie: they are copied to a temporary folder, where the README is the first page, and
files beside docs/ that a page links to lie in files/. A link to a folder (a deliverable) becomes its name.
Zensical builds it: Material for MkDocs, whose makers it is from, gets no more than fixes and ends in May 2027.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FRONT = {"README.md": "index.md", "README.zh-CN.md": "zh.md", "CHANGELOG.md": "changelog.md"}


def prepare(pages: Path) -> None:
    """Writes the pages of the site to a new folder, with links that hold there.

    Raises FileNotFoundError where a page links to a file that is not there.
    """
    shutil.copytree(ROOT / "docs", pages)
    for page in sorted(pages.rglob("*.md")):
        source = ROOT / "docs" / page.relative_to(pages)
        page.write_text(_moved(source, page, pages), "utf-8")
    for name, called in FRONT.items():
        (pages / called).write_text(_moved(ROOT / name, pages / called, pages), "utf-8")


def _moved(source: Path, page: Path, pages: Path) -> str:
    """Returns the text of a page with links as they are from its place on the site."""

    def link(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        path, sign, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return found[0]
        linked = (source.parent / path).resolve()
        if not linked.exists():
            raise FileNotFoundError(f"{source.relative_to(ROOT)} links to {target}, which is not there")
        if linked.is_dir():
            return f"{text} (`{linked.relative_to(ROOT)}`)"
        place = _place(linked, pages)
        anchor = re.sub("-{2,}", "-", anchor)  # a code host keeps each dash of a heading, the site one
        return f"{picture}[{text}]({os.path.relpath(place, page.parent)}{sign}{anchor})"

    parts = re.split(r"(```.*?```)", source.read_text("utf-8"), flags=re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def _place(linked: Path, pages: Path) -> Path:
    """Returns where a file of the repository lies on the site; one that is no page of it is copied to files/."""
    inside = linked.relative_to(ROOT)
    if inside.name in FRONT and inside.parent == Path():
        return pages / FRONT[inside.name]
    if inside.parts[0] == "docs":
        return pages.joinpath(*inside.parts[1:])
    copied = pages / "files" / inside
    copied.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(linked, copied)
    return copied


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "site", help="folder of the site (default: site)")
    out = parser.parse_args().out.resolve()
    if out.exists() and not (out / "sitemap.xml").is_file():
        print(f"{out}: this is there and is no site of an earlier call; give another folder", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="pqk-site-") as name:
        folder = Path(name)
        prepare(folder / "pages")
        shutil.copyfile(ROOT / "zensical.toml", folder / "zensical.toml")
        command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(folder / "zensical.toml")]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode
        if done == 0:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(folder / "site", out)
    return done


if __name__ == "__main__":
    sys.exit(main())
