"""Archives that try to leave their folder, to link, to lie about sizes and to fill the disk."""

from __future__ import annotations

import io
import stat
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pqk.data.fetch.unpack import Limits, Member, check, unpack
from pqk.errors import NotBuilt, PqkError

SAMPLE_7Z = Path(__file__).parent / "sample.7z"
"""Made with libarchive (`cmake -E tar cf sample.7z --format=7zip courtyard`), LZMA: two files, one of them empty."""


def zipped(path: Path, members: dict[str, bytes], modes: dict[str, int] | None = None) -> Path:
    """Writes a zip archive; modes: the Unix mode of a member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (modes or {}).get(name, stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir(exist_ok=True)
    return folder


def test_what_is_packed_is_unpacked(tmp_path: Path) -> None:
    members = {
        "s/": b"",
        "s/a.txt": b"one",
        "s/deep/er/b.bin": bytes(range(256)) * 9000,
        "s/empty": b"",
        "s/Ü 1.JPG": b"x",
    }
    modes = {"s/": stat.S_IFDIR | 0o755, "s/a.txt": stat.S_IFREG | 0o4777}
    files = unpack(zipped(tmp_path / "a.zip", members, modes), target(tmp_path), inside="s")
    assert [path.as_posix() for path in files] == [name for name in members if name != "s/"]
    for name in files:
        found = tmp_path / "target" / name
        assert found.read_bytes() == members[name.as_posix()]
        assert not found.stat().st_mode & 0o7000


@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "s/../../a",
        "s/..",
        "/etc/passwd",
        "//host/a",
        "C:/a",
        "C:a",
        "c:\\a",
        "s\\..\\..\\a",
        "s\\a",
        "./a",
        "s//a",
        "s/./a",
        "a\nb",
        "a\x1b[2Jb",
        "a\u202eb",
    ],
)
def test_a_name_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    archive = zipped(tmp_path / "a.zip", {"fine.txt": b"fine", name: b"evil"})
    with pytest.raises(PqkError, match="would leave the folder it is unpacked into, or is malformed"):
        unpack(archive, target(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "target"}
    assert list((tmp_path / "target").iterdir()) == []


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "", "a", "C:", "\\", "~", "a\\..", "...", " "]), min_size=1, max_size=5))
def test_any_name_that_is_let_through_stays_inside(parts: list[str]) -> None:
    name = "/".join(parts)
    try:
        check(SAMPLE_7Z, [Member(name, 1, "file")], None, Limits())
    except PqkError:
        return
    root = Path("/base/target")
    inner = (root / name).parts[len(root.parts) :]
    assert (root / name).is_relative_to(root) and inner and not {"..", "C:", "\\"} & set(inner)
    assert "\\" not in name


@pytest.mark.parametrize(
    ("kind", "called"),
    [(stat.S_IFLNK, "link"), (stat.S_IFIFO, "device"), (stat.S_IFCHR, "device"), (stat.S_IFSOCK, "device")],
)
def test_links_and_devices(tmp_path: Path, kind: int, called: str) -> None:
    members = {"s/fine": b"fine", "s/odd": b"../../etc"}
    archive = zipped(tmp_path / "a.zip", members, {"s/odd": kind | 0o777})
    with pytest.raises(PqkError, match=rf"s/odd is a {called}; only files and folders are unpacked"):
        unpack(archive, target(tmp_path))
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a/b", "a/b"], "two members have the name 'a/b'"),
        (["a/b", "A/B"], "names that some systems take for one"),
        (["a/\u00e9", "a/e\u0301"], "names that some systems take for one"),
        (["a", "a/b"], "a/b lies in something that is a file"),
        (["a", "a/"], "two members have the name"),
        (["other/b"], "other/b does not lie in the folder a"),
        (["a/"], "it holds no file"),
        ([], "it holds no file"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_do_not_fit_together(tmp_path: Path, names: list[str], sentence: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"" if name.endswith("/") else b"x")
    with pytest.raises(PqkError, match=sentence):
        unpack(tmp_path / "a.zip", target(tmp_path), inside="a")
    assert list((tmp_path / "target").iterdir()) == []


def test_bombs(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "a.zip", {f"{k}": bytes(4_000_000) for k in range(4)})
    assert bomb.stat().st_size < 40_000
    with pytest.raises(PqkError, match="bytes unpack to 16000000, more than 200 times as many"):
        unpack(bomb, target(tmp_path))
    with pytest.raises(PqkError, match="it unpacks to 16000000 bytes, at most 15000000 are allowed"):
        unpack(bomb, target(tmp_path), limits=Limits(total=15_000_000))
    with pytest.raises(PqkError, match="it has 4 members, at most 3 are allowed"):
        unpack(bomb, target(tmp_path), limits=Limits(members=3))
    assert list((tmp_path / "target").iterdir()) == []
    assert len(unpack(bomb, target(tmp_path), limits=Limits(ratio=2000.0))) == 4


def patched(archive: Path, old: int, new: int) -> Path:
    """Writes another size into the table of a zip archive and before the member."""
    data = archive.read_bytes()
    assert data.count(old.to_bytes(4, "little")) == 2
    archive.write_bytes(data.replace(old.to_bytes(4, "little"), new.to_bytes(4, "little")))
    return archive


@pytest.mark.parametrize("declared", [1_000_000, 2_000_003])
def test_sizes_that_lie(tmp_path: Path, declared: int) -> None:
    """A member of 1234567 bytes that declares fewer, so as to pass the limits, or more."""
    archive = zipped(tmp_path / "a.zip", {"a": bytes(1_234_567)})
    with pytest.raises(PqkError, match=r"damaged|holds 1234567 of the 2000003 bytes declared"):
        unpack(patched(archive, 1_234_567, declared), target(tmp_path))
    assert sum(path.stat().st_size for path in (tmp_path / "target").iterdir()) <= declared


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"a": b"some text " * 400})
    data = archive.read_bytes()
    for broken in (data[: len(data) // 2], data[:40] + b"\xff" * 8 + data[48:], b"PK\x03\x04"):
        archive.write_bytes(broken)
        with pytest.raises(PqkError, match=r"a\.zip: the archive is damaged, or packed in a way not known"):
            unpack(archive, target(tmp_path))
    archive.write_bytes(b"\x1f\x8b rest of a gzip file")
    with pytest.raises(PqkError, match="neither a zip nor a 7z archive"):
        unpack(archive, target(tmp_path))
    with pytest.raises(PqkError, match="cannot read"):
        unpack(tmp_path / "none.zip", target(tmp_path))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.integers(0, 255))
@example(129923, 0)  # a member without a name
def test_a_changed_byte_is_noticed_or_harmless(tmp_path: Path, place: int, byte: int) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("s/a", b"text " * 200)
    data = bytearray(packed.getvalue())
    data[place % len(data)] = byte
    path = tmp_path / "a.zip"
    path.write_bytes(data)
    folder = tmp_path / f"{place}-{byte}" / "target"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files = unpack(path, folder)
    except PqkError:
        return
    assert [(folder / name).read_bytes() for name in files] == [b"text " * 200]


# 7z


class Py7zIO:
    """Like the class of py7zr 1.0."""


class WriterFactory:
    """Like the class of py7zr 1.0."""


def fake_py7zr(entries: list[Any], contents: dict[str, bytes], before: str = "") -> types.ModuleType:
    """Stands in for py7zr, as far as `unpack` uses it: no 7z archive is decoded here. See the test of the real one."""

    class SevenZipFile:
        def __init__(self, file: Path, mode: str) -> None:
            self.files = entries

        def __enter__(self) -> SevenZipFile:
            return self

        def __exit__(self, *exc: object) -> None: ...

        def needs_password(self) -> bool:
            return False

        def extractall(self, *, factory: Any) -> None:
            for name, content in contents.items():
                out = factory.create(before + name)
                for k in range(0, len(content), 3):
                    out.write(content[k : k + 3])
                out.flush()
                out.seek(0)

    module = types.ModuleType("py7zr")
    module.SevenZipFile = SevenZipFile  # type: ignore[attr-defined]
    module.io = types.SimpleNamespace(Py7zIO=Py7zIO, WriterFactory=WriterFactory)  # type: ignore[attr-defined]
    return module


def entry(name: str, size: int = 0, **kinds: Any) -> types.SimpleNamespace:
    """A member as py7zr describes it."""
    plain = {"is_directory": False, "is_symlink": False, "is_junction": False, "is_socket": False, "st_fmt": None}
    return types.SimpleNamespace(filename=name, uncompressed=size, **{**plain, **kinds})


@pytest.mark.parametrize("before", ["", "/somewhere/else/"])
def test_7z_members_are_written_by_the_same_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    entries = [entry("s", is_directory=True), entry("s/a", 8), entry("s/empty")]
    monkeypatch.setitem(sys.modules, "py7zr", fake_py7zr(entries, {"s/a": b"8 bytes!"}, before))
    assert unpack(SAMPLE_7Z, target(tmp_path), inside="s") == [Path("s/a"), Path("s/empty")]
    assert (tmp_path / "target" / "s" / "a").read_bytes() == b"8 bytes!"
    assert (tmp_path / "target" / "s" / "empty").read_bytes() == b""


@pytest.mark.parametrize(
    ("entries", "contents", "sentence"),
    [
        ([entry("../a", 1)], {"../a": b"x"}, "would leave the folder"),
        ([entry("a", 1, is_symlink=True)], {"a": b"x"}, "a is a link"),
        ([entry("a", 1, is_junction=True)], {"a": b"x"}, "a is a link"),
        ([entry("a", 1, st_fmt=stat.S_IFCHR)], {"a": b"x"}, "a is a device"),
        ([entry("a", 10**12)], {}, "at most 68719476736 are allowed"),
        ([entry("a", 4)], {"a": b"12345"}, "a holds more than the 4 bytes declared"),
        ([entry("a", 4)], {"a": b"123"}, "a holds 3 of the 4 bytes declared"),
        ([entry("a", 4)], {}, "a holds 0 of the 4 bytes declared"),
        ([entry("a", 1)], {"b": b"x"}, "'b' is no file that its table names once"),
        ([entry("a", 1)], {"a": b"x", "x/a": b"y"}, "'a' is no file that its table names once"),
    ],
)
def test_7z_archives_pass_the_same_checks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entries: list[Any],
    contents: dict[str, bytes],
    sentence: str,
) -> None:
    monkeypatch.setitem(sys.modules, "py7zr", fake_py7zr(entries, contents))
    with pytest.raises(PqkError, match=sentence):
        unpack(SAMPLE_7Z, target(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"target"}


def test_7z_needs_py7zr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py7zr", None)
    with pytest.raises(NotBuilt, match="py7zr, which is not installed: pip install py7zr, or pqk's extra 'eth3d'"):
        unpack(SAMPLE_7Z, target(tmp_path))


def test_a_real_7z_archive(tmp_path: Path) -> None:
    pytest.importorskip("py7zr")
    files = unpack(SAMPLE_7Z, target(tmp_path), inside="courtyard")
    assert sorted(path.as_posix() for path in files) == ["courtyard/empty.txt", "courtyard/images/a.txt"]
    assert (tmp_path / "target" / "courtyard" / "images" / "a.txt").read_bytes() == b"a picture, in words\n" * 50


def test_real_7z_archives_that_are_refused(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    broken, folder = tmp_path / "broken.7z", target(tmp_path)
    (tmp_path / "file").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "link").symlink_to("/etc/passwd")
    with py7zr.SevenZipFile(broken, "w") as archive:
        archive.write(tmp_path / "file", "s/file")
        archive.write(tmp_path / "link", "s/link")
    with pytest.raises(PqkError, match="s/link is a link"):
        unpack(broken, folder)
    with py7zr.SevenZipFile(broken, "w") as archive:
        archive.writestr(bytes(20_000_000), "s/zeros")
    with pytest.raises(PqkError, match="bytes unpack to 20000000, more than 200 times as many"):
        unpack(broken, folder)
    with py7zr.SevenZipFile(broken, "w") as archive:
        archive.writestr("x", "C:/x")
    with pytest.raises(PqkError, match="'C:/x' would leave the folder"):
        unpack(broken, folder)
    assert list(folder.iterdir()) == []
    data = SAMPLE_7Z.read_bytes()
    for number, damaged in enumerate([data[:-5], data[:60], data[:40] + b"\xff" + data[41:]]):
        broken.write_bytes(damaged)
        (tmp_path / str(number)).mkdir()
        with pytest.raises(PqkError, match=r"broken\.7z: the archive is damaged"):
            unpack(broken, tmp_path / str(number))
    with py7zr.SevenZipFile(broken, "w", filters=[{"id": py7zr.FILTER_COPY}]) as archive:
        archive.write(tmp_path / "file", "s/file")
    broken.write_bytes(broken.read_bytes().replace(bytes(range(256)), bytes(256), 1))
    (tmp_path / "last").mkdir()
    with pytest.raises(PqkError, match="the checksum of s/file is wrong"):
        unpack(broken, tmp_path / "last")
