"""Why a worker ended, as a typed fact with evidence. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

EVIDENCE_LINES = 50

Kind = Literal[
    "stopped",  # we asked for it
    "segfault",  # SIGSEGV or SIGBUS: native code, a driver, a broken engine
    "aborted",  # SIGABRT of its own: an assertion in native code
    "out_of_memory",  # SIGKILL while the kernel's OOM killer was at work
    "killed",  # another signal, from outside
    "hang",  # its loop gave no sign of life and it was ended by us
    "not_ready",  # it did not come up in time and was ended by us
    "protocol",  # it sent something that is no frame and was ended by us
    "import",  # a module is missing in its interpreter
    "exit",  # it left by itself
    "spawn",  # it could not be started at all
]

# What the supervisor ended the process for; None: it ended by itself.
EndedFor = Literal["stopped", "hang", "not_ready", "protocol"]

WORDS: dict[Kind, str] = {
    "stopped": "it was stopped",
    "segfault": "it crashed in native code",
    "aborted": "native code aborted it",
    "out_of_memory": "the kernel killed it for want of memory; serve fewer or smaller models, or fewer slots",
    "killed": "it was killed from outside",
    "hang": "its loop gave no sign of life; the stacks of its threads are in the evidence",
    "not_ready": "it did not become ready in time",
    "protocol": "it sent bytes that are no frame; daemon and worker are not of one version",
    "import": "a module is missing in its interpreter; install it there or set worker.python",
    "exit": "it left by itself",
    "spawn": "it could not be started; check worker.python",
}

MISSING_MODULE = re.compile(r"^(ModuleNotFoundError|ImportError): (.*)$")
PYTHON_ERROR = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b.*$")


@dataclass(frozen=True, slots=True)
class ExitCause:
    """`status` as the operating system gives it: negative is a signal. `evidence`: the last lines that the worker wrote."""

    kind: Kind
    text: str
    status: int | None = None
    evidence: tuple[str, ...] = ()


def exit_cause(status: int, lines: Sequence[str], ended_for: EndedFor | None = None, oom_kills: int = 0, python: str = "") -> ExitCause:
    """Classify an exit. `lines`: what the process wrote last; `oom_kills`: how many the kernel has done in its lifetime."""
    evidence = tuple(lines[-EVIDENCE_LINES:])
    kind = ended_for or _kind(status, evidence, oom_kills)
    details = [WORDS[kind], _status_text(status)]
    last_error = next((line for line in reversed(evidence) if PYTHON_ERROR.match(line)), None)
    if last_error and kind in ("exit", "import", "aborted"):
        details.append(last_error[:300])
    if kind == "import" and python:
        details.append(f"interpreter {python}")
    return ExitCause(kind, "; ".join(details), status, evidence)


def spawn_failure(error: OSError, python: str) -> ExitCause:
    return ExitCause("spawn", f"{WORDS['spawn']}: {python}: {error.strerror or error}")


def _kind(status: int, evidence: Sequence[str], oom_kills: int) -> Kind:
    if status in (-signal.SIGSEGV, -signal.SIGBUS):
        return "segfault"
    if status == -signal.SIGABRT:
        return "aborted"
    if status == -signal.SIGKILL and oom_kills > 0:
        return "out_of_memory"
    if status < 0:
        return "killed"
    if any(MISSING_MODULE.match(line) for line in evidence[-3:]):
        return "import"
    return "exit"


def _status_text(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"
