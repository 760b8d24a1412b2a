"""The child's side of a nested process: `python …/converters/child.py MODULE [ARGUMENT…]` runs MODULE as `-m` would.

Started by path, so that an interpreter of the device needs to find nothing of the daemon's: with its PYTHONPATH, numpy of another Python
would come before its own. Dies with its parent, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import runpy
import signal
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OWN_PACKAGES = ("models", "converters")
PR_SET_PDEATHSIG = 1


class OwnPackages:
    """Finds our packages beside this folder, and nothing else that lies there."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(HERE.parent)]) if path is None and name in OWN_PACKAGES else None


def die_with_parent() -> None:
    """SIGKILL when the parent's thread that started this process is gone (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    faulthandler.enable()
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    sys.meta_path.insert(0, OwnPackages)
    sys.argv[:] = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
