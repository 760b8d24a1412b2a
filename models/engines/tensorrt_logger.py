"""TensorRT says why something failed only to its logger; the answer itself is None or False."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Deque, Dict

log = logging.getLogger(__name__)

KEPT = 8
_LOGGERS: Dict[str, Any] = {}


def logger_of(module: Any) -> Any:
    """The logger for a TensorRT module, the same at every call: TensorRT keeps the first it is given for good.

    It has two methods beside TensorRT's: `forget()` and `last_words()`, the errors since.
    """
    if module.__name__ not in _LOGGERS:
        _LOGGERS[module.__name__] = _logger_class(module)()
    return _LOGGERS[module.__name__]


def _logger_class(module: Any) -> Any:
    severity = module.ILogger
    levels = ((severity.INTERNAL_ERROR, logging.ERROR), (severity.ERROR, logging.ERROR), (severity.WARNING, logging.WARNING))

    class KeepingLogger(module.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._words: Deque[str] = deque(maxlen=KEPT)

        def log(self, severity: Any, message: str) -> None:
            level = next((level for each, level in levels if severity == each), logging.DEBUG)
            if level == logging.ERROR:
                self._words.append(message.strip())
            # An error is told by whoever asked for what failed.
            log.log(logging.WARNING if level == logging.WARNING else logging.DEBUG, "TensorRT: %s", message)

        def forget(self) -> None:
            self._words.clear()

        def last_words(self) -> str:
            return "; ".join(self._words) or "TensorRT gave no reason"

    return KeepingLogger
