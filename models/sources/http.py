"""Download one file over HTTP(S): resumed after any kind of death, bounded in size, time and tries.

A resumption asks with Range and If-Range, so bytes of two versions are never joined; a server without validators starts over.
Proxies and certificates come from the environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE).
"""

from __future__ import annotations

import errno
import http.client
import logging
import os
import random
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, replace
from email.message import Message
from pathlib import Path
from typing import IO, Any, BinaryIO, Callable, Tuple

from models.durable import NoSpace
from models.sources.errors import NotThere, SourceError
from models.sources.partial import Partial, drop_partial, file_bytes, read_partial, write_partial

log = logging.getLogger(__name__)

READ_TIMEOUT_S = 30.0
TRIES = 5
BACKOFF_S = 1.0
BACKOFF_CAP_S = 30.0
CHUNK_BYTES = 256 << 10
SYNC_EVERY_BYTES = 8 << 20
FILE_BYTES_MAX = 64 << 30
RETRIED_STATUS = frozenset({408, 416, 425, 429, 500, 502, 503, 504})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
LOCAL = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG, errno.EMFILE})
CONTENT_RANGE = re.compile(r"^bytes (\d+)-(\d+)/(\d+)$")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """One download. `headers` go to the host of `url` only, never along with a redirect elsewhere. `size_bytes` 0: not known."""

    url: str
    size_bytes: int = 0
    headers: Tuple[Tuple[str, str], ...] = ()
    tries: int = TRIES
    backoff_s: float = BACKOFF_S
    read_timeout_s: float = READ_TIMEOUT_S


@dataclass(frozen=True)
class Extent:
    """What a response brings: from `begin` on, of `total` bytes (0: the server does not say)."""

    begin: int
    total: int


class _Interrupted(Exception):
    """The connection or the server failed in a way that another try may not."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but never from https to anything else; headers of the request stay with its first host."""

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if new.scheme != "https" and not (old.scheme == new.scheme == "http"):
            raise SourceError(f"{plain_url(req.full_url)} redirects to {new.scheme}://{new.hostname}, which is not https: refused")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            for name, value in req.unredirected_hdrs.items():
                if name != "Host":
                    request.add_unredirected_header(name, value)
        return request


def plain_url(url: str) -> str:
    """A URL for people and logs: without user, password, query (signed links carry secrets there) and fragment."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def download(request: Request, target: Path, require_space: Callable[[int], None], progress: Progress) -> None:
    """Fetch into `target`, going on where an earlier process stopped; blocks. `require_space(bytes)` is asked before bytes are written.

    The caller ends it with `drop_partial(target)` once the bytes are adopted or found wrong: until then a crash costs nothing.
    Raises NotThere (404, 410), NoSpace, SourceError; what has been fetched is kept for the next call unless it is of no more use.
    """
    failures = 0
    while True:
        start_bytes = file_bytes(target)
        try:
            _attempt(request, target, require_space, progress)
            return
        except _Interrupted as interruption:
            has_advanced = file_bytes(target) - start_bytes >= SYNC_EVERY_BYTES
            failures = 1 if has_advanced else failures + 1
            if failures >= request.tries:
                reason = f"{plain_url(request.url)}: {interruption}; gave up after {failures} tries"
                remedy = "try again later, or set HOTSPARE_MIRROR if this device has no way there"
                raise SourceError(f"{reason}, {file_bytes(target)} bytes are kept; {remedy}") from interruption
            log.debug("download of %s interrupted: %s", plain_url(request.url), interruption)
            pause_s = random.uniform(0.0, min(BACKOFF_CAP_S, request.backoff_s * 2**failures))
            time.sleep(max(pause_s, min(interruption.retry_after_s, BACKOFF_CAP_S)))


def _attempt(request: Request, target: Path, require_space: Callable[[int], None], progress: Progress) -> None:
    partial = read_partial(target, request.url)
    if partial.is_complete:
        progress(partial.durable_bytes, partial.total_bytes)
        return
    query = urllib.request.Request(request.url, headers={"Accept-Encoding": "identity", "User-Agent": "hotspare"})
    if partial.durable_bytes:
        query.add_header("Range", f"bytes={partial.durable_bytes}-")
        query.add_header("If-Range", partial.validator)
    for name, value in request.headers:
        query.add_unredirected_header(name, value)
    opener = urllib.request.build_opener(_Redirects())
    try:
        with opener.open(query, timeout=request.read_timeout_s) as response:
            _receive(response, request, partial, target, require_space, progress)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:
                drop_partial(target)
            raise _refusal(error, request.url) from error
    except http.client.HTTPException as error:
        raise _Interrupted(str(error) or type(error).__name__) from error
    except OSError as error:
        raise _failure(error, request.url, target) from error


def _refusal(error: urllib.error.HTTPError, url: str) -> Exception:
    answer = f"{plain_url(url)} answered {error.code} {error.reason}"
    if error.code in RETRIED_STATUS:
        retry_after = error.headers.get("Retry-After", "")
        return _Interrupted(f"answered {error.code} {error.reason}", float(retry_after) if retry_after.isdigit() else 0.0)
    if error.code in (404, 410):
        return NotThere(answer)
    if error.code in (401, 403):
        return SourceError(f"{answer}: it wants an account; for a model hub accept the licence there and set HF_TOKEN or HF_TOKEN_PATH")
    return SourceError(answer)


def _failure(error: OSError, url: str, target: Path) -> Exception:
    """An error of the disk ends the fetch, one of the network may pass."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return SourceError(f"{plain_url(url)}: {reason}; check the clock of this device and its certificates (SSL_CERT_FILE)")
    if error.errno in FULL:
        return NoSpace(f"{target.parent} is full while fetching {plain_url(url)}; make room (`hotspare models rm NAME`) and pull again")
    if error.errno in LOCAL:
        return SourceError(f"cannot write {target}: {error.strerror}")
    return _Interrupted(str(reason) or type(error).__name__)


