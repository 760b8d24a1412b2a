"""`python -m converters build`: a build as a child process.

Standard input   one JSON object, see `converters/request.py`
Standard output  JSON lines: {"phase", "fraction", "message"} while it goes on, at the end {"result": …} or {"error": {"code", "message"}}
Standard error   log lines
Exit status      0 built or reused; 1 refused or failed, with an error line; 2 wrong use; 143 after SIGTERM, nothing left behind
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from typing import IO, Any

USAGE = "usage: python -m converters build < request.json"
MAX_REQUEST_BYTES = 4 << 20
TERMINATED = 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM, as an exception, so that every `with` on the way out cleans up. Not an Exception: nobody may take it for a failure."""


def main(arguments: list[str]) -> int:
    if arguments != ["build"]:
        sys.stderr.write(f"{USAGE}\n")
        return 2
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _terminate)
    # Native libraries write to descriptor 1 as they like; the protocol keeps a copy and gives them standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)
        try:
            return _run(sys.stdin.buffer.read(MAX_REQUEST_BYTES + 1), lines)
        except Terminated:
            return TERMINATED


def _run(text: bytes, lines: IO[str]) -> int:
    # Two BLAS threads beside busy neighbours wait for each other: with other work on both cores, one verified three times as fast.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Imported late: numpy reads the line above, and SIGTERM is handled from the first moment.
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
    except ConversionError as error:
        return _failed(lines, error.code, str(error))
    except NoSpace as error:
        return _failed(lines, "no_space", str(error))
    except StoreError as error:
        return _failed(lines, "store", str(error))
    except OSError as error:
        return _failed(lines, "no_space" if error.errno == 28 else "io", f"{error}; free space or correct the permissions, then try again")
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


def _failed(lines: IO[str], code: str, message: str) -> int:
    _write(lines, {"error": {"code": code, "message": message}})
    return 1


def _write(lines: IO[str], value: dict[str, Any]) -> None:
    lines.write(json.dumps(value, ensure_ascii=False) + "\n")
    lines.flush()


def _terminate(number: int, frame: object) -> None:
    del number, frame
    # Once is enough: a second signal must not interrupt the clean-up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
