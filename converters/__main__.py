"""`python -m converters build`: a build as a child process.

Standard input   one JSON object, see `converters/request.py`
Standard output  JSON lines: {"phase", "fraction", "message"} while it goes on, at the end {"result": {"folder", "key", "is_reused",
                 "size_bytes", "seconds", "verdict"}} or {"error": {"code", "message"}}, with "verdict" where something was measured.
                 Phases are read, convert, verify, publish, done; `fraction` is of the whole and never falls
Standard error   log lines
Exit status      0 built or reused; 1 refused or failed, with an error line; 2 wrong use; 143 after SIGTERM, within a second and with
                 nothing left behind

Error codes
    bad_request           asked for something impossible or unknown
    bad_file              a source is damaged, hostile or not what its manifest says
    unsupported           well-formed, but not implemented here, or not to be had on this device
    unsupported_operator  TensorRT does not have an operator of the graph; the message names the node
    parse                 TensorRT does not read the graph
    no_profile            a dynamic input has no shapes to build for
    no_memory, no_space   more is needed than there is; the message has the figures
    no_kernel             TensorRT found no implementation of a node at any step of the ladder, nearly always for want of memory
    no_device             a plan needs the driver and the GPU that will run it
    not_the_same_model    every step of the ladder left its tolerance; `verdict` has the figures
    not_verified          nothing here can run the engine, or the store's one is not proven, and accept_unverified was not said
    cancelled             the builder was told to stop
    failed                TensorRT gave up for another reason
    timeout               options.timeout_s passed
    died                  the process was killed or crashed; the message has the signal
    store, io, internal   the store is busy or damaged; a file cannot be read or written; a defect of ours, with a stack in the log
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from typing import IO, Any

from converters.build_process import DISASTERS, Terminated, supervise

USAGE = "usage: python -m converters build < request.json"
MAX_REQUEST_BYTES = 4 << 20
# A quota, a limit of this process and a full disk look the same to who has to make room.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: list[str]) -> int:
    if arguments != ["build"]:
        sys.stderr.write(f"{USAGE}\n")
        return 2
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Two BLAS threads beside busy neighbours wait for each other: with other work on both cores, one verified three times as fast.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Native libraries write to descriptor 1 as they like; the protocol keeps a copy and gives them standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)
        text = sys.stdin.buffer.read(MAX_REQUEST_BYTES + 1)
        from converters.errors import ConversionError
        from converters.request import parse_request

        try:
            request = parse_request(text)
        except ConversionError as error:
            return _failed(lines, error.code, str(error))
        status, disaster = supervise(lambda: _run(text, lines), request.store, request.options.timeout_s)
        if disaster is not None:
            code, what = DISASTERS[disaster]
            return _failed(lines, code, what.format(status=status, timeout_s=request.options.timeout_s))
        return status


def _run(text: bytes, lines: IO[str]) -> int:
    # Imported by the builder alone: the process that watches it stays small.
    from converters.build import build
    from converters.errors import ConversionError
    from converters.request import parse_request
    from models.durable import NoSpace, StoreError

    def report(phase: str, fraction: float, message: str) -> None:
        _write(lines, {"phase": phase, "fraction": fraction, "message": message})

    try:
        request = parse_request(text)
        os.nice(request.options.nice)
        built = build(request, report)
    except Terminated:
        raise
    except ConversionError as error:
        return _failed(lines, error.code, str(error), error.verdict)
    except NoSpace as error:
        return _failed(lines, "no_space", str(error))
    except StoreError as error:
        return _failed(lines, "store", str(error))
    except OSError as error:
        code = "no_space" if error.errno in NO_SPACE else "io"
        return _failed(lines, code, f"{error}; free space or correct the permissions, then try again")
    except MemoryError:
        return _failed(lines, "no_memory", "the build needs more memory than there is; stop pipelines or build on a larger machine")
    except Exception as error:  # the boundary of the process: the parent gets a line for whatever happened, the log the stack
        logging.getLogger(__name__).exception("build failed")
        return _failed(lines, "internal", f"{type(error).__name__}: {error}")
    record = built.engine.record
    result: dict[str, Any] = {
        "folder": str(built.engine.folder),
        "key": record.key.digest(),
        "is_reused": built.is_reused,
        "size_bytes": built.engine.size_bytes,
        "seconds": built.seconds,
        "verdict": record.verdict,
    }
    _write(lines, {"result": result})
    return 0


def _failed(lines: IO[str], code: str, message: str, verdict: object = None) -> int:
    error = {"code": code, "message": message}
    _write(lines, {"error": error if verdict is None else {**error, "verdict": verdict}})
    return 1


def _write(lines: IO[str], value: dict[str, Any]) -> None:
    lines.write(json.dumps(value, ensure_ascii=False) + "\n")
    lines.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
