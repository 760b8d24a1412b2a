"""A worker process: `python agent/worker/__main__.py FD NAME`, where FD is an inherited socket to the daemon.

It is started by path, not with `-m`, so that the interpreter of the device needs to find nothing of the daemon's: neither a PYTHONPATH
(which would put the daemon's own site-packages, numpy of another Python among them, before those of the device) nor a working directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import signal
import socket
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Tuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OWN_PACKAGES = ("agent", "models", "converters")
OOM_SCORE = 500  # of 1000: the kernel takes a worker long before the daemon, which can start another
PR_SET_PDEATHSIG = 1


class OwnPackages:
    """Finds our packages beside this file, and nothing else that lies there."""

    @staticmethod
    def find_spec(name: str, path: Optional[Sequence[str]] = None, target: Any = None) -> Optional[ModuleSpec]:
        return PathFinder.find_spec(name, [str(ROOT)]) if path is None and name in OWN_PACKAGES else None


def main(arguments: Sequence[str], services: Optional[Mapping[str, Tuple[str, str]]] = None) -> int:
    """Serve until the daemon ends it or is gone; `services` replaces the loop's own table."""
    if len(arguments) != 2 or not arguments[0].isdigit():
        sys.stderr.write("usage: python agent/worker/__main__.py FD NAME; started by the agent only\n")
        return 64
    faulthandler.enable()
    _die_with_parent()
    _prefer_for_oom()
    from agent.worker.loop import Loop

    connection = socket.socket(fileno=int(arguments[0]))
    loop = Loop(connection, services)
    signal.signal(signal.SIGTERM, lambda *_: loop.end())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop.run()
    return 0


def _die_with_parent() -> None:
    """SIGKILL when the daemon is gone: a worker stuck in a driver would not notice the end of its socket (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prefer_for_oom() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    sys.meta_path.insert(0, OwnPackages)
    sys.exit(main(sys.argv[1:]))
