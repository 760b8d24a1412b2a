"""A model from its manifest to a verified engine folder: what can serve at once, and what is wanted in the end."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from anyio import to_thread

from agent.build_choice import BuildChoice, Machine, Provider, choices, is_like, quick_choice, usable
from agent.build_process import run_build
from agent.config import ConvertSettings, Settings
from agent.engine_locks import EngineLocks
from agent.fetching import fetch_all
from agent.preparation import Built, NotVerified, PreparationFailed, Progress, Wish, is_verified
from agent.runtimes import look_around
from models.checksums import damage_of
from models.durable import StoreError, sweep
from models.engine_record import StoredEngine, read_engine
from models.manifest import Manifest
from models.record import to_mapping
from models.sources import SourceError
from models.store import Store, mark_used
from models.upkeep import discard_torn_engines, discard_torn_files, make_room, repair_engine

logger = logging.getLogger(__name__)

GIGABYTE = 10**9
FETCH_SHARE = 0.5
GRACE_S = 10.0  # the converter ends itself at its time limit; this is for one that does not


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """The same for every build of this machine: the interpreter that has its runtime, threads, niceness, time limit, and what ONNX Runtime
    is to serve with."""

    python: Path = Path(sys.executable)
    threads: int = 2
    nice: int = 10
    timeout_s: float = 7200.0
    workspace_share: float = 0.5
    provider: Provider = "cpu"


def build_settings(settings: Settings) -> BuildSettings:
    convert, worker = settings.convert, settings.worker
    python = Path(shutil.which(worker.python) or worker.python)
    return BuildSettings(python, worker.threads or 2, convert.nice, convert.timeout_s, convert.workspace_share, worker.provider)


async def prepare_model(store: Store, settings: BuildSettings, choice: BuildChoice, manifest: Manifest, progress: Progress) -> Built:
    """Fetch what is missing, build unless the store has the engine. Raises PreparationFailed with the reason in words."""
    is_here = all(store.find(file) is not None for file in manifest.files.values())
    share = 0.0 if is_here else FETCH_SHARE

    def fetching(phase: str, fraction: float, message: str = "") -> None:
        progress(phase, share * fraction, message)

    def building(phase: str, fraction: float, message: str = "") -> None:
        progress(phase, share + (1 - share) * fraction, message)

    try:
        sources = await fetch_all(store, manifest, fetching)
    except (SourceError, StoreError, OSError) as error:
        raise PreparationFailed(str(error), "no_source") from error
    with ExitStack() as stack:
        for path in sources.values():  # in this thread: whoever removes an artefact has it for a moment only
            stack.enter_context(store.in_use(path.name))
        try:
            result = await run_build(_request(store, settings, choice, manifest, sources), building, settings.timeout_s + GRACE_S)
        finally:
            sweep(store.root / "temporary")  # of a build that had to be killed
    folder = Path(str(result["folder"]))
    engine = await to_thread.run_sync(read_engine, folder)
    if engine is None:
        raise PreparationFailed(f"the engine that was built in {folder} is not whole; was it removed meanwhile?")
    built = Built(folder, to_mapping(engine.record))
    if not is_verified(built.record) and not choice.accept_unverified:
        raise PreparationFailed(str(NotVerified(manifest.name, folder, built.record)), "not_the_same_model")
    return built


def _request(
    store: Store, settings: BuildSettings, choice: BuildChoice, manifest: Manifest, sources: Mapping[str, Path]
) -> Mapping[str, object]:
    return {
        "manifest": to_mapping(manifest),
        "sources": {role: str(path) for role, path in sources.items()},
        "store": str(store.root),
        "options": {
            "target": choice.target,
            "provider": choice.provider,
            "precision": choice.precision,
            "calibration": None if choice.calibration is None else str(choice.calibration),
            "accept_unverified": choice.accept_unverified,
            "workspace_share": settings.workspace_share,
            "python": str(settings.python),
            "threads": max(1, settings.threads),
            "nice": settings.nice,
            "timeout_s": settings.timeout_s,
        },
    }


async def build_first(
    store: Store, settings: BuildSettings, wanted: Sequence[BuildChoice], manifest: Manifest, progress: Progress
) -> Built:
    return await first_built(wanted, lambda choice: prepare_model(store, settings, choice, manifest, progress))


async def first_built(wanted: Sequence[BuildChoice], build: Callable[[BuildChoice], Awaitable[Built]]) -> Built:
    """The first of what is wanted that this machine and the converter have."""
    for choice in wanted[:-1]:
        try:
            return await build(choice)
        except PreparationFailed as failure:
            if failure.code != "unsupported":
                raise
            logger.info("not built for %s: %s", choice.target, failure)
    return await build(wanted[-1])


class Preparer:
    """The Preparation of a node, which asks for one thing at a time. `look_around` is asked once; `pinned` gives the models and artefacts
    (by digest) that are wanted and do not go to make room."""

    def __init__(
        self,
        store: Store,
        convert: ConvertSettings,
        settings: BuildSettings,
        look_around: Callable[[], Awaitable[Machine]],
        budget_bytes: int | None,
        pinned: Callable[[], Collection[str]],
    ) -> None:
        self._store = store
        self._convert = convert
        self._settings = settings
        self._look_around = look_around
        self._machine: Machine | None = None
        self._budget_bytes = budget_bytes
        self._pinned = pinned
        self.locks = EngineLocks(store)

    async def prepare(self, wish: Wish, progress: Progress) -> Built:
        """An engine of the store, else a quick one for ONNX Runtime where the wanted one takes long, else the wanted one."""
        machine = await self._surroundings()
        quick, refusal = quick_choice(self._convert, wish.build), None
        wanted: tuple[BuildChoice, ...] = ()
        try:
            wanted = choices(self._convert, wish.build, machine, wish.manifest, provider=self._settings.provider)
        except PreparationFailed as failure:
            refusal = failure
        found = await to_thread.run_sync(self._find, wish, wanted[0] if wanted else quick, machine)
        if found is not None:
            return Built(found.folder, to_mapping(found.record), is_current=False)
        if not wanted or wanted[0].is_slow:
            try:
                return replace(await self._build(wish, quick, progress), is_current=False)
            except PreparationFailed as failure:
                logger.warning("model %s has no quick engine and serves once the wanted one is built: %s", wish.manifest.name, failure)
        if refusal is not None:
            raise refusal
        return await first_built(wanted, lambda choice: self._build(wish, choice, progress))

    async def renew(self, wish: Wish, progress: Progress) -> Built:
        machine = await self._surroundings()
        wanted = choices(self._convert, wish.build, machine, wish.manifest, provider=self._settings.provider)
        serving = await to_thread.run_sync(read_engine, wish.serving) if wish.serving is not None else None
        is_here = all(self._store.find(file) is not None for file in wish.manifest.files.values())
        if serving is not None and not is_here and not wish.build and is_like(serving.record.key, wanted[0], machine):
            return Built(serving.folder, to_mapping(serving.record))  # not worth a download to hear that it is the same
        return await first_built(wanted, lambda choice: self._build(wish, choice, progress))

    async def _surroundings(self) -> Machine:
        if self._machine is None:
            self._machine = await self._look_around()
        return self._machine

    async def _build(self, wish: Wish, choice: BuildChoice, progress: Progress) -> Built:
        manifest = wish.manifest
        needed_bytes = await to_thread.run_sync(self._needed_bytes, manifest, choice, await self._surroundings())
        await to_thread.run_sync(self._make_room, needed_bytes)
        try:
            built = await prepare_model(self._store, self._settings, choice, manifest, progress)
        except PreparationFailed as failure:
            if not await to_thread.run_sync(self._has_remedy, failure, manifest):
                raise
            built = await prepare_model(self._store, self._settings, choice, manifest, progress)
        await to_thread.run_sync(self.locks.hold, built.folder)
        await to_thread.run_sync(self._make_room, 0)
        return built

    def _find(self, wish: Wish, choice: BuildChoice, machine: Machine) -> StoredEngine | None:
        """The best engine that can serve now, held; damaged ones of the model are removed on the way."""
        name = wish.manifest.name
        for folder in wish.distrusted:
            if repair_engine(self._store, folder):
                logger.warning("the engine %s of %s was damaged and has been removed", folder.name, name)
        for folder in discard_torn_engines(self._store, name):
            logger.warning("the engine %s of %s was torn and has been removed", folder.name, name)
        engines = [engine for engine in self._store.engines(name) if engine.folder not in wish.distrusted]
        sources = {role: self._store.expected_sha256(file) for role, file in wish.manifest.files.items()}
        for engine in usable(engines, wish.manifest, sources, choice, machine):
            damage = damage_of(engine.folder)
            if damage is not None:
                logger.warning("the engine %s of %s %s", engine.folder.name, name, damage)
                repair_engine(self._store, engine.folder)
                continue
            self.locks.hold(engine.folder)
            if read_engine(engine.folder) is not None:  # else somebody removed it just now
                mark_used(engine.folder)
                return engine
        return None

    def _needed_bytes(self, manifest: Manifest, choice: BuildChoice, machine: Machine) -> int:
        """What is still to be fetched, and about as much again for an engine that is not there."""
        files = manifest.files.values()
        missing = sum(file.size_bytes for file in files if self._store.find(file) is None)
        is_there = any(is_like(engine.record.key, choice, machine) for engine in self._store.engines(manifest.name))
        return missing + (0 if is_there else sum(file.size_bytes for file in files))

    def _make_room(self, needed_bytes: int) -> list[Path]:
        try:
            gone = make_room(self._store, needed_bytes, self._budget_bytes, self._pinned())
        except (StoreError, OSError) as error:
            logger.warning("no room could be made in %s: %s", self._store.root, error)
            return []
        for path in gone:
            logger.info("%s was removed from the store to make room", path)
        return gone

    def _has_remedy(self, failure: PreparationFailed, manifest: Manifest) -> bool:
        """Whether another attempt may go better: something was in the way and is gone, a damaged artefact will be fetched again."""
        if failure.code == "no_space":
            return bool(self._make_room(4 * sum(file.size_bytes for file in manifest.files.values())))
        if failure.code == "bad_file":
            return bool(discard_torn_files(self._store, manifest))
        return False


def preparer_of(settings: Settings, store: Store, pinned: Callable[[], Collection[str]]) -> Preparer:
    look = partial(look_around, settings.worker.python)
    return Preparer(store, settings.convert, build_settings(settings), look, int(settings.models.budget_gb * GIGABYTE) or None, pinned)
