"""What this node does for the coordinator's commands other than those about the lease: one handler an operation, in a literal table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio
from pydantic import JsonValue

from agent.cameras.settings import SettingsRefused, checked
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
from agent.settling import model_gone, model_settled, pipeline_settled
from agent.state import Absent, Asleep, Broken, ModelState, NotRenewed, Prepared, Preparing, Refused, Renewing, Serving
from models.catalog import CatalogError
from models.manifest import Manifest, manifest_digest

PROGRESS_EVERY_S = 1.0
STEP_CHARACTERS = 128
PIPELINES_MAX = 64  # as many as a desired document may have


class Orders:
    """`lookup` finds a manifest; `diagnostics` gathers one named part of the node's own facts, without secrets.

    What is wanted is written down first and outlives the command: one that runs out of time ends the waiting, not the wish. Only an order
    that is cancelled takes its wish back.
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
        self._deploying: set[str] = set()

    def handlers(self) -> dict[str, Handler]:
        return {
            "ping": self._ping,
            "model.deploy": self._deploy,
            "model.remove": self._remove,
            "pipeline.start": self._start,
            "pipeline.stop": self._stop,
            "diag.collect": self._collect,
        }

    def cancellers(self) -> dict[str, Callable[[Any], None]]:
        return {"model.deploy": self._cancelled}

    def _cancelled(self, args: ModelDeployArgs) -> None:
        if args.name in self._deploying:  # else it waited for its turn, and nothing was begun
            self.withdraw(args.name)

    async def _ping(self, args: PingArgs, _progress: Progress) -> Output:
        return {"echo": args.echo}

    def order(self, args: ModelDeployArgs) -> Manifest:
        """Write down that a model is wanted, and how it is to be built; a failed or cancelled build is due now. Raises CommandFailed."""
        self._refuse_while_autonomous()
        manifest = self._manifest(args.name)
        if args.digest is not None and args.digest != _digest(manifest):
            raise CommandRejected("digest_mismatch", f"the manifest of {args.name} here has {_digest(manifest)}, not {args.digest}")
        with _on_disk():
            self._desired.want_model(manifest.name, True, _build(args))
        self._reconciler.retry(manifest.name)
        return manifest

    def withdraw(self, name: str) -> bool:
        """End the build of a model; whether there was one. A model that an order alone wanted, and that serves nothing yet, is no longer
        wanted. Raises CommandFailed."""
        model = self._known_name(name)
        has_ended = self._reconciler.cancel(model)
        if self._desired.is_ordered(model) and not isinstance(self._reconciler.models.get(model), Prepared | Serving | Asleep):
            with _on_disk():
                self._desired.want_model(model, False)
        return has_ended

    async def _deploy(self, args: ModelDeployArgs, progress: Progress) -> Output:
        """Succeeds only once the model serves (C8): a build that nobody can ask is no deployment. An order that says how it is to be built
        is carried out once the engine that was built so serves."""
        manifest = self.order(args)
        state: ModelState | NotRenewed = Absent()
        self._deploying.add(args.name)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._tell, manifest.name, progress)
                state = await model_settled(self._reconciler, manifest.name, must_be_current=bool(_build(args)))
                tasks.cancel_scope.cancel()
        finally:
            self._deploying.discard(args.name)
        if isinstance(state, Serving):
            return {"model": manifest.name, "digest": _digest(manifest), "engine": state.folder.name, "verdict": _told(state.record)}
        if isinstance(state, Broken):
            raise CommandFailed("build_failed", state.message[:1500], is_retryable=True)
        if isinstance(state, NotRenewed):
            raise CommandFailed("build_failed", f"the engine before goes on serving: {state.message}"[:1500], is_retryable=True)
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
        self._reconciler.cancel(model)
        await model_gone(self._reconciler, model)
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
        try:
            settings = {**checked(args.id, {**settings, "model": manifest.name}), "id": args.id}
        except SettingsRefused as error:
            raise CommandRejected("invalid", f"pipeline {args.id}: {error}"[:1500], output={"field": error.field}) from error
        before = self._desired.value.pipelines.get(args.id)
        if before is None and len(self._desired.value.pipelines) >= PIPELINES_MAX:
            raise CommandRejected("busy", f"this node has {PIPELINES_MAX} pipelines, the most it takes; stop one first")
        with _on_disk():
            self._desired.want_pipeline(args.id, settings)
        self._reconciler.retry(manifest.name, args.id)
        state = await pipeline_settled(self._reconciler, args.id, settings)
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
            actual = self._reconciler.actual
            state, renewal = actual.models.get(model), actual.renewals.get(model)
            if isinstance(state, Preparing):
                await progress(state.fraction, _step(state))
            elif isinstance(renewal, Renewing):
                await progress(renewal.fraction, _step(renewal))
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


def _digest(manifest: Manifest) -> str:
    return f"sha256:{manifest_digest(manifest)}"


def _step(build: Preparing | Renewing) -> str:
    """The phase, and what goes on in it, in the length that a result's step may have."""
    return (f"{build.phase}: {build.message}" if build.message else build.phase)[:STEP_CHARACTERS]


def _build(args: ModelDeployArgs) -> dict[str, Any]:
    return args.model_dump(include={"precision", "target", "calibration", "accept_unverified"}, exclude_none=True)


def _told(record: Mapping[str, Any]) -> JsonValue:
    """The verdict without what would make a message too long: the notes and the tensors of its attempts."""
    verdict = dict(record.get("verdict", {}))
    attempts = verdict.get("attempts", ())
    verdict["attempts"] = [{key: attempt.get(key) for key in ("precision", "status", "reason")} for attempt in attempts]
    told: JsonValue = json.loads(json.dumps(verdict), parse_constant=lambda _: None)
    return told


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandFailed("no_space", f"the order cannot be kept: {error}", is_retryable=True) from error
