"""Keeps the engines that this node serves, or is about to, from being removed by whoever makes room in the store."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from agent.state import Actual, Asleep, Prepared, Renewed, Serving
from models.store import Store


def folders_in_use(actual: Actual) -> frozenset[Path]:
    states = (*actual.models.values(), *actual.renewals.values())
    return frozenset(state.folder for state in states if isinstance(state, Prepared | Serving | Asleep | Renewed))


class EngineLocks:
    """`hold` may be called from a thread, `keep` from the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._held: dict[Path, ExitStack] = {}
        self._fresh: Path | None = None

    def hold(self, folder: Path) -> None:
        """Until `keep` has seen it in use, and then not. Blocks while somebody is removing it."""
        self._fresh = folder
        if folder not in self._held:
            lock = ExitStack()
            lock.enter_context(self._store.in_use(folder.name))
            self._held[folder] = lock

    def keep(self, in_use: Collection[Path]) -> None:
        if self._fresh in in_use:
            self._fresh = None
        for folder in [folder for folder in self._held if folder not in in_use and folder != self._fresh]:
            self._held.pop(folder).close()
