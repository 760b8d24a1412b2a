"""Changes to cameras while they run, from HTTP and MQTT alike: refused whole with the field named, or kept and carried out.

What is ordered is kept in the state folder (agent/desired.py) and wins over the configuration file's camera of that id, as a whole; `reset`
forgets it, and the file counts again. The other cameras are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio

from agent.cameras.settings import SettingsRefused, checked, merged, with_credentials, workers_field
from agent.desired import DesiredState, Origin
from agent.errors import AgentError
from agent.reconcile import Reconciler
from agent.settling import pipeline_settled
from agent.state import Refused, Running
from models.catalog import CatalogError
from models.manifest import Manifest

CAMERAS_MAX = 64  # as many as a desired document may have


class CameraRefused(AgentError):
    """Nothing was changed. `reason`: invalid, unknown_camera, busy, no_space; `field`: what was wrong, as the sender wrote it."""

    code = "camera_refused"

    def __init__(self, reason: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


class CameraOrders:
    """`lookup` finds a manifest; `settle_s`: how long an order waits for the worker before it says that it is still on its way."""

    def __init__(self, desired: DesiredState, reconciler: Reconciler, lookup: Callable[[str], Manifest], settle_s: float = 15.0) -> None:
        self._desired = desired
        self._reconciler = reconciler
        self._lookup = lookup
        self._settle_s = settle_s
        self._turn = anyio.Lock()  # of writing down: two orders for one camera see each other's result

    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Of all cameras that are wanted, passwords included."""
        return self._desired.value.pipelines

    def origin(self, camera: str) -> Origin:
        return self._desired.origin(camera)

    def is_configured(self, camera: str) -> bool:
        """Whether there is something that `reset` would bring back."""
        return self._desired.configured_pipeline(camera) is not None

    async def replace(self, camera: str, settings: Mapping[str, Any], settle_s: float | None = None) -> bool:
        """Whether the camera runs so; False: it is kept and on its way, such as when its model is still built. Raises CameraRefused."""
        async with self._turn:
            before = self.settings().get(camera)
            wanted = self._checked(camera, with_credentials(settings, before or {}))
            self._want(camera, wanted)
        return await self._settled(camera, wanted, before, settle_s)

    async def change(self, camera: str, patch: Mapping[str, Any], settle_s: float | None = None) -> bool:
        """The same for a JSON Merge Patch (RFC 7396) of what is wanted of the camera now."""
        async with self._turn:
            before = self.settings().get(camera)
            known = before or self._desired.known_pipeline(camera) or {}
            wanted = self._checked(camera, with_credentials(merged(known, patch), known))
            self._want(camera, wanted)
        return await self._settled(camera, wanted, before, settle_s)

    async def remove(self, camera: str) -> None:
        async with self._turn:
            self._known(camera)
            self._want(camera, None)

    async def reset(self, camera: str) -> bool:
        """Forget the orders about a camera; whether the file, or nothing, differs from what was wanted."""
        async with self._turn:
            if self.origin(camera) == "coordinator":
                raise CameraRefused("invalid", f"camera {camera} is the coordinator's; its next document counts, not this node's file")
            before, configured = self.settings().get(camera), self._desired.configured_pipeline(camera)
            if before is None and configured is None:
                raise self._unknown(camera)
            self._want(camera, configured)
            return before != configured

    def _checked(self, camera: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        try:
            wanted = checked(camera, settings)
            manifest = self._lookup(str(wanted["model"]))
        except SettingsRefused as error:
            raise CameraRefused("invalid", str(error), error.field) from error
        except CatalogError as error:
            raise CameraRefused("invalid", f"model: {error}", "model") from error
        if manifest.task != "detection":
            raise CameraRefused(
                "invalid", f"model: {manifest.name} is a model for {manifest.task}; a camera needs one for detection", "model"
            )
        if camera not in self.settings() and len(self.settings()) >= CAMERAS_MAX:
            raise CameraRefused("busy", f"this node has {CAMERAS_MAX} cameras, the most it takes; remove one first")
        return {**wanted, "model": manifest.name}

    def _want(self, camera: str, settings: Mapping[str, Any] | None) -> None:
        with _on_disk():
            self._desired.want_pipeline(camera, settings)
        if settings is not None:
            self._reconciler.retry(str(settings.get("model")), camera)

    async def _settled(self, camera: str, wanted: Mapping[str, Any], before: Mapping[str, Any] | None, settle_s: float | None) -> bool:
        state: Running | Refused | None = None
        with anyio.move_on_after(self._settle_s if settle_s is None else settle_s):
            state = await pipeline_settled(self._reconciler, camera, wanted)
        if not isinstance(state, Refused):
            return state is not None
        async with self._turn:
            if self.settings().get(camera) == wanted:  # else a newer order has taken its place already
                with _on_disk():
                    self._desired.want_pipeline(camera, before)
        raise CameraRefused("invalid", f"{state.message}; nothing was changed"[:1500], workers_field(state.message))

    def _known(self, camera: str) -> Mapping[str, Any]:
        if camera not in self.settings():
            raise self._unknown(camera)
        return self.settings()[camera]

    def _unknown(self, camera: str) -> CameraRefused:
        return CameraRefused("unknown_camera", f"there is no camera {camera}; known are {', '.join(self.settings()) or 'none'}"[:1500])


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CameraRefused("no_space", f"the order cannot be kept: {error}; nothing was changed") from error
