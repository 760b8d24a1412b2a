"""How far a build is: from TensorRT's nested phases where it reports them, from its log where not. Nothing here touches TensorRT."""

from __future__ import annotations

import re
import threading
from typing import Dict, Pattern, Tuple

# Of a whole build; parsing took 1 to 4 % of the builds that were watched.
PARSED = 0.04
BUILT = 0.98

# TensorRT 8 speaks at level VERBOSE of what it does. (pattern, phase, fraction of the build where that begins)
_LOG_PHASES: Tuple[Tuple[Pattern[str], str, float], ...] = tuple(
    (re.compile(pattern), phase, fraction)
    for pattern, phase, fraction in (
        (r"^Parsing node: ", "Parsing the graph", 0.0),
        (r"^Applying generic optimizations|^Original: \d+ layers", "Optimizing the graph", 0.05),
        (r"^Graph construction and optimization completed|^Constructing optimization profile", "Timing kernels", 0.1),
        (r"^Formats and tactics selection completed", "Laying out memory", 0.92),
        (r"^Engine generation completed", "Writing the engine", 0.98),
    )
)
_LAYERS = re.compile(r"^After (?:final dead-layer|concat) removal: (\d+) layers")
_LAYER_TIMED = re.compile(r"^=+ Computing costs for")
_TIMED_FROM, _TIMED_TO = 0.1, 0.92


class Progress:
    """Phase and fraction of one build; callbacks may come from any thread. The fraction never falls.

    A phase has steps, and in each step other phases may begin: its fraction is (steps done + the fraction of the phase within) / steps.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = ""
        self._fraction = 0.0
        self._open: Dict[str, _Phase] = {}
        self._layers = 0
        self._layers_timed = 0

    def now(self) -> Tuple[str, float]:
        """Innermost phase that began last, fraction 0 to 1 of the build."""
        with self._lock:
            return self._phase, self._fraction

    def start(self, name: str, parent: str, steps: int) -> None:
        with self._lock:
            self._open[name] = _Phase(parent, max(steps, 1))
            self._phase = name

    def step(self, name: str, step: int) -> None:
        with self._lock:
            if name in self._open:
                self._open[name].done = max(self._open[name].done, step + 1)
                self._rise(max((self._share(root) for root, phase in self._open.items() if phase.parent not in self._open), default=0.0))

    def finish(self, name: str) -> None:
        with self._lock:
            phase = self._open.pop(name, None)
            if phase is not None and phase.parent in self._open:
                self._phase = phase.parent

    def read(self, message: str) -> None:
        """A line of the log of a TensorRT without progress monitor."""
        with self._lock:
            layers = _LAYERS.match(message)
            if layers:
                self._layers = int(layers.group(1))
            if _LAYER_TIMED.match(message):
                self._layers_timed += 1
                if self._layers:
                    self._rise(_TIMED_FROM + (_TIMED_TO - _TIMED_FROM) * min(1.0, self._layers_timed / self._layers))
            for pattern, phase, fraction in _LOG_PHASES:
                if pattern.match(message):
                    self._phase = phase
                    self._rise(fraction)

    def _share(self, name: str) -> float:
        phase = self._open[name]
        within = max((self._share(child) for child, other in self._open.items() if other.parent == name and child != name), default=0.0)
        return min(1.0, (phase.done + min(within, 1.0)) / phase.steps)

    def _rise(self, fraction: float) -> None:
        self._fraction = max(self._fraction, min(1.0, fraction))


class _Phase:
    def __init__(self, parent: str, steps: int) -> None:
        self.parent = parent
        self.steps = steps
        self.done = 0
