"""Downloads a file over HTTP, `download`: resumes, compares sizes, and leaves either the whole file or a `.part`.

`FILE.part` holds what has come so far, `FILE.http.json` what the server said of the file: its address, its length and
the validators (RFC 9110, section 8.8) that tell whether it is still the same. A resumed request asks for the rest with
`Range`, and with `If-Range` (RFC 9110, sections 14.2 and 13.1.5), so that a server answers with the whole file where it
has changed. Without a strong ETag or a Last-Modified nothing says that it is the same, and the file is fetched anew.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from pqk import __version__
from pqk.errors import PqkError
from pqk.files import clear_write_errors, fsync_folder, sha256_file, write_json
from pqk.oserrors import printable

BLOCK = 1 << 20
MOST_BYTES = 64 * 2**30
"""A file of more is refused."""
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""Answers after which it is worth to ask again."""
_TROUBLE = (OSError, http.client.HTTPException)  # a connection that fails; URLError and timeouts are OSErrors
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class WrongLength(PqkError):
    """Error for a server that says two things about the length of a file. Exit code 2."""


class Cut(PqkError):
    """Error for a connection that broke too often; the next call goes on from there. Exit code 2."""


class _Afresh(Exception):
    """What came so far is of no use, and was removed."""


@dataclass(frozen=True)
class Remote:
    """What a server says of a file. etag: only a strong one; modified: its Last-Modified; both may be ''."""

    url: str
    length: int
    etag: str = ""
    modified: str = ""

    @property
    def validator(self) -> str:
        """Returns what tells that the file is still the same; '' when nothing does."""
        return self.etag or self.modified

    def same_as(self, other: Remote) -> bool:
        """Whether both may be the same file: no validator that both have differs."""
        pairs = (self.etag, other.etag), (self.modified, other.modified)
        return all(mine == theirs for mine, theirs in pairs if mine and theirs)


