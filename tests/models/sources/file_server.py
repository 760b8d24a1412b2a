"""A real HTTP server on loopback that serves files as well, or as badly, as a test says."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Served:
    """`refusals`: statuses of the next answers. `cuts`: after how many bytes the next answers break off. `stall_after`: then wait for
    `go_on`. `announced`: a false Content-Length; -1: none at all, chunked."""

    body: bytes = b""
    etag: str = '"one"'
    refusals: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    redirect: str = ""
    knows_ranges: bool = True
    announced: int = 0
    encoding: str = ""
    stall_after: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)


class FileServer:
    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FileServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        self.owner.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        served = self.owner.files.get(self.path)
        if served is None or served.refusals:
            status = served.refusals.pop(0) if served else 404
            self._head(status, {"Content-Length": "0", "Retry-After": "0"})
        elif served.redirect:
            self._head(302, {"Content-Length": "0", "Location": served.redirect})
        else:
            self._serve(served)

    def _serve(self, served: Served) -> None:
        first = self._first_byte(served)
        headers = {"Content-Length": str(served.announced or len(served.body) - first)}
        if served.etag:
            headers["ETag"] = served.etag
        if served.encoding:
            headers["Content-Encoding"] = served.encoding
        if served.announced < 0:
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(served.body) - 1}/{len(served.body)}"
        self._head(206 if first else 200, headers)
        data = served.body[first:]
        if served.cuts:
            data = data[: served.cuts.pop(0)]
        if served.announced < 0:
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
            return
        if served.stall_after:
            self.wfile.write(data[: served.stall_after])
            self.wfile.flush()
            served.go_on.wait(30.0)
            data = data[served.stall_after :]
        self.wfile.write(data)

    def _first_byte(self, served: Served) -> int:
        wanted = self.headers.get("Range", "")
        is_same = self.headers.get("If-Range", served.etag) == served.etag
        return int(wanted[len("bytes=") : -1]) if wanted and is_same and served.knows_ranges else 0

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is what some tests are about."""


@contextmanager
def file_server(certificate: Path | None = None) -> Iterator[FileServer]:
    """A server on a free port of loopback; with a PEM file of key and certificate it speaks TLS."""
    handler = type("Handler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as server:
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            scheme = "https"
        owner = FileServer(f"{scheme}://localhost:{server.server_address[1]}")
        handler.owner = owner  # type: ignore[attr-defined]  # a class made for this server alone
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield owner
        finally:
            for served in owner.files.values():
                served.go_on.set()
            server.shutdown()
            thread.join()
