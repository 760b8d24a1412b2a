"""One `python -m converters build` as a child: told what to do, listened to, ended within a second when nobody wants it any more."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from subprocess import PIPE
from typing import Any

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from agent.preparation import PreparationFailed, Progress

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "converters", "build")
MAX_LINE_BYTES = 4 << 20
TERMINATE_S = 1.0  # time to clean up; then it is killed, and what it leaves is swept
KILL_S = 5.0
LOG_LINES_KEPT = 20
MESSAGE_CHARACTERS = 200


async def run_build(request: Mapping[str, Any], progress: Progress, deadline_s: float) -> Mapping[str, Any]:
    """The `result` of a build, told `progress` on the way. Raises PreparationFailed.

    Cancelled, it is sent SIGTERM, so that it cleans up, and killed with all its children after TERMINATE_S.
    """
    name = request["manifest"]["name"]
    try:
        with anyio.fail_after(deadline_s):
            outcome, ending, words = await _run(json.dumps(request).encode(), progress)
    except TimeoutError as error:
        raise PreparationFailed(f"the build of {name} did not end within {deadline_s:g} s and was stopped", "timeout") from error
    except OSError as error:
        raise PreparationFailed(f"the converter of {name} cannot be started: {error}") from error
    if isinstance(outcome.get("result"), dict) and "folder" in outcome["result"]:
        return dict(outcome["result"])
    if isinstance(outcome.get("error"), dict) and "message" in outcome["error"]:
        refusal = outcome["error"]
        verdict = refusal.get("verdict")
        raise PreparationFailed(str(refusal["message"]), str(refusal.get("code", "")), verdict if isinstance(verdict, dict) else None)
    raise PreparationFailed(f"the conversion ended with {ending} and no result; its last words: {words or 'none'}", "died")


async def _run(request: bytes, progress: Progress) -> tuple[dict[str, Any], str, str]:
    """The last line of the child, how it ended, and what it wrote last."""
    process = await anyio.open_process(list(COMMAND), stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True)
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
    code = process.returncode
    ending = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"status {code}"
    return outcome, ending, " | ".join(log)[-600:]


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
            progress(str(line["phase"]), min(1.0, max(0.0, float(line["fraction"]))), str(line.get("message", ""))[:MESSAGE_CHARACTERS])
    return {}


async def _keep_log(process: Process, log: deque[str]) -> None:
    if process.stderr is None:
        return
    lines = BufferedByteReceiveStream(process.stderr)
    with suppress(anyio.IncompleteRead, anyio.EndOfStream, anyio.DelimiterNotFound):
        while True:
            line = (await lines.receive_until(b"\n", MAX_LINE_BYTES)).decode(errors="replace").strip()
            log.append(line[:2000])
            logger.info("converter: %s", line[:2000])


async def _end(process: Process, is_done: bool) -> None:
    """Wait for a child that has said all; end one that has not. Nothing of it is left behind."""
    if not is_done:
        with suppress(ProcessLookupError):
            process.terminate()
    with anyio.move_on_after(KILL_S if is_done else TERMINATE_S):
        await process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with anyio.move_on_after(KILL_S):
        await process.wait()