@dataclass(frozen=True)
class Fetched:
    """A file that is there as a whole. resumed: bytes that an earlier call, or an earlier try, had brought."""

    path: Path
    remote: Remote
    sha256: str
    resumed: int


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for. timeout: seconds without a byte; tries: in a row that bring nothing new; pause:
    seconds before the second try, doubled before each further one."""

    timeout: float = 30.0
    tries: int = 4
    pause: float = 1.0


Say = Callable[[int, int], None]
"""Gets the bytes that are there, and the bytes of the whole file."""


def download(
    url: str,
    target: Path,
    say: Say = lambda done, whole: None,
    patience: Patience = Patience(),
    most: int = MOST_BYTES,
) -> Fetched:
    """Downloads `url` to the file `target`, or what is left of it after an earlier call.

    A `target` that an earlier call of this address left whole is taken as it is; another one is replaced.
    Raises Cut when the connection fails too often, WrongLength when more or fewer bytes come than the server declares,
    and PqkError for an address that is not http or https, an answer such as 404, a redirect to another scheme, an
    answer without a length or with one above `most`, and a disk that is full.
    """
    part, about = target.with_name(f"{target.name}.part"), about_file(target)
    _check_address(url)
    with clear_write_errors(part):
        target.parent.mkdir(parents=True, exist_ok=True)
        before = _read_about(about)
        if before is not None and before.url == url and target.exists() and target.stat().st_size == before.length:
            return Fetched(target, before, sha256_file(target), before.length)
        run = _Download(url, part, about, say, patience, most)
        remote = run.whole()
        with part.open("rb") as whole:
            os.fsync(whole.fileno())
        part.replace(target)
        fsync_folder(target.parent)
    return Fetched(target, remote, sha256_file(target), run.resumed)


def about_file(target: Path) -> Path:
    """Returns the file that says where `target`, or its beginning, comes from."""
    return target.with_name(f"{target.name}.http.json")


def _read_about(path: Path) -> Remote | None:
    """Returns what a server said of a file; None when that is not there, or damaged."""
    try:
        found = Remote(**json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    texts = all(isinstance(text, str) for text in (found.url, found.etag, found.modified))
    return found if texts and isinstance(found.length, int) else None


class _Download:
    """One call of `download`: asks until the part is whole."""

    def __init__(self, url: str, part: Path, about: Path, say: Say, patience: Patience, most: int) -> None:
        self.url, self.part, self.about, self.say, self.patience, self.most = url, part, about, say, patience, most
        self.resumed = 0
        self.opener = _opener()

    def whole(self) -> Remote:
        """Returns what the server said of the file, once `part` holds all of it."""
        failed = 0
        while True:
            before = self._there()
            try:
                remote = self._ask()
            except urllib.error.HTTPError as error:
                if error.code not in _AGAIN:
                    raise PqkError(f"{self.url}: the server answers {error.code} {error.reason}") from error
                trouble = f"the server answers {error.code} {error.reason}"
            except _Afresh as error:
                trouble = str(error)
            except _TROUBLE as error:
                if isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_THE_DISK):
                    raise
                if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                    raise PqkError(f"{self.url}: the certificate of the server is not trusted: {error}") from error
                trouble = str(getattr(error, "reason", error)) or type(error).__name__
            else:
                if self._there() == remote.length:
                    return remote
                trouble = f"the connection ended after {self._there()} of {remote.length} bytes"
            failed = 1 if self._there() > before else failed + 1
            if failed >= self.patience.tries:
                kept = "" if self._known() is None else "; the same command goes on from there"
                raise Cut(f"{self.url}: {trouble} ({failed} tries in a row brought nothing new){kept}")
            time.sleep(self.patience.pause * 2 ** (failed - 1))

    def _there(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _ask(self) -> Remote:
        """Sends one request and writes what comes; returns what the server says of the file."""
        known = self._known()
        have = self._there() if known else 0
        headers = {"User-Agent": f"pqk/{__version__}", "Accept-Encoding": "identity"}
        if known is not None and have:
            headers |= {"Range": f"bytes={have}-", "If-Range": known.validator}
        request = urllib.request.Request(self.url, headers=headers)
        try:
            answer = self.opener.open(request, timeout=self.patience.timeout)
        except urllib.error.HTTPError as error:
            if error.code != 416 or known is None:
                raise
            return self._past_the_end(known, have, error.headers)
        with answer:
            found = self._described(answer, have)
            if answer.status == 206 and known is not None:
                if not found.same_as(known):  # no server may send a part of another file
                    raise self._afresh("the file changed on the server while it was fetched")
                if found.length != known.length:
                    raise self._contradiction(known, found.length)
                found = known
                self.resumed = self.resumed or have
            else:  # the whole file: the first request, a file that changed, or a server without ranges
                have = 0
            if found.length - have > shutil.disk_usage(self.part.parent).free:
                raise PqkError(f"{self.url}: {found.length - have} bytes are to come, and the disk has less room")
            write_json(self.about, asdict(found))
            with self.part.open("ab" if have else "wb") as part:
                self._copy(answer, part, have, found)
        return found

    def _known(self) -> Remote | None:
        """Returns what the server said of the file that `part` begins; None where nothing can be resumed."""
        known = _read_about(self.about)
        usable = known is not None and known.url == self.url and known.validator
        return known if usable and known is not None and 0 < self._there() <= known.length else None

    def _past_the_end(self, known: Remote, have: int, headers: Message) -> Remote:
        """Handles answer 416, nothing comes after `have`: the part is whole, or the server declared another length."""
        says = re.fullmatch(r"bytes \*/(\d+)", headers.get("Content-Range") or "")
        if have == known.length and (says is None or int(says[1]) == have):
            return known
        if says is None:
            raise self._afresh("the server refuses to send the rest of the file")
        raise self._contradiction(known, int(says[1]))

    def _contradiction(self, known: Remote, now: int) -> WrongLength:
        self._forget()
        return WrongLength(f"{self.url}: the server declared {known.length} bytes, and now says {now} for this file")

    def _afresh(self, why: str) -> _Afresh:
        self._forget()
        return _Afresh(why)

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)

    def _described(self, answer: Any, have: int) -> Remote:
        """Returns what an answer says of the file. Raises PqkError for one that is no plain file of a known length."""
        headers = answer.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise PqkError(f"{self.url}: the server sends it as {headers['Content-Encoding']}, which was not asked for")
        if answer.status == 206:
            spans = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range") or "")
            if not have or spans is None or int(spans[1]) != have or int(spans[2]) + 1 != int(spans[3]):
                raise self._afresh(f"the server sends another part than asked for ({headers.get('Content-Range')})")
            length = int(spans[3])
        elif answer.status == 200 and (headers.get("Content-Length") or "").isdigit():
            length = int(headers["Content-Length"])
        else:
            raise PqkError(f"{self.url}: the server does not say how many bytes the file has (status {answer.status})")
        if length > self.most:
            raise PqkError(f"{self.url}: {length} bytes are more than the {self.most} that are allowed")
        etag = headers.get("ETag") or ""
        return Remote(self.url, length, "" if etag.startswith("W/") else etag, headers.get("Last-Modified") or "")

    def _copy(self, answer: http.client.HTTPResponse, part: IO[bytes], have: int, found: Remote) -> None:
        """Appends the body to `part`. Raises WrongLength when more comes than was declared."""
        if answer.length is not None:
            answer.length += 1  # http.client would stop at the declared length, and never see what is too much
        while True:
            try:
                block = answer.read1(BLOCK)
            except (http.client.IncompleteRead, ConnectionError):
                break
            except TimeoutError:
                if have < found.length:
                    raise
                break  # a server that keeps the connection open
            if not block:
                break
            if have + len(block) > found.length:
                self._forget()
                raise WrongLength(f"{self.url}: the server declared {found.length} bytes and sends more")
            part.write(block)
            have += len(block)
            self.say(have, found.length)


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", url)
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise PqkError(f"{printable(url)}: only addresses that begin with http:// or https:// are fetched")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        begins = urlsplit(newurl).scheme
        if begins not in ("http", "https") or (req.type == "https" and begins == "http"):
            raise PqkError(f"{req.full_url}: the server redirects to {printable(newurl)}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Returns what opens http and https alone; urllib's own opener takes file:, ftp: and data: too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


class Progress:
    """Writes how far a download is to a stream: in place on a terminal, else a line every half minute."""

    def __init__(self, name: str, stream: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.stream, self.clock = name, sys.stderr if stream is None else stream, clock
        self.live = bool(getattr(self.stream, "isatty", lambda: False)())
        self.began = self.last = clock()
        self.first: int | None = None

    def __call__(self, done: int, whole: int) -> None:
        now = self.clock()
        self.first = done if self.first is None else min(self.first, done)
        if done < whole and now - self.last < (0.5 if self.live else 30.0):
            return
        self.last = now
        rate = (done - self.first) / max(now - self.began, 1e-3) / 1e6
        line = f"{self.name}: {done / 1e6:.1f} of {whole / 1e6:.1f} MB, {rate:.1f} MB/s"
        end = "" if self.live and done < whole else "\n"
        with suppress(OSError):
            self.stream.write(f"\r{line:<78}{end}" if self.live else f"{line}\n")
            self.stream.flush()
