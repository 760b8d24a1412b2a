"""Asks the workers' interpreter, once at start, what it can run models with."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anyio
from anyio import to_thread

from agent.build_choice import UNKNOWN, Machine
from models.engines.native.weights import cpu_identity
from models.record import RecordError
from models.runtimes import Runtimes, parse_runtimes

logger = logging.getLogger(__name__)

CHILD = Path(__file__).resolve().parent.parent / "converters" / "child.py"  # by path: that interpreter need not know our packages
COMPILERS = ("cc", "gcc", "clang")
DEADLINE_S = 60.0  # the first import of TensorRT from a cold SD card takes half of that
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # would lead another interpreter to the packages of this one


async def look_around(python: Path, deadline_s: float = DEADLINE_S) -> Machine:
    """Never raises."""
    runtimes, cpu = await ask_runtimes(python, deadline_s), await to_thread.run_sync(cpu_identity)
    return Machine(runtimes, cpu, any(shutil.which(name) for name in (os.environ.get("CC", ""), *COMPILERS) if name))


async def ask_runtimes(python: Path, deadline_s: float = DEADLINE_S) -> Runtimes:
    """Never raises: an interpreter that does not answer has nothing, and the log says why."""
    environment = {name: value for name, value in os.environ.items() if str(python) == sys.executable or name not in FOREIGN}
    try:
        # Shielded: asyncio loses a child whose start is cancelled half-way. It takes a second, and the deadline holds.
        with anyio.fail_after(deadline_s, shield=True):
            done = await anyio.run_process(
                [str(python), str(CHILD), "models.runtimes"], stdin=subprocess.DEVNULL, check=False, env=environment
            )
        if done.returncode:
            raise RecordError(f"it ended with status {done.returncode}: {done.stderr[-600:].decode(errors='replace').strip()}")
        found = parse_runtimes(done.stdout)
    except (OSError, TimeoutError, RecordError) as error:
        logger.warning("%s does not say which runtimes it has: %s; engines are built for ONNX Runtime", python, str(error) or "no answer")
        return UNKNOWN
    for module, problem in found.problems.items():
        logger.warning("%s has %s, but cannot load it: %s", python, module, problem)
    return found
