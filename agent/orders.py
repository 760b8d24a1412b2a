"""What this node does for the coordinator's commands other than those about the lease: one handler an operation, in a literal table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
from agent.state import Broken, Preparing, Refused, Serving
from models.catalog import CatalogError
from models.manifest import Manifest, manifest_digest

PROGRESS_EVERY_S = 1.0


class Orders:
    """`lookup` finds a manifest; `diagnostics` gathers one named part of the node's own facts, without secrets."""

    def __init__(
        self,
        desired: DesiredState,
        reconciler: Reconciler,
        lookup: Callable[[str], Manifest],
        diagnostics: Mapping[str, Callable[[], JsonValue]],
    ) -> None:
        self._desired = desired
        self._reconciler = reconciler
        self._lookup = lookup
        self._diagnostics = diagnostics

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
        """Succeeds only once the model serves (C8): a build that nobody can ask is no deployment."""
        manifest = self._manifest(args.name)
        digest = f"sha256:{manifest_digest(manifest)}"
        if args.digest is not None and args.digest != digest:
            raise CommandRejected("digest_mismatch", f"the manifest of {args.name} here has {digest}, not {args.digest}")
        self._desired.want_model(manifest.name, True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tell, manifest.name, progress)
            state = await self._reconciler.settled(manifest.name)
            tasks.cancel_scope.cancel()
        if isinstance(state, Broken):
            raise CommandFailed("build_failed", state.message[:1500], is_retryable=True)
        verdict: Any = state.record.get("verdict") if isinstance(state, Serving) else None
        return {"model": manifest.name, "digest": digest, "verdict": verdict}

    async def _remove(self, args: ModelRemoveArgs, _progress: Progress) -> Output:
        users = [name for name, settings in self._desired.value.pipelines.items() if settings.get("model") == args.name]
        if users:
            raise CommandRejected("busy", f"{args.name} is what the pipelines {', '.join(users)} see with; stop them first")
        self._desired.want_model(args.name, False)
        self._reconciler.wake()
        await self._reconciler.gone(args.name)
        return {"model": args.name}

    async def _start(self, args: PipelineStartArgs, _progress: Progress) -> Output:
        known = dict(self._desired.known_pipeline(args.id) or {})
        given = {"source": args.source, "model": args.model}
        settings = {**known, "id": args.id, **{key: value for key, value in given.items() if value is not None}, **args.settings}
        missing = [name for name in ("source", "model") if not settings.get(name)]
        if missing:
            raise CommandRejected("invalid", f"pipeline {args.id} is not known here, so {' and '.join(missing)} must be given")
        self._manifest(str(settings["model"]))
        self._desired.want_pipeline(args.id, settings)
        state = await self._reconciler.pipeline_settled(args.id, settings)
        if isinstance(state, Refused):
            self._desired.want_pipeline(args.id, None)
            raise CommandFailed("invalid", f"pipeline {args.id} does not start: {state.message}"[:1500])
        return {"pipeline": args.id}

    async def _stop(self, args: PipelineStopArgs, _progress: Progress) -> Output:
        if args.id not in self._desired.value.pipelines:
            raise CommandRejected(
                "invalid", f"there is no pipeline {args.id}; known are {', '.join(self._desired.value.pipelines) or 'none'}"
            )
        self._desired.want_pipeline(args.id, None)
        return {"pipeline": args.id}

    async def _collect(self, args: DiagCollectArgs, _progress: Progress) -> Output:
        return {part: self._diagnostics[part]() for part in args.parts if part in self._diagnostics}

    async def _tell(self, model: str, progress: Progress) -> None:
        while True:
            state = self._reconciler.actual.models.get(model)
            if isinstance(state, Preparing):
                await progress(state.fraction, state.phase)
            await anyio.sleep(PROGRESS_EVERY_S)

    def _manifest(self, name: str) -> Manifest:
        try:
            return self._lookup(name)
        except CatalogError as error:
            raise CommandRejected("invalid", str(error)) from error
