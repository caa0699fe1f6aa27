"""Downloads from a server that cuts, lies and changes, and the scenes of ETH3D that are fetched with them."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from http_toys import Site, serving

from pqk.data.fetch.download import Cut, Patience, Progress, WrongLength, about_file, download
from pqk.data.fetch.eth3d import DEFAULT_SCENES, RECORD, SCENES, Request, fetch, main
from pqk.data.render.generate import ScenePlan, make_scenes
from pqk.data.scenes.open import open_scene, open_scenes
from pqk.errors import PqkError

CONTENT = hashlib.sha256(b"seed").digest() * 10_000
QUICK = Patience(timeout=5.0, tries=2, pause=0.01)
ONCE = Patience(timeout=5.0, tries=1, pause=0.01)
SCRIPT = Path(__file__).parents[2] / "scripts" / "download_eth3d.py"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Site({"/a.7z": CONTENT})) as found:
        yield found


def partial(site: Site, target: Path, count: int) -> None:
    """The first `count` bytes of a file, from a call that the connection ended."""
    site.cuts = [count]
    with pytest.raises(Cut, match=rf"ended after {count} of \d+ bytes"):
        download(f"{site.url}/a.7z", target, patience=ONCE)
    assert not target.exists()
    assert target.with_name("a.7z.part").stat().st_size == count
    site.asked.clear()


def test_a_whole_file(site: Site, tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    target = tmp_path / "new" / "a.7z"
    found = download(f"{site.url}/a.7z", target, lambda *numbers: said.append(numbers), QUICK)
    assert target.read_bytes() == CONTENT
    assert (found.sha256, found.resumed) == (hashlib.sha256(CONTENT).hexdigest(), 0)
    assert (found.remote.length, found.remote.etag) == (len(CONTENT), '"one"')
    assert said[-1] == (len(CONTENT), len(CONTENT)) and said == sorted(said)
    assert {path.name for path in target.parent.iterdir()} == {"a.7z", "a.7z.http.json"}
    assert download(f"{site.url}/a.7z", target).sha256 == found.sha256
    assert len(site.asked) == 1  # what is whole is not asked for again


@pytest.mark.parametrize(("etag", "modified"), [('"one"', ""), ('W/"weak"', "Mon, 30 Nov 2026 10:00:00 GMT")])
def test_an_interrupted_file_is_gone_on_from(site: Site, tmp_path: Path, etag: str, modified: str) -> None:
    site.etag, site.modified = etag, modified
    target = tmp_path / "a.7z"
    partial(site, target, 1000)
    found = download(f"{site.url}/a.7z", target, patience=ONCE)
    assert target.read_bytes() == CONTENT
    assert (found.resumed, site.asked) == (1000, [("/a.7z", "bytes=1000-")])


def test_a_connection_that_ends_again_and_again_but_brings_something_is_not_given_up(
    site: Site, tmp_path: Path
) -> None:
    site.cuts = [100_000, 50_000, 1, 60_000]
    found = download(f"{site.url}/a.7z", tmp_path / "a.7z", patience=QUICK)
    assert (tmp_path / "a.7z").read_bytes() == CONTENT
    assert (len(site.asked), found.resumed) == (5, 100_000)


def test_a_file_that_came_whole_before_the_process_ended(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "a.7z"
    partial(site, target, 1000)
    target.with_name("a.7z.part").write_bytes(CONTENT)
    assert download(f"{site.url}/a.7z", target, patience=ONCE).resumed == 0
    assert target.read_bytes() == CONTENT
    assert site.asked == [("/a.7z", f"bytes={len(CONTENT)}-")]  # answered by 416


@pytest.mark.parametrize("check", [True, False])
def test_a_file_that_changed_begins_anew(site: Site, tmp_path: Path, check: bool) -> None:
    target = tmp_path / "a.7z"
    partial(site, target, 1000)
    site.files["/a.7z"], site.etag, site.check = CONTENT[::-1], '"two"', check
    download(f"{site.url}/a.7z", target, patience=QUICK)
    assert target.read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_begins_anew(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "a.7z"
    site.ranges = False
    partial(site, target, 1000)
    assert download(f"{site.url}/a.7z", target, patience=ONCE).resumed == 0
    assert target.read_bytes() == CONTENT
    assert site.asked == [("/a.7z", "bytes=1000-")]


def test_nothing_is_resumed_that_nothing_vouches_for(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "a.7z"
    site.etag = ""
    partial(site, target, 1000)
    download(f"{site.url}/a.7z", target, patience=ONCE)
    site.etag = '"one"'
    partial(site, tmp_path / "b" / "a.7z", 1000)
    about_file(tmp_path / "b" / "a.7z").write_text("{}")
    download(f"{site.url}/a.7z", tmp_path / "b" / "a.7z", patience=ONCE)
    assert target.read_bytes() == (tmp_path / "b" / "a.7z").read_bytes() == CONTENT
    assert site.asked == [("/a.7z", None)]


def test_more_bytes_than_declared(site: Site, tmp_path: Path) -> None:
    site.declared = len(CONTENT) - 5
    with pytest.raises(WrongLength, match=rf"declared {len(CONTENT) - 5} bytes and sends more"):
        download(f"{site.url}/a.7z", tmp_path / "a.7z", patience=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_fewer_bytes_than_declared(site: Site, tmp_path: Path) -> None:
    """Looks like a cut at first; that nothing comes after it shows the lie."""
    site.declared = len(CONTENT) + 5
    with pytest.raises(WrongLength, match=rf"declared {len(CONTENT) + 5} bytes, and now says {len(CONTENT)}"):
        download(f"{site.url}/a.7z", tmp_path / "a.7z", patience=QUICK)
    assert list(tmp_path.iterdir()) == []
    site.ranges = False
    with pytest.raises(Cut, match=rf"ended after {len(CONTENT)} of {len(CONTENT) + 5} bytes \(2 tries in a row"):
        download(f"{site.url}/a.7z", tmp_path / "a.7z", patience=QUICK)
    assert not (tmp_path / "a.7z").exists()


def test_another_length_for_the_same_file(site: Site, tmp_path: Path) -> None:
    partial(site, tmp_path / "a.7z", 1000)
    site.files["/a.7z"] += b"more"
    with pytest.raises(WrongLength, match=rf"declared {len(CONTENT)} bytes, and now says {len(CONTENT) + 4}"):
        download(f"{site.url}/a.7z", tmp_path / "a.7z", patience=QUICK)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"statuses": [404]}, "the server answers 404 Not Found"),
        ({"statuses": [403, 200]}, "the server answers 403 Forbidden"),
        ({"statuses": [503, 503]}, "answers 503 Service Unavailable (2 tries in a row brought nothing new)"),
        ({"redirects": {"/a.7z": "file:///etc/passwd"}}, "file:///etc/passwd"),
        ({"redirects": {"/a.7z": "ftp://example.org/a.7z"}}, "redirects to ftp://example.org/a.7z"),
        ({"redirects": {"/a.7z": "/a.7z"}}, "redirect error that would lead to an infinite loop"),
        ({"headers": {"Content-Encoding": "gzip"}}, "the server sends it as gzip"),
        ({"declared": 10**12}, "1000000000000 bytes are more than the 68719476736 that are allowed"),
    ],
)
def test_answers_that_are_refused(site: Site, tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    for name, value in change.items():
        setattr(site, name, value)
    with pytest.raises(PqkError) as caught:
        download(f"{site.url}/a.7z", tmp_path / "a.7z", patience=QUICK)
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_recovers_and_a_redirect_that_is_followed(site: Site, tmp_path: Path) -> None:
    site.statuses, site.redirects = [503], {"/old.7z": "/a.7z"}
    site.cuts = [1000]
    download(f"{site.url}/old.7z", tmp_path / "a.7z", patience=QUICK)
    assert (tmp_path / "a.7z").read_bytes() == CONTENT
    assert site.asked[-1] == ("/a.7z", "bytes=1000-")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/a", "/etc/passwd", "http://", "http://a b/c"])
def test_only_http_is_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(PqkError, match="only addresses that begin with http"):
        download(url, tmp_path / "a.7z", patience=ONCE)
    assert list(tmp_path.iterdir()) == []


def test_nobody_answers(site: Site, tmp_path: Path) -> None:
    with serving(Site()) as gone:
        pass
    with pytest.raises(Cut, match=r"refused \(2 tries in a row"):
        download(f"{gone.url}/a.7z", tmp_path / "a.7z", patience=QUICK)


def test_progress_in_lines_and_on_a_terminal() -> None:
    now = [0.0]
    plain, live = io.StringIO(), io.StringIO()
    live.isatty = lambda: True  # type: ignore[method-assign]
    for stream in (plain, live):
        now[0] = 0.0
        progress = Progress("a.7z", stream, lambda: now[0])
        for second in range(0, 101, 10):
            now[0] = float(second)
            progress(second * 1_000_000, 100_000_000)
    assert plain.getvalue().splitlines() == [
        "a.7z: 30.0 of 100.0 MB, 1.0 MB/s",
        "a.7z: 60.0 of 100.0 MB, 1.0 MB/s",
        "a.7z: 90.0 of 100.0 MB, 1.0 MB/s",
        "a.7z: 100.0 of 100.0 MB, 1.0 MB/s",
    ]
    assert live.getvalue().count("\r") == 10 and live.getvalue().endswith("MB/s".ljust(8) + " " * 39 + "\n") is False
    assert live.getvalue().endswith("\n")


# The scenes of ETH3D


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A generated scene, packed as the benchmark packs its own: pictures and cameras apart from the depth."""
    folder = tmp_path_factory.mktemp("made")
    plan = ScenePlan(split="test", seed=0, index=0, views=2, size=32, k=2, min_covisibility=0.1, depth=True)
    make_scenes(folder, [plan])
    scene = folder / plan.name
    jpg, depth = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(jpg, "w") as pictures, zipfile.ZipFile(depth, "w") as truth:
        for path in sorted(scene.rglob("*")):
            inner = path.relative_to(scene).as_posix()
            if path.is_file() and inner.startswith("ground_truth_depth/"):
                truth.write(path, f"courtyard/{inner}")
            elif path.is_file() and inner != "scene.json":
                pictures.write(path, f"courtyard/{inner}")
    return {"/courtyard_dslr_jpg.zip": jpg.getvalue(), "/courtyard_dslr_depth.zip": depth.getvalue()}


