"""Watches over a build from a process beside it: a runtime deep in C++ handles no signal, and a crash writes no error line."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from converters.child import die_with_parent
from models.durable import sweep

TERMINATED = 128 + signal.SIGTERM
# Of the second that a cancelled build may take, the part for its own clean-up; then it is killed and cleaned up after.
GRACE_S = 0.6
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)

log = logging.getLogger(__name__)

Disaster = Literal["timeout", "killed", "crashed"]
DISASTERS: dict[Disaster, tuple[str, str]] = {
    "timeout": ("timeout", "the build did not end within {timeout_s:g} s and was ended; give it longer, or build on a faster machine"),
    "killed": (
        "died",
        "the build was killed with signal {status}, which nearly always means that memory ran out: stop pipelines, or add swap",
    ),
    "crashed": ("died", "the build crashed with signal {status}; its log has the last words of the library that did it"),
}


class Terminated(BaseException):
    """SIGTERM, as an exception, so that every `with` on the way out cleans up. Not an Exception: nobody may take it for a failure."""


def supervise(work: Callable[[], int], store: Path, timeout_s: float) -> tuple[int, Disaster | None]:
    """Run `work` in a forked process; its exit status and None, or a signal's number and what happened.

    SIGTERM ends it within a second: status 143. Nothing of an ended build stays in the store's temporary folder.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    try:
        deadline = time.monotonic() + timeout_s
        child = os.fork()
        if child == 0:
            _be_the_child(work, previous)
        cause, status = _watch(child, deadline)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    code = os.waitstatus_to_exitcode(status)
    if cause == "" and code >= 0:
        return code, None
    # Whatever it had in hand: folders of dead processes are known by their locks.
    try:
        sweep(store / "temporary")
    except OSError as error:
        log.warning("cannot remove what the build left in %s: %s; the next one does", store, error)
    if cause == "terminated":
        return TERMINATED, None
    if cause == "timeout":
        return -code, "timeout"
    return -code, "killed" if code == -signal.SIGKILL else "crashed"


def _be_the_child(work: Callable[[], int], mask: set[int | signal.Signals]) -> None:
    """Does not return."""
    status = 1
    try:
        die_with_parent()
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = work()
    except Terminated:
        status = TERMINATED
    finally:
        logging.shutdown()
        os._exit(status)


def _terminate(number: int, frame: object) -> None:
    del number, frame
    # Once is enough: a second signal must not interrupt the clean-up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _watch(child: int, deadline: float) -> tuple[str, int]:
    """Why the child was ended (empty: it was not) and its wait status."""
    cause = ""
    while True:
        found = signal.sigtimedwait(WATCHED, max(0.0, deadline - time.monotonic()))
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return cause, status
        if found is not None and found.si_signo == signal.SIGCHLD:
            continue
        if cause:
            # It had its time.
            if time.monotonic() >= deadline:
                os.kill(child, signal.SIGKILL)
                return cause, os.waitpid(child, 0)[1]
            continue
        cause = "timeout" if found is None else "terminated"
        os.kill(child, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
