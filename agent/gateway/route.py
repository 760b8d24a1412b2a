"""Where a request goes, and how it looks when it goes to the primary. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from starlette.types import Scope

from agent.gateway.forward import Asked, headers_to_send
from agent.http.paths import PREFIXES

# A path is joined to the primary's URL: plain characters, and no way up.
PATH = re.compile(r"^/(?!.*/\.{1,2}(/|$))[A-Za-z0-9._~:@!$&'()*+,;=/-]*$")
# The field that every answer of an endpoint has.
ANSWERED = {
    prefix + path: key
    for prefix in PREFIXES
    for path, key in (("/chat/completions", "choices"), ("/completions", "choices"), ("/responses", "output"), ("/embeddings", "data"))
}
OURS = ("/batch", "/classify", "/detect", "/rerank", "/models", "/files", "/batches")
OURS_EXACTLY = frozenset(prefix + path for prefix in PREFIXES for path in OURS)
OURS_BELOW = tuple(f"{prefix}{path}/" for prefix in PREFIXES for path in ("/models", "/files", "/batches"))
PASSED = ("/v1/", "/beta/", "/anthropic/", "/user/")


def destination(method: str, path: str) -> Literal["answered", "passed", "here"]:
    """`answered` by the primary or by this node, `passed` on to the primary or nowhere, or `here` whatever the primary does."""
    if method == "POST" and path in ANSWERED:
        return "answered"
    is_ours = path in OURS_EXACTLY or path.startswith(OURS_BELOW)
    return "passed" if path.startswith(PASSED) and not is_ours and PATH.match(path) else "here"


def fields_of(body: bytes) -> Mapping[str, Any]:
    """The JSON object of a body; empty for anything else, which this node's own checks refuse in words."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def to_primary(scope: Scope, body: bytes, fields: Mapping[str, Any], key: str, rename: Mapping[str, str]) -> Asked:
    """The request as it goes out: untouched, but for the headers of the connection and a model that the primary knows by another name."""
    name = rename.get(str(fields.get("model", "")))
    if name:
        body = json.dumps({**fields, "model": name}).encode()
    query = scope.get("query_string", b"").decode("latin-1")
    return Asked(scope["method"], scope["path"], query, headers_to_send(scope["headers"], key), body, fields)


def to_client(fields: Mapping[str, Any], rename: Mapping[str, str]) -> Callable[[bytes], bytes]:
    """Bytes of an answer with the model's name as the client knows it; untouched where the primary knows it so too."""
    name = str(fields.get("model", ""))
    if name not in rename:
        return lambda data: data
    pattern = re.compile(rb'("model"\s*:\s*)' + re.escape(json.dumps(rename[name]).encode()))
    written = json.dumps(name).encode()
    return lambda data: pattern.sub(lambda match: match[1] + written, data, count=1)