def _receive(
    response: http.client.HTTPResponse,
    request: Request,
    partial: Partial,
    target: Path,
    require_space: Callable[[int], None],
    progress: Progress,
) -> None:
    """Append (206) or write anew (200) the body. At most the announced bytes are written."""
    extent = _extent(response, request, partial)
    total = extent.total or request.size_bytes
    if request.size_bytes and total != request.size_bytes:
        drop_partial(target)
        raise SourceError(
            f"{plain_url(request.url)} has {total} bytes, but the manifest says {request.size_bytes}: "
            "it is another file than the one the manifest was written for"
        )
    if total > FILE_BYTES_MAX:
        raise SourceError(f"{plain_url(request.url)} announces {total} bytes; more than {FILE_BYTES_MAX} are never fetched")
    require_space(total - extent.begin)
    if extent.begin == 0:
        drop_partial(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    state = Partial(request.url, _validator(response.headers), extent.begin, total)
    with target.open("r+b" if extent.begin else "wb") as stream:
        stream.truncate(extent.begin)
        stream.seek(extent.begin)
        try:
            done = _copy(response, stream, state, target, progress)
        finally:
            _make_durable(stream, state, target, stream.tell())
    if total and done < total:
        raise _Interrupted(f"the connection ended after {done} of {total} bytes")


def _copy(response: http.client.HTTPResponse, stream: BinaryIO, state: Partial, target: Path, progress: Progress) -> int:
    done = durable = state.durable_bytes
    limit = state.total_bytes or FILE_BYTES_MAX
    progress(done, state.total_bytes)
    while True:
        chunk = response.read1(CHUNK_BYTES)
        if not chunk:
            return done
        if done + len(chunk) > limit:
            raise SourceError(f"{plain_url(state.url)} sends more than {limit} bytes: refused")
        stream.write(chunk)
        done += len(chunk)
        if done - durable >= SYNC_EVERY_BYTES:
            _make_durable(stream, state, target, done)
            durable = done
        progress(done, state.total_bytes)


def _make_durable(stream: BinaryIO, state: Partial, target: Path, durable_bytes: int) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    if state.validator:
        write_partial(target, replace(state, durable_bytes=durable_bytes))


def _extent(response: http.client.HTTPResponse, request: Request, partial: Partial) -> Extent:
    """Raises SourceError for an answer that is not (the rest of) the file as it is."""
    headers, url = response.headers, plain_url(request.url)
    if headers.get("Content-Encoding", "identity") != "identity":
        raise SourceError(f"{url} answers with {headers['Content-Encoding']} encoding, which was not asked for")
    if response.status == 206:
        match = CONTENT_RANGE.match(headers.get("Content-Range", ""))
        if match is None or not 0 < int(match.group(1)) == partial.durable_bytes:
            raise SourceError(f"{url} answers with a range that was not asked for: {headers.get('Content-Range')!r}")
        return Extent(partial.durable_bytes, int(match.group(3)))
    if response.status != 200:
        raise SourceError(f"{url} answered {response.status}, which is no file")
    length = headers.get("Content-Length", "")
    return Extent(0, int(length) if length.isdigit() else 0)


def _validator(headers: Message) -> str:
    """What If-Range may carry: a strong entity tag, or else the date of the last change."""
    tag = str(headers.get("ETag", ""))
    return tag if tag and not tag.startswith("W/") else str(headers.get("Last-Modified", ""))
