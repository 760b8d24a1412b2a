"""The files of a model into the store, in a thread that can be abandoned."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import anyio
from anyio import from_thread, to_thread

from agent.preparation import Progress
from models.durable import StoreBusy
from models.manifest import Manifest
from models.sources import SourceError, fetch
from models.store import Store

LEAST_STEP = 0.002  # of the progress that is told: a large file comes in ten thousand pieces
OTHERS_WAIT_S = 3600.0
LOCK_WAIT_S = 1.0


class _Abandoned(SourceError):
    """Nobody wants the file any more: raised inside the fetching thread to end it."""


async def fetch_all(store: Store, manifest: Manifest, progress: Progress) -> Mapping[str, Path]:
    """Role → artefact; `progress` is told the share of all bytes. Raises SourceError, StoreError, OSError."""
    abandoned = threading.Event()
    total_bytes = sum(file.size_bytes for file in manifest.files.values())
    fetched: dict[str, Path] = {}
    done_before = 0
    told = -1.0
    try:
        for role, file in manifest.files.items():

            def advance(done: int, total: int, role: str = role, before: int = done_before) -> None:
                nonlocal told
                if abandoned.is_set():
                    raise _Abandoned("nobody waits for this file any more")
                share = min(1.0, (before + done) / (total_bytes or before + total or 1))
                if share - told >= LEAST_STEP or share < told:
                    told = share
                    from_thread.run_sync(progress, f"fetch {role}", share)

            with anyio.move_on_after(OTHERS_WAIT_S):
                while role not in fetched:
                    # Waited for in short turns: a thread that waits for another process's lock cannot be ended.
                    with suppress(StoreBusy):
                        fetched[role] = await to_thread.run_sync(
                            fetch, file, store, advance, os.environ, LOCK_WAIT_S, abandon_on_cancel=True
                        )
            if role not in fetched:
                raise StoreBusy(f"another process has been fetching {file.source} for {OTHERS_WAIT_S:g} s; end it, then try again")
            done_before += file.size_bytes
    except anyio.get_cancelled_exc_class():
        abandoned.set()
        raise
    return fetched
