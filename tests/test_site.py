"""The documentation site builds without a warning, its links lead somewhere, and no page loads from another host."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("zensical") is None, reason="zensical is not installed: pip install -e '.[docs]'"
    ),
]


class Links(HTMLParser):
    """What a page loads, and where it leads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.led: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and (tag, name) in LOADED:
                self.loaded.append(value)
            elif value and (tag, name) == ("a", "href"):
                self.led.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(ROOT / "scripts" / "build_site.py"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_of_docs_is_in_the_navigation(site: Path) -> None:
    named = set(re.findall(r'"([\w/.-]+\.md)"', (ROOT / "zensical.toml").read_text("utf-8")))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert named == pages | {"index.md", "zh.md", "changelog.md"}
    assert all((site / name).with_suffix(".html").exists() for name in named)
    assert tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]["theme"]["font"] is False


def test_nothing_comes_from_another_host_and_links_lead_somewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        found = Links(page.read_text("utf-8"))
        assert found.loaded and not [link for link in found.loaded if re.match(r"(https?:)?//", link)], page.name
        for link in (*found.loaded, *found.led):
            path = unquote(link.split("#")[0].split("?")[0])
            if path and not re.match(r"[a-z]+:", path) and page.name != "404.html":
                assert (page.parent / path).exists(), f"{page.name} leads to {link}"


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    command = [sys.executable, str(ROOT / "scripts" / "build_site.py"), "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is no site of an earlier call" in done.stderr
    assert (tmp_path / "mine.txt").exists()


def test_the_api_is_there(site: Path) -> None:
    for page, name in (
        ("models", "pqk.families.checkpoint.load_model"),
        ("compress", "pqk.compress.weights.model.quantize_weights"),
        ("family", "pqk.families.contract.Family"),
        ("backend", "backends.base.Backend"),
        ("record", "pqk.record.frames.frame"),
    ):
        assert f'id="{name}"' in (site / "api" / f"{page}.html").read_text("utf-8")
