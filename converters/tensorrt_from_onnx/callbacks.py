"""What TensorRT calls back: a logger that keeps the reasons of failures, and a progress monitor that can stop a build.

Both are called from threads of TensorRT's. An exception of ours must never leave them: in C++ there is nobody to catch it.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Callable, Deque, List, Optional

from converters.tensorrt_from_onnx.progress import Progress

KEPT_MESSAGES = 64

log = logging.getLogger(__name__)


class Messages:
    """The last errors of one builder, oldest first: TensorRT returns None for every failure and says why here only."""

    def __init__(self) -> None:
        self._errors: Deque[str] = deque(maxlen=KEPT_MESSAGES)

    def keep(self, message: str) -> None:
        self._errors.append(message)

    def errors(self) -> List[str]:
        return list(self._errors)

    def forget(self) -> None:
        """Errors of something that was tried and may fail."""
        self._errors.clear()


def new_logger(trt: Any, messages: Messages, read_verbose: Optional[Callable[[str], None]] = None) -> Any:
    """An ILogger: errors are kept, errors and warnings logged. `read_verbose` gets everything else."""
    severity = trt.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR, severity.WARNING: logging.WARNING}

    class Logger(trt.ILogger):  # type: ignore[misc]  # TensorRT has no types
        def __init__(self) -> None:
            super().__init__()  # without it pybind refuses the object

        def log(self, level: Any, message: str) -> None:
            try:
                if level in levels:
                    log.log(levels[level], "TensorRT: %s", message)
                if levels.get(level) == logging.ERROR:
                    messages.keep(message)
                elif read_verbose is not None:
                    read_verbose(message)
            except Exception:  # noqa: BLE001  # a log line that nobody could write must not end the process
                messages.keep(str(message))

    return Logger()


def new_monitor(trt: Any, progress: Progress, is_cancelled: Callable[[], bool]) -> Any:
    """An IProgressMonitor: feeds `progress`; once `is_cancelled` says so, the next step ends the build with None."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # TensorRT has no types
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            progress.start(phase_name, parent_phase or "", num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.step(phase_name, step)
            return not is_cancelled()

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()