def request(site: Site, out: Path, kinds: tuple[str, ...] = ("jpg", "depth")) -> Request:
    return Request(out, ("courtyard",), kinds, site.url, "zip", patience=QUICK)


def test_a_scene_that_pqk_reads(site: Site, archives: dict[str, bytes], tmp_path: Path) -> None:
    site.files = archives
    (folder,) = fetch(request(site, tmp_path / "eth3d", ("jpg",)))
    assert not open_scene(folder).has_ground_truth
    fetch(request(site, tmp_path / "eth3d"))  # adds what is missing
    assert [path for path, _ in site.asked] == sorted(archives, reverse=True)
    scene = open_scene(folder)
    assert scene.has_ground_truth and len(scene.views) == 2
    depth = scene.views[0].load_depth()
    assert depth is not None and (depth > 0).any()
    assert len(open_scenes(folder / "images", pictures=True)[0].views) == 2
    assert [found.name for found in open_scenes(tmp_path / "eth3d")] == ["courtyard"]
    record = json.loads((folder / RECORD).read_text())
    assert record["depth"]["sha256"] == hashlib.sha256(archives["/courtyard_dslr_depth.zip"]).hexdigest()
    assert record["jpg"]["files"] == len(zipfile.ZipFile(io.BytesIO(archives["/courtyard_dslr_jpg.zip"])).namelist())
    assert [path.name for path in (tmp_path / "eth3d" / ".archives").iterdir()] == [".lock"]
    fetch(request(site, tmp_path / "eth3d"))
    assert len(site.asked) == 2


