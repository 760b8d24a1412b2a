"""`python -m converters.tensorrt_from_onnx`: one plan, in a process of its own.

Standard input   one JSON object, see `request.py`
Standard output  JSON lines: {"phase", "fraction", "message"} while it goes on, at the end {"result": {…}} or
                 {"error": {"code", "message", "node", "operator"}}
Standard error   log lines
Exit status      0 the plan is there; 1 an error line says why not; 2 wrong use; 143 ended by SIGTERM, SIGINT or SIGHUP, with an error
                 line of code `cancelled`; other: TensorRT took the process down

Needs numpy and TensorRT alone, and runs under Python 3.8.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import warnings
from typing import IO, Any, Dict

from converters.tensorrt_from_onnx.errors import PlanError
from converters.tensorrt_from_onnx.plan import build_plan
from converters.tensorrt_from_onnx.request import MAX_BYTES, parse_request

USAGE = "usage: python -m converters.tensorrt_from_onnx < request.json"
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TERMINATED = 128 + signal.SIGTERM
# A progress monitor is not asked while TensorRT compiles kernels, which takes seconds, and TensorRT 8 has none.
GRACE_S = 0.5
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Lines:
    """The protocol's output. One last line, whoever is first; nothing after it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._has_ended = False

    def report(self, phase: str, fraction: float, message: str) -> None:
        self._write({"phase": phase, "fraction": round(fraction, 4), "message": message}, is_last=False)

    def end(self, value: Dict[str, Any]) -> bool:
        return self._write(value, is_last=True)

    def _write(self, value: Dict[str, Any], is_last: bool) -> bool:
        with self._lock:
            if self._has_ended:
                return False
            self._has_ended = is_last
            self._stream.write(json.dumps(value, ensure_ascii=False) + "\n")
            self._stream.flush()
            return True


def main(arguments: "list[str]") -> int:
    if arguments:
        sys.stderr.write(f"{USAGE}\n")
        return 2
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    warnings.simplefilter("ignore", DeprecationWarning)  # of bindings: we call what all versions have
    # Native libraries write to descriptor 1 as they like; the protocol keeps a copy and gives them standard error.
    lines = Lines(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    # Blocked here and in every thread to come, TensorRT's too: one thread of ours waits for them while this one is inside C++.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    cancelled = threading.Event()
    threading.Thread(target=_await_end, args=(lines, cancelled), name="signals", daemon=True).start()
    return _run(sys.stdin.buffer.read(MAX_BYTES + 1), lines, cancelled)


def _await_end(lines: Lines, cancelled: threading.Event) -> None:
    signal.sigwait(ENDING)
    cancelled.set()
    threading.Event().wait(GRACE_S)
    try:
        lines.end({"error": PlanError("cancelled", "the build was cancelled within a step of TensorRT; nothing was written").to_json()})
    finally:
        os._exit(TERMINATED)


def _run(text: bytes, lines: Lines, cancelled: threading.Event) -> int:
    try:
        result = build_plan(parse_request(text), lines.report, cancelled.is_set)
    except PlanError as error:
        failure = error
    except OSError as error:
        code = "no_space" if error.errno in _NO_SPACE else "failed"
        failure = PlanError(code, f"{error}; free space or correct the permissions, then build again")
    except MemoryError:
        failure = PlanError("no_memory", "the build needs more memory than there is: stop pipelines, or give swap")
    except Exception as error:  # the boundary of the process: the parent gets a line for whatever happened, the log the stack
        logging.getLogger(__name__).exception("build failed")
        failure = PlanError("failed", f"{type(error).__name__}: {error}")
    else:
        lines.end({"result": result.to_json()})
        return 0
    lines.end({"error": failure.to_json()})
    return TERMINATED if failure.code == "cancelled" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
