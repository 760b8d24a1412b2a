"""Which engine folders have earned distrust: workers could not open them, or died while they did."""

from __future__ import annotations

from pathlib import Path

from agent.errors import WorkerLost
from agent.supervision.exit_cause import Kind

# An engine that ends its worker while it is loaded takes the others of that worker with it: after so many deaths it has to wait.
LETHAL_OPENS = 2
LETHAL: frozenset[Kind] = frozenset({"segfault", "aborted", "out_of_memory", "hang", "exit"})


class EngineTrust:
    def __init__(self) -> None:
        self._distrusted: dict[str, frozenset[Path]] = {}
        self._deaths: dict[tuple[str, Path], set[int]] = {}

    def distrusted(self, model: str) -> frozenset[Path]:
        return self._distrusted.get(model, frozenset())

    def distrust(self, model: str, folder: Path) -> None:
        self._distrusted[model] = self.distrusted(model) | {folder}

    def is_deadly(self, model: str, folder: Path, incarnation: int, lost: WorkerLost) -> bool:
        """A death is the supervisor's business, and the model is opened again; not for ever, if it is the engine that kills."""
        if lost.cause.kind not in LETHAL:
            return False
        deaths = self._deaths.setdefault((model, folder), set())
        deaths.add(incarnation)
        if len(deaths) < LETHAL_OPENS:
            return False
        del self._deaths[model, folder]
        return True

    def forget(self, model: str) -> None:
        """It serves now, or is not wanted, or somebody asks for a new beginning."""
        self._distrusted.pop(model, None)
        for key in [key for key in self._deaths if key[0] == model]:
            del self._deaths[key]
