"""Which answers may be kept, and under which key: everything that changes an answer is in it. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

VERSION = 1
# What only says how an answer travels, or where it is billed.
WITHOUT_EFFECT = frozenset({
    "stream", "stream_options", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
})  # fmt: skip


def may_keep(path: str, fields: Mapping[str, Any], keeps_all: bool) -> bool:
    """Whether the same request would get the same answer again: greedy or seeded, one choice; vectors always."""
    if path.endswith("/responses"):  # its whole answers and its events are not turned into one another yet
        return False
    if path.endswith("/embeddings"):
        return "input" in fields
    if not isinstance(fields.get("model"), str) or (fields.get("n") or 1) != 1:
        return False
    temperature, seed = fields.get("temperature"), fields.get("seed")
    is_greedy = isinstance(temperature, (int, float)) and not isinstance(temperature, bool) and temperature == 0
    return keeps_all or is_greedy or isinstance(seed, int)


def tenant_of(authorization: str, is_shared: bool) -> str:
    """Whose answers these are: the digest of an API key, so that one never sees what another asked."""
    return "" if is_shared else hashlib.sha256(authorization.encode("utf-8", "surrogateescape")).hexdigest()


def key_of(origin: str, tenant: str, path: str, query: str, fields: Mapping[str, Any]) -> str:
    """`origin`: who would answer, precisely: the primary's URL and model, or the digest of a local engine. Hex, 64 letters."""
    asked = {name: _canonical(value) for name, value in fields.items() if name not in WITHOUT_EFFECT and value is not None}
    if asked.get("n") == 1:
        del asked["n"]
    if path.endswith("/chat/completions") and asked.get("response_format") == {"type": "text"}:
        del asked["response_format"]
    parts = [VERSION, origin, tenant, path.removeprefix("/v1"), query, asked]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """0 and 0.0 are the same number to every API, and must be the same key."""
    if isinstance(value, dict):
        return {name: _canonical(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    return value
