"""Which paths are what: at every base URL that clients of OpenAI and DeepSeek use."""

from __future__ import annotations

from starlette.types import Scope

PREFIXES = ("/v1", "", "/beta")  # OpenAI's base, DeepSeek's bare host, and its beta base
INFERENCE = frozenset(
    prefix + path
    for prefix in PREFIXES
    for path in ("/chat/completions", "/completions", "/responses", "/embeddings", "/rerank", "/batch", "/classify", "/detect")
)
FILES = frozenset(prefix + "/files" for prefix in PREFIXES)
# What is nobody else's business: pictures, what was asked, and orders.
OURS = tuple(f"{prefix}/{name}" for prefix in PREFIXES for name in ("files", "batches", "deployments"))
PRIVATE = ("/cameras", "/events", "/node", "/demo", *OURS)
OPEN_WITHOUT_KEY = frozenset({"/", "/healthz", "/livez", "/readyz", "/metrics"})


def is_private(path: str) -> bool:
    return any(path == own or path.startswith(f"{own}/") for own in PRIVATE)


def is_inference(scope: Scope) -> bool:
    return scope["path"] in INFERENCE and scope["method"] == "POST"
