"""Unpacks archives that nobody here made, `unpack`: zip, and 7z where py7zr is installed, under one set of checks.

Before a byte is written every member is looked at: its name stays inside the folder whatever the system, it is a plain
file or a folder (no link, no device), no two have one name, and number, sizes and the ratio of unpacked to packed bytes
are within `Limits`. While it is written, a member may hold exactly as many bytes as the archive declares. Times, owners
and rights in the archive are left out.
"""

from __future__ import annotations

import errno
import lzma
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, Protocol

from pqk.data.scenes.names import folded, stays_inside
from pqk.errors import NotBuilt, PqkError, first_line
from pqk.files import check_readable, clear_write_errors

SEVEN_ZIP, ZIP = b"7z\xbc\xaf\x27\x1c", (b"PK\x03\x04", b"PK\x05\x06")
"""How archives of the two kinds begin."""
_COPIED = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What an archive may hold. members: files and folders; total: bytes of all files; ratio: these over the bytes of
    the archive, counted from the first 10 MB on."""

    members: int = 20_000
    total: int = 64 * 2**30
    ratio: float = 200.0


@dataclass(frozen=True)
class Member:
    """A file or folder of an archive, as the archive declares it. kind: 'file', 'folder', or what else it is."""

    name: str
    size: int
    kind: Literal["file", "folder", "link", "device"]


class Archive(Protocol):
    """An open archive."""

    def members(self) -> Sequence[Member]: ...

    def extract(self, sink: Callable[[str], Sink]) -> None:
        """Writes the content of every file to the sink of its name."""
        ...


class Sink:
    """Takes the bytes of one member, and refuses more than it may have."""

    def __init__(self, archive: Path, member: Member, path: Path) -> None:
        self.archive, self.member, self.path, self.written = archive, member, path, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] | None = path.open("xb")
        if not member.size:
            self.close()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self.written += len(data)
        if self.written > self.member.size:
            self.close()
            raise PqkError(f"{self.archive}: {self.member.name} holds more than the {self.member.size} bytes declared")
        if self._file is not None:
            self._file.write(data)
            if self.written == self.member.size:
                self.close()  # at once: an archive may have more files than a process may hold open
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def unpack(
    archive: Path,
    folder: Path,
    inside: str | None = None,
    limits: Limits = Limits(),
) -> list[Path]:
    """Unpacks an archive into an empty folder and returns its files, as paths relative to that.

    inside: the name of the one folder that must hold all of it. What a failure leaves in `folder` is the caller's to
    remove (`pqk.files.whole_folder` does). Raises PqkError for what the checks of this module refuse and for a damaged
    archive, and NotBuilt (exit code 3) for a 7z archive where py7zr is missing.
    """
    check_readable(archive)
    with _opened(archive) as opened, clear_write_errors(folder):
        members = list(opened.members())
        check(archive, members, inside, limits)
        files = {member.name: member for member in members if member.kind == "file"}
        sinks: dict[str, Sink] = {}

        def sink(name: str) -> Sink:
            if name not in files or name in sinks:
                raise PqkError(f"{archive}: {name!r} is no file that its table names once")
            sinks[name] = Sink(archive, files[name], folder / name)
            return sinks[name]

        try:
            for member in members:
                if member.kind == "folder":
                    (folder / member.name).mkdir(parents=True, exist_ok=True)
            opened.extract(sink)
        finally:
            for each in sinks.values():
                each.close()
        for name, member in files.items():
            written = sinks[name].written if name in sinks else 0
            if name not in sinks and not member.size:
                sink(name)  # an empty file
            elif written != member.size:
                raise PqkError(f"{archive}: {name} holds {written} of the {member.size} bytes declared")
    return [Path(name) for name in files]


def check(archive: Path, members: Sequence[Member], inside: str | None, limits: Limits) -> None:
    """Raises PqkError for the first member, or sum of them, that may not be unpacked."""
    if len(members) > limits.members:
        raise PqkError(f"{archive}: it has {len(members)} members, at most {limits.members} are allowed")
    seen: dict[str, str] = {}
    files = set()
    for member in members:
        name = member.name
        if not _stays(name):
            raise PqkError(f"{archive}: the name {name!r} would leave the folder it is unpacked into, or is malformed")
        if member.kind not in ("file", "folder"):
            raise PqkError(f"{archive}: {name} is a {member.kind}; only files and folders are unpacked")
        key = folded(name).rstrip("/")
        if key in seen and not (member.kind == "folder" and key not in files):
            raise PqkError(f"{archive}: two members have the name {name!r}, or names that some systems take for one")
        seen[key] = name
        if member.kind == "file":
            files.add(key)
        if inside is not None and PurePosixPath(name).parts[0] != inside:
            raise PqkError(f"{archive}: {name} does not lie in the folder {inside}, which all of it should")
        if member.size < 0:
            raise PqkError(f"{archive}: {name} declares a size of {member.size} bytes")
    if not files:
        raise PqkError(f"{archive}: it holds no file")
    for key, name in seen.items():
        if any(str(parent) in files for parent in PurePosixPath(key).parents):
            raise PqkError(f"{archive}: {name} lies in something that is a file")
    total, packed = sum(member.size for member in members), archive.stat().st_size
    if total > limits.total:
        raise PqkError(f"{archive}: it unpacks to {total} bytes, at most {limits.total} are allowed")
    if total > limits.ratio * max(packed, 10_000_000 / limits.ratio):
        raise PqkError(
            f"{archive}: {packed} bytes unpack to {total}, more than {limits.ratio:g} times as many; pictures do not"
        )


def _stays(name: str) -> bool:
    """Whether a name means the same place inside a folder on every system."""
    plain = stays_inside(name) and not set(name) & {"\\", ":"}
    return plain and name.isprintable() and PurePosixPath(name).as_posix() == name.rstrip("/")


@contextmanager
def _opened(archive: Path) -> Iterator[Archive]:
    """Opens an archive by how it begins; what a library says of a damaged one becomes a PqkError."""
    with archive.open("rb") as stream:
        begins = stream.read(len(SEVEN_ZIP))
    if begins == SEVEN_ZIP:
        with _open_7z(archive) as opened:
            yield opened
    elif begins[:4] in ZIP:
        with _open_zip(archive) as opened:
            yield opened
    else:
        raise PqkError(f"{archive}: neither a zip nor a 7z archive, by how it begins")


@contextmanager
def _open_zip(archive: Path) -> Iterator[Archive]:
    try:
        with zipfile.ZipFile(archive) as opened:
            yield _Zip(archive, opened)
    # zipfile says NotImplementedError of a member that is packed in a way it does not know
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError) as error:
        raise _damaged(archive, error) from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # of bz2, and of a seek to nowhere
            raise _damaged(archive, error) from error
        raise


def _damaged(archive: Path, error: Exception) -> PqkError:
    return PqkError(f"{archive}: the archive is damaged, or packed in a way not known here ({first_line(error)})")


class _Zip:
    def __init__(self, path: Path, opened: zipfile.ZipFile) -> None:
        self.path, self.opened = path, opened

    def members(self) -> list[Member]:
        return [self._member(info) for info in self.opened.infolist()]

    def _member(self, info: zipfile.ZipInfo) -> Member:
        if info.flag_bits & 1:
            raise PqkError(f"{self.path}: {info.filename} is encrypted")
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where no Unix program packed it
        if kind == stat.S_IFLNK:
            return Member(info.filename, info.file_size, "link")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            return Member(info.filename, info.file_size, "device")
        folder = info.filename.endswith("/") or kind == stat.S_IFDIR  # is_dir() ends in an error for an empty name
        return Member(info.filename, 0 if folder else info.file_size, "folder" if folder else "file")

    def extract(self, sink: Callable[[str], Sink]) -> None:
        for info in self.opened.infolist():
            if self._member(info).kind == "file":
                with self.opened.open(info) as packed:
                    out = sink(info.filename)
                    while block := packed.read(_COPIED):
                        out.write(block)


def check_7z() -> None:
    """Raises NotBuilt (exit code 3) where 7z archives cannot be unpacked."""
    _py7zr()


def _py7zr() -> Any:
    try:
        import py7zr
    except ImportError as error:
        raise NotBuilt(
            "7z archives are unpacked with py7zr, which is not installed: pip install py7zr, or pqk's extra 'eth3d'"
        ) from error
    return py7zr


@contextmanager
def _open_7z(archive: Path) -> Iterator[Archive]:
    py7zr = _py7zr()
    try:
        with py7zr.SevenZipFile(archive, "r") as opened:
            yield _SevenZip(archive, py7zr, opened)
    except (PqkError, OSError, MemoryError):
        raise
    except py7zr.exceptions.CrcError as error:
        raise PqkError(f"{archive}: the archive is damaged: the checksum of {error.args[2]} is wrong") from error
    except Exception as error:  # lzma's, struct's and a dozen of the library's own
        raise _damaged(archive, error) from error


class _SevenZip:
    """A 7z archive through py7zr 1.0 or newer, which hands the bytes of each member to a writer that it asks for."""

    def __init__(self, path: Path, library: Any, opened: Any) -> None:
        self.path, self.library, self.opened = path, library, opened

    def members(self) -> list[Member]:
        if self.opened.needs_password():
            raise PqkError(f"{self.path}: it is encrypted")
        return [self._member(entry) for entry in self.opened.files]

    @staticmethod
    def _member(entry: Any) -> Member:
        if entry.is_symlink or entry.is_junction:
            return Member(entry.filename, 0, "link")
        if entry.is_socket or entry.st_fmt not in (None, 0, stat.S_IFREG, stat.S_IFDIR):
            return Member(entry.filename, 0, "device")
        if entry.is_directory:
            return Member(entry.filename, 0, "folder")
        return Member(entry.filename, int(entry.uncompressed or 0), "file")

    def extract(self, sink: Callable[[str], Sink]) -> None:
        known = {member.name for member in self.members()}
        library = self.library

        class Writer(library.io.Py7zIO):  # type: ignore[name-defined]
            def __init__(self, out: Sink) -> None:
                self.out = out

            def write(self, s: bytes | bytearray) -> int:
                return self.out.write(s)

            def read(self, size: int | None = None) -> bytes:
                return b""

            def seek(self, offset: int, whence: int = 0) -> int:
                return 0

            def flush(self) -> None:
                return None

            def size(self) -> int:
                return self.out.written

        class Factory(library.io.WriterFactory):  # type: ignore[name-defined]
            def create(self, filename: str) -> Writer:
                # The library may put the working directory in front of a name.
                name = filename.replace("\\", "/")
                ends = [name[k:] for k in (0, *(m.end() for m in re.finditer("/", name))) if name[k:] in known]
                return Writer(sink(ends[0] if ends else filename))

        self.opened.extractall(factory=Factory())
