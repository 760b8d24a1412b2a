"""A model from its manifest to a verified engine folder: fetched in a thread, converted in a child process that may crash."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

import anyio
from anyio import from_thread, to_thread
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from agent.reconcile import Built, PreparationFailed, Progress
from models.durable import StoreBusy, StoreError
from models.engine_record import read_engine
from models.manifest import Manifest
from models.record import to_mapping
from models.sources import SourceError, fetch
from models.store import Store

logger = logging.getLogger(__name__)

FETCH_SHARE = 0.5
LEAST_STEP = 0.002  # of the progress that is told: a large file comes in ten thousand pieces
OTHERS_WAIT_S = 3600.0
LOCK_WAIT_S = 1.0
MAX_LINE_BYTES = 1 << 20
STOP_DEADLINE_S = 5.0
LOG_LINES_KEPT = 20


class _Abandoned(SourceError):
    """The daemon is stopping: raised inside the fetching thread to end it."""


async def prepare_model(store: Store, threads: int, build_deadline_s: float, manifest: Manifest, progress: Progress) -> Built:
    """Fetch what is missing, build unless the store has the engine. Raises PreparationFailed with the reason in words."""
    try:
        sources = await _fetch_all(store, manifest, progress)
    except (SourceError, StoreError, OSError) as error:
        raise PreparationFailed(str(error)) from error
    request = {
        "manifest": to_mapping(manifest),
        "sources": {role: str(path) for role, path in sources.items()},
        "store": str(store.root),
        "options": {"threads": max(1, threads)},
    }
    try:
        with anyio.fail_after(build_deadline_s):
            folder = await _build(json.dumps(request).encode(), progress)
    except TimeoutError as error:
        raise PreparationFailed(f"the build of {manifest.name} did not end within {build_deadline_s:g} s and was stopped") from error
    except OSError as error:
        raise PreparationFailed(f"the converter of {manifest.name} cannot be started: {error}") from error
    engine = await to_thread.run_sync(read_engine, folder)
    if engine is None:
        raise PreparationFailed(f"the engine that was built in {folder} is not whole; was it removed meanwhile?")
    return Built(folder, to_mapping(engine.record))


async def _fetch_all(store: Store, manifest: Manifest, progress: Progress) -> Mapping[str, Path]:
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
                    raise _Abandoned("the node is stopping")
                share = FETCH_SHARE * min(1.0, (before + done) / (total_bytes or before + total or 1))
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


async def _build(request: bytes, progress: Progress) -> Path:
    """One `python -m converters build`; ended with SIGTERM when we are cancelled, so that it cleans up, then SIGKILL."""
    process = await anyio.open_process(
        [sys.executable, "-m", "converters", "build"], stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
    )
    log: deque[str] = deque(maxlen=LOG_LINES_KEPT)
    outcome: dict[str, Any] = {}
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_keep_log, process, log)
            if process.stdin is not None:
                with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # it died at once: its log says why
                    await process.stdin.send(request)
                    await process.stdin.aclose()
            outcome = await _follow(process, progress)
            await _end(process, is_done=True)  # before the group ends, for that waits for whoever holds the log open
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                await _end(process, is_done=False)
            await process.aclose()
    if "folder" in outcome.get("result", {}):
        return Path(outcome["result"]["folder"])
    if "message" in outcome.get("error", {}):
        raise PreparationFailed(str(outcome["error"]["message"]))
    ending = f"signal {signal.Signals(-process.returncode).name}" if process.returncode and process.returncode < 0 else process.returncode
    raise PreparationFailed(f"the conversion ended with {ending} and no result; its last words: {' | '.join(log)[-600:] or 'none'}")


async def _follow(process: Process, progress: Progress) -> dict[str, Any]:
    """The last line of the child: its result or its error; empty if it ends without one."""
    if process.stdout is None:
        return {}
    lines = BufferedByteReceiveStream(process.stdout)
    with suppress(anyio.IncompleteRead, anyio.EndOfStream, anyio.DelimiterNotFound, ValueError, KeyError, TypeError):
        while True:
            line = json.loads(await lines.receive_until(b"\n", MAX_LINE_BYTES))
            if "phase" not in line:
                return dict(line)
            progress(str(line["phase"]), FETCH_SHARE + (1 - FETCH_SHARE) * float(line["fraction"]))
    return {}


async def _keep_log(process: Process, log: deque[str]) -> None:
    if process.stderr is None:
        return
    lines = BufferedByteReceiveStream(process.stderr)
    with suppress(anyio.IncompleteRead, anyio.EndOfStream, anyio.DelimiterNotFound):
        while True:
            line = (await lines.receive_until(b"\n", MAX_LINE_BYTES)).decode(errors="replace").strip()
            log.append(line)
            logger.info("converter: %s", line)


async def _end(process: Process, is_done: bool) -> None:
    """Wait for a child that has said all; end one that has not. Nothing of it is left behind."""
    if not is_done:
        with suppress(ProcessLookupError):
            process.terminate()
    with anyio.move_on_after(STOP_DEADLINE_S):
        await process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with anyio.move_on_after(STOP_DEADLINE_S):
        await process.wait()
