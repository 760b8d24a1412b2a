"""`hf:owner/repository@revision/path` — a file of a model hub, by its resolve URL.

HF_ENDPOINT names another hub of the same interface (default https://huggingface.co). A token is sent to that host only, taken from
HF_TOKEN or the file HF_TOKEN_PATH, and never over plain http except on this machine. `main` as a revision moves: pin a commit or sha256.
"""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import Mapping

from models.engine_record import is_inside
from models.sources.errors import SourceError
from models.sources.http import Request

ENDPOINT = "https://huggingface.co"
LOCATION = re.compile(r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([\w.-]+)/(.+)$", re.ASCII)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TOKEN_CHARACTERS_MAX = 4096


def request_of(location: str, size_bytes: int, environment: Mapping[str, str]) -> Request:
    """The download of a hub's file. Raises SourceError for a malformed location or endpoint."""
    match = LOCATION.match(location)
    if match is None or not is_inside(match.group(3)):
        raise SourceError(f"hf:{location} is not hf:owner/repository@revision/path")
    repository, revision, path = match.groups()
    endpoint = (environment.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise SourceError(f"HF_ENDPOINT {endpoint!r} is no http(s) URL")
    url = f"{endpoint}/{repository}/resolve/{urllib.parse.quote(revision, safe='')}/{urllib.parse.quote(path)}"
    token = _token(environment) if parts.scheme == "https" or parts.hostname in LOOPBACK else ""
    return Request(url, size_bytes, (("Authorization", f"Bearer {token}"),) if token else ())


def _token(environment: Mapping[str, str]) -> str:
    token = environment.get("HF_TOKEN", "")
    path = environment.get("HF_TOKEN_PATH", "")
    if not token and path:
        try:
            with Path(path).open(encoding="utf-8") as stream:
                token = stream.read(TOKEN_CHARACTERS_MAX)
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"HF_TOKEN_PATH {path} cannot be read: {type(error).__name__}; remove the variable or the cause") from error
    token = token.strip()
    if not token.isascii() or not token.isprintable():
        raise SourceError("the token of HF_TOKEN or HF_TOKEN_PATH holds characters that no header may; set it anew")
    return token
