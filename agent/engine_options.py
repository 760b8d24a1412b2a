"""How a worker is told to open an engine: as it was proven, with the room that this node gives it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent.config import Settings
from models.engine_record import EngineRecord, published_precision
from models.record import from_mapping
from models.store import PROVIDER_FOLDER, Store

PROVEN = ("provider", "precision", "profiles", "workspace_bytes")


def node_options(settings: Settings, store: Store) -> Mapping[str, Any]:
    """The same for every engine of this node: fields of models.engines.EngineOptions."""
    worker = settings.worker
    return {
        "threads": worker.threads,
        "slots": worker.slots,
        "context_tokens": worker.context_tokens,
        "cache_folder": str(store.root / PROVIDER_FOLDER),
    }


def _published(record: Mapping[str, Any]) -> str:
    """The folder must still hold the engine that this record is of: a plan of another precision is refused."""
    return published_precision(from_mapping(EngineRecord, record))


def engine_options(node: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Those of one engine. The provider is never that of the configuration but the one the gate ran on (`opened_with` of its verdict):
    another one would serve other kernels, which nobody has compared with the model."""
    attempts: Sequence[Mapping[str, Any]] = record.get("verdict", {}).get("attempts") or ({},)
    proven = attempts[-1].get("notes", {}).get("opened_with", {})
    told = {"precision": _published(record)} if str(record.get("key", {}).get("runtime", "")).startswith("tensorrt") else {}
    options = {**node, **told, **{name: proven[name] for name in PROVEN if name in proven}}
    if options.get("provider") != "tensorrt":
        options.pop("cache_folder", None)
    return options
