"""What this node does for the coordinator's commands other than those about the lease: one handler an operation, in a literal table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import anyio
from pydantic import JsonValue

from agent.desired import DesiredState
from agent.link.outcome import CommandFailed, CommandRejected, Handler, Output, Progress
from agent.protocol.operations import (
    DiagCollectArgs,
    ModelDeployArgs,
    ModelRemoveArgs,
    PingArgs,
    PipelineStartArgs,
    PipelineStopArgs,
)
from agent.reconcile import Reconciler
from agent.state import Absent, Broken, ModelState, Prepared, Preparing, Refused, Serving
from models.catalog import CatalogError
from models.manifest import Manifest, manifest_digest

PROGRESS_EVERY_S = 1.0
PIPELINES_MAX = 64  # as many as a desired document may have


class Orders:
    """`lookup` finds a manifest; `diagnostics` gathers one named part of the node's own facts, without secrets.

    What is wanted is written down first and outlives the command: one that is cancelled or runs out of time ends the waiting, not the wish.
    `is_autonomous`: the node serves by its own decision; what it serves with is not changed then (L8).
    """

    def __init__(
        self,
        desired: DesiredState,
        reconciler: Reconciler,
        lookup: Callable[[str], Manifest],
        diagnostics: Mapping[str, Callable[[], JsonValue]],
        is_autonomous: Callable[[], bool],
    ) -> None:
        self._desired = desired
        self._reconciler = reconciler
        self._lookup = lookup
        self._diagnostics = diagnostics
        self._is_autonomous = is_autonomous

    def handlers(self) -> dict[str, Handler]:
        return {
            "ping": self._ping,
            "model.deploy": self._deploy,
            "model.remove": self._remove,
            "pipeline.start": self._start,
            "pipeline.stop": self._stop,
            "diag.collect": self._collect,
        }

    async def _ping(self, args: PingArgs, _progress: Progress) -> Output:
        return {"echo": args.echo}

    async def _deploy(self, args: ModelDeployArgs, progress: Progress) -> Output:
        """Succeeds only once the model serves (C8): a build that nobody can ask is no deployment. A failed one is tried anew, now."""
        self._refuse_while_autonomous()
        manifest = self._manifest(args.name)
        digest = f"sha256:{manifest_digest(manifest)}"
        if args.digest is not None and args.digest != digest:
            raise CommandRejected("digest_mismatch", f"the manifest of {args.name} here has {digest}, not {args.digest}")
        with _on_disk():
            self._desired.want_model(manifest.name, True)
        self._reconciler.retry(manifest.name)
        state: ModelState = Absent()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tell, manifest.name, progress)
            state = await self._reconciler.settled(manifest.name)
            tasks.cancel_scope.cancel()
        if isinstance(state, Serving):
            return {"model": manifest.name, "digest": digest, "verdict": state.record.get("verdict")}
        if isinstance(state, Broken):
            raise CommandFailed("build_failed", state.message[:1500], is_retryable=True)
        raise CommandFailed("interrupted", f"{manifest.name} is no longer wanted: a newer order took its place")

    async def _remove(self, args: ModelRemoveArgs, _progress: Progress) -> Output:
        self._refuse_while_autonomous()
        model = self._known_name(args.name)
        users = [name for name, settings in self._desired.value.pipelines.items() if settings.get("model") == model]
        if users:
            raise CommandRejected("busy", f"{model} is what the pipelines {', '.join(users)} see with; stop them first")
        if model in self._desired.value.models:
            with _on_disk():
                self._desired.want_model(model, False)
        await self._reconciler.gone(model)
        return {"model": model}

    async def _start(self, args: PipelineStartArgs, _progress: Progress) -> Output:
        """Succeeds once the worker has taken the pipeline; its camera may still be out of reach. One refused leaves what was before."""
        known = dict(self._desired.known_pipeline(args.id) or {})
        given = {"source": args.source, "model": args.model}
        settings = {**known, **{key: value for key, value in given.items() if value is not None}, **args.settings, "id": args.id}
        missing = [name for name in ("source", "model") if not settings.get(name)]
        if missing:
            raise CommandRejected("invalid", f"pipeline {args.id} is not known here, so {' and '.join(missing)} must be given")
        manifest = self._manifest(str(settings["model"]))
        if manifest.task != "detection":
            raise CommandRejected("invalid", f"{manifest.name} is a model for {manifest.task}; a pipeline needs one for detection")
        settings["model"] = manifest.name
        before = self._desired.value.pipelines.get(args.id)
        if before is None and len(self._desired.value.pipelines) >= PIPELINES_MAX:
            raise CommandRejected("busy", f"this node has {PIPELINES_MAX} pipelines, the most it takes; stop one first")
        with _on_disk():
            self._desired.want_pipeline(args.id, settings)
        self._reconciler.retry(manifest.name, args.id)
        state = await self._reconciler.pipeline_settled(args.id, settings)
        if isinstance(state, Refused):
            if self._desired.value.pipelines.get(args.id) == settings:
                with _on_disk():
                    self._desired.want_pipeline(args.id, before)
            raise CommandFailed("invalid", f"pipeline {args.id} does not start: {state.message}"[:1500])
        return {"pipeline": args.id}

    async def _stop(self, args: PipelineStopArgs, _progress: Progress) -> Output:
        known = self._desired.value.pipelines
        if args.id not in known:
            raise CommandRejected("invalid", f"there is no pipeline {args.id}; known are {', '.join(known) or 'none'}"[:1500])
        with _on_disk():
            self._desired.want_pipeline(args.id, None)
        return {"pipeline": args.id}

    async def _collect(self, args: DiagCollectArgs, _progress: Progress) -> Output:
        return {part: self._diagnostics[part]() for part in args.parts if part in self._diagnostics}

    async def _tell(self, model: str, progress: Progress) -> None:
        while True:
            state = self._reconciler.actual.models.get(model)
            if isinstance(state, Preparing):
                await progress(state.fraction, state.phase)
            elif isinstance(state, Prepared):
                await progress(None, "waits for its worker")
            await anyio.sleep(PROGRESS_EVERY_S)

    def _refuse_while_autonomous(self) -> None:
        if self._is_autonomous():
            raise CommandRejected(
                "busy", "the node serves autonomously and keeps its models; give it a lease or standby first", is_retryable=True
            )

    def _manifest(self, name: str) -> Manifest:
        try:
            return self._lookup(name)
        except CatalogError as error:
            raise CommandRejected("invalid", str(error)) from error

    def _known_name(self, name: str) -> str:
        """A model's own name for an alias; what the catalogue does not know any more may still have to go."""
        try:
            return self._lookup(name).name
        except CatalogError:
            return name


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandFailed("no_space", f"the order cannot be kept: {error}", is_retryable=True) from error