def test_an_interrupted_scene_is_gone_on_from(site: Site, archives: dict[str, bytes], tmp_path: Path) -> None:
    site.files, site.cuts = archives, [10**9, 100, 0]
    with pytest.raises(Cut, match=r"courtyard_dslr_depth\.zip: the connection ended after 100 of"):
        fetch(request(site, tmp_path))
    assert not (tmp_path / "courtyard" / "ground_truth_depth").exists()
    site.asked.clear()
    (folder,) = fetch(request(site, tmp_path))
    assert site.asked == [("/courtyard_dslr_depth.zip", "bytes=100-")]
    assert open_scene(folder).has_ground_truth


def test_a_scene_that_was_killed_between_unpacking_and_its_record(
    site: Site, archives: dict[str, bytes], tmp_path: Path
) -> None:
    site.files = archives
    fetch(Request(tmp_path, ("courtyard",), ("jpg",), site.url, "zip", keep=True))
    (tmp_path / "courtyard" / RECORD).unlink()
    (tmp_path / ".archives" / "courtyard_dslr_jpg.zip.unpacked" / "half").mkdir(parents=True)
    fetch(request(site, tmp_path))
    assert [path for path, _ in site.asked] == sorted(archives, reverse=True)  # the kept archive is not asked for again
    assert open_scene(tmp_path / "courtyard").has_ground_truth


def test_an_archive_that_is_refused_leaves_nothing_of_a_scene(
    site: Site, archives: dict[str, bytes], tmp_path: Path
) -> None:
    packed = io.BytesIO(archives["/courtyard_dslr_depth.zip"])
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("facade/images/other.txt", "not of this scene")
    site.files = {"/courtyard_dslr_depth.zip": packed.getvalue()}
    with pytest.raises(PqkError, match=r"facade/images/other\.txt does not lie in the folder courtyard"):
        fetch(request(site, tmp_path, ("depth",)))
    assert [path.name for path in tmp_path.iterdir()] == [".archives"]
    assert not [path for path in (tmp_path / ".archives").iterdir() if path.is_dir()]


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(PqkError, match=r"unknown scene 'courtyrd' \(did you mean 'courtyard'\?\); known: courtyard, "):
        fetch(Request(tmp_path, ("courtyrd",)))
    with pytest.raises(PqkError, match=r"unknown kind 'raw'.*; known: jpg, depth, undistorted"):
        fetch(Request(tmp_path, kinds=("raw",)))
    assert list(tmp_path.iterdir()) == []
    assert set(DEFAULT_SCENES) < set(SCENES)


def test_the_script(site: Site, archives: dict[str, bytes], tmp_path: Path) -> None:
    site.files = archives
    words = ["--output_dir", "data/eth3d", "--scenes", "courtyard", "--base-url", site.url, "--archives", "zip"]
    done = subprocess.run([sys.executable, SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("data/eth3d/courtyard: 2 pictures with cameras, 2 with depth; images/ has ")
    assert "courtyard_dslr_depth.zip: " in done.stderr  # progress
    assert main([*words[:1], str(tmp_path / "b"), *words[2:4], "--kind", "depth", *words[4:]]) == 0
    words[3] = "courtyrd"
    done = subprocess.run([sys.executable, SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pqk: unknown scene 'courtyrd'") and len(done.stderr.splitlines()) == 1
