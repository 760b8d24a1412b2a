"""What surrounds a reconciler: a maker of engines and workers that do as a test tells them, in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from agent.desired import DesiredState
from agent.errors import WorkerLost, WorkerRefused
from agent.orders import Orders
from agent.plan import RestPolicy
from agent.preparation import Built, PreparationFailed, Progress, Wish
from agent.reconcile import Reconciler
from agent.state import Asleep, Broken, Desired, NotRenewed, Serving
from agent.supervision.exit_cause import ExitCause
from agent.supervision.state import Running, Stopped, WorkerState
from agent.warmth import Warmth
from agent.worker_protocol import CloseModel, Done, Generate, OpenModel, Request
from models.catalog import CatalogError
from models.manifest import Manifest, manifest_from_mapping
from tests.converters.manifests import detection, generation

PASSED = {"passed": True, "figures": {}}
CHAT = manifest_from_mapping({**generation(), "name": "chat"})
CODE = manifest_from_mapping({**generation(), "name": "code"})
EYES = manifest_from_mapping({**detection(), "name": "eyes"})


@dataclass
class Maker:
    """Answers `prepare` and `renew` in turn with what was laid out for them: an engine, a failure, or an event to wait for first."""

    ready: list[Built | PreparationFailed] = field(default_factory=list)
    wanted: list[Built | PreparationFailed] = field(default_factory=list)
    wishes: list[Wish] = field(default_factory=list)
    gate: anyio.Event | None = None

    async def prepare(self, wish: Wish, progress: Progress) -> Built:
        return await self._make(self.ready, wish, progress)

    async def renew(self, wish: Wish, progress: Progress) -> Built:
        return await self._make(self.wanted, wish, progress)

    async def _make(self, answers: list[Built | PreparationFailed], wish: Wish, progress: Progress) -> Built:
        self.wishes.append(wish)
        progress("convert", 0.5, "fp16: 8.5 says nothing, 61 s")
        if self.gate is not None:
            await self.gate.wait()
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, PreparationFailed):
            raise answer
        return answer


@dataclass
class Hand:
    """A worker that opens what it is given, unless the folder is one that it refuses, has no memory for, or dies of."""

    refuses: set[str] = field(default_factory=set)
    dies_of: set[str] = field(default_factory=set)
    has_no_room_for: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    incarnation: int = 1
    is_up: bool = True
    on_death: Callable[[], None] = lambda: None

    @property
    def state(self) -> WorkerState:
        return Running(1, 0.0, self.incarnation, "3.10", {}) if self.is_up else Stopped()

    async def call(self, message: Request, payload: bytes = b"", deadline_s: float = 30.0) -> tuple[Done, bytes]:
        await anyio.lowlevel.checkpoint()
        if isinstance(message, OpenModel):
            name = Path(message.folder).name
            self.asked.append(f"open {name}")
            if name in self.dies_of:
                self.incarnation += 1
                self.on_death()
                raise WorkerLost("text", ExitCause("segfault", "SIGSEGV"))
            if name in self.refuses:
                raise WorkerRefused("engine", f"{name} cannot be opened")
            if name in self.has_no_room_for:
                raise WorkerRefused("memory", f"{name} needs 500 MiB, but 300 MiB are free")
        elif isinstance(message, CloseModel):
            self.asked.append(f"close {message.model}")
        elif isinstance(message, Generate):
            self.asked.append(f"generate {message.max_tokens}")
        return Done(0, {"provider": "cpu"}), b""


def built(name: str, is_current: bool = True, verdict: dict[str, Any] | None = None) -> Built:
    return Built(Path("/engines") / name, {"verdict": PASSED if verdict is None else verdict}, is_current)


def find(name: str) -> Manifest:
    for manifest in (CHAT, CODE, EYES):
        if manifest.name == name:
            return manifest
    raise CatalogError(f"no model is called {name!r}")


class Workshop:
    """A reconciler at work. `notes` is what it told, `free_bytes` the memory that it sees."""

    def __init__(
        self,
        folder: Path,
        *models: str,
        accepts_unverified: bool = False,
        rest: RestPolicy = RestPolicy(),  # noqa: B008 - frozen
        eye: Hand | None = None,
        pipelines: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.maker, self.hand, self.eye = Maker(), Hand(), eye or Hand()
        self.notes: list[tuple[str, str, str]] = []
        self.desired = DesiredState(Desired(models, pipelines or {}), folder)
        workers = {"text": self.hand, "vision": self.eye}
        self.free_bytes = 1 << 40
        self.reconciler = Reconciler(
            self.desired,
            find,
            self.maker,
            workers,  # type: ignore[arg-type]  # a dict of Hands
            {},
            accepts_unverified,
            rest=rest,
            free_bytes=lambda: self.free_bytes,
        )
        self.warmth = Warmth(self.reconciler, self.hand)
        self.desired.on_change = self.reconciler.wake
        self.hand.on_death = self.reconciler.wake
        self.reconciler.on_note = lambda severity, model, text: self.notes.append((severity, model, text))
        self.is_autonomous = False
        self.orders = Orders(self.desired, self.reconciler, find, {}, lambda: self.is_autonomous)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.reconciler.run)
            yield
            tasks.cancel_scope.cancel()

    async def until(self, holds: Callable[[], Any], what: str) -> Any:
        with anyio.move_on_after(5):
            while not (found := holds()):
                await self.reconciler.next_change()
            return found
        raise AssertionError(f"{what}: {self.reconciler.actual}, {self.notes}")

    def serving(self, model: str = "chat") -> Serving | None:
        state = self.reconciler.actual.models.get(model)
        return state if isinstance(state, Serving) else None

    def asleep(self, model: str = "chat") -> Asleep | None:
        state = self.reconciler.actual.models.get(model)
        return state if isinstance(state, Asleep) else None

    def broken(self, model: str = "chat") -> Broken | None:
        state = self.reconciler.actual.models.get(model)
        return state if isinstance(state, Broken) else None

    def left(self, model: str = "chat") -> NotRenewed | None:
        renewal = self.reconciler.actual.renewals.get(model)
        return renewal if isinstance(renewal, NotRenewed) else None

    async def until_served_by(self, name: str, is_current: bool = True) -> None:
        def is_so() -> bool:
            state = self.serving()
            return state is not None and state.folder.name == name and state.is_current == is_current

        await self.until(is_so, f"served by {name}")
