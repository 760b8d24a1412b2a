"""What is asked of models, and how often they left memory and came back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import anyio

from agent.plan import QUIET_S, RestPolicy
from agent.state import SleepReason, Use


class Uses:
    """What reconciliation knows of the use of models. `unloads` and `reloads` count since the start; `is_crowded`: one that was asked for
    does not fit."""

    def __init__(self, policy: RestPolicy, free_bytes: Callable[[], int | None]) -> None:
        self.policy = policy
        self.unloads: Counter[tuple[str, SleepReason]] = Counter()
        self.reloads: Counter[str] = Counter()
        self.is_crowded = False
        self._free_bytes = free_bytes
        self._uses: dict[str, Use] = {}

    @property
    def now(self) -> dict[str, Use]:
        return dict(self._uses)

    def free_bytes(self) -> int | None:
        """None where nobody cares; nothing is free while one that was asked for does not fit."""
        if not self.policy.keep_free_bytes:
            return None
        return 0 if self.is_crowded else self._free_bytes()

    @contextmanager
    def using(self, model: str) -> Iterator[None]:
        use = self._uses.get(model, Use(0.0))
        self._uses[model] = Use(anyio.current_time(), use.in_flight + 1)
        try:
            yield
        finally:
            self._uses[model] = Use(anyio.current_time(), self._uses[model].in_flight - 1)

    def begin(self, model: str) -> None:
        """It is loaded: its rest begins."""
        self._uses[model] = replace(self._uses.get(model, Use(0.0)), last_s=anyio.current_time())

    def forget(self, model: str) -> None:
        if model in self._uses and not self._uses[model].in_flight:
            del self._uses[model]

    def is_at_work(self, model: str) -> bool:
        return model in self._uses and self._uses[model].in_flight > 0

    def has_rested(self, model: str) -> bool:
        """Nobody has used it for a while."""
        use = self._uses.get(model, Use(0.0))
        return not use.in_flight and anyio.current_time() - use.last_s >= QUIET_S

    def unloaded(self, model: str, reason: SleepReason) -> str:
        """Count it, and say why in words."""
        self.unloads[model, reason] += 1
        return f"nobody asked for it for {self.policy.idle_s:g} s" if reason == "idle" else "memory is short"
