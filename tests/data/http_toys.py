"""A web server in a thread whose files, cuts and lies a test sets."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server says. cuts: after how many bytes of a body the connection ends, one answer each, then none."""

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str = '"one"'
    modified: str = ""
    ranges: bool = True
    check: bool = True  # whether If-Range is looked at
    declared: int | None = None  # in place of the length
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the next answers, in place of a file
    redirects: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range of every request


@contextlib.contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serves a site at 127.0.0.1 and a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.asked.append((self.path, wanted))
            self.close_connection = True
            if site.statuses:
                self._say(site.statuses.pop(0), b"")
            elif self.path in site.redirects:
                self._say(302, b"", {"Location": site.redirects[self.path]})
            elif self.path not in site.files:
                self._say(404, b"not here")
            else:
                self._file(site.files[self.path], wanted)

        def _file(self, content: bytes, wanted: str | None) -> None:
            same = not site.check or self.headers.get("If-Range") in (site.etag, site.modified)
            length = len(content) if site.declared is None else site.declared
            if wanted and site.ranges and same:
                first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
                if first >= len(content):
                    self._say(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                else:
                    about = {"Content-Range": f"bytes {first}-{length - 1}/{length}"}
                    self._say(206, content[first:], about, length - first)
            else:
                self._say(200, content, {}, length)

        def _say(
            self, status: int, body: bytes, about: dict[str, str] | None = None, length: int | None = None
        ) -> None:
            self.send_response(status)
            found = {**site.headers, **(about or {}), "Content-Length": str(len(body) if length is None else length)}
            if status in (200, 206):
                found |= {"ETag": site.etag} if site.etag else {}
                found |= {"Last-Modified": site.modified} if site.modified else {}
            for name, value in found.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if status in (200, 206) and site.cuts:
                body = body[: site.cuts.pop(0)]
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Stays silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
