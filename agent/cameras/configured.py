"""The cameras of the configuration file, while the node runs: an edited file counts without a restart, one that cannot be used does not."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread

from agent.cameras.settings import SettingsRefused, checked
from agent.config import ConfigurationError, Settings, load_settings
from agent.desired import DesiredState
from agent.protocol.wire import Severity
from agent.state import Desired

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0


def refuse_bad_cameras(pipelines: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ConfigurationError that names every camera that the worker would refuse, and its field."""
    problems = []
    for camera, settings in pipelines.items():
        try:
            checked(camera, settings)
        except SettingsRefused as error:
            problems.append(f"camera {camera}: {error}")
    if problems:
        raise ConfigurationError("; ".join(problems))


def configured(settings: Settings) -> Desired:
    """What the configuration alone wants to run."""
    return Desired(settings.models.serve, {camera.id: camera.pipeline() for camera in settings.cameras})


class ConfigurationWatch:
    """Reads the file anew when it has changed or SIGHUP comes. Only cameras take effect at once; `on_note` is told of all else.

    `check` is what a start asks of a configuration (agent/preflight.py). A file that is refused changes
    nothing: a start goes on without a camera that cannot be, but here there is something better to go on with.
    """

    def __init__(
        self,
        file: Path,
        settings: Settings,
        check: Callable[[Settings], Settings],
        desired: DesiredState,
        on_note: Callable[[Severity, str], None],
    ) -> None:
        self._file = file
        self._settings = settings
        self._check = check
        self._desired = desired
        self._on_note = on_note

    async def run(self) -> None:
        seen = await to_thread.run_sync(self._stamp)
        with anyio.open_signal_receiver(signal.SIGHUP) as hangups:
            async with anyio.create_task_group() as tasks:

                async def listen() -> None:
                    async for _ in hangups:
                        await self._reload()

                tasks.start_soon(listen)
                while True:
                    await anyio.sleep(LOOK_EVERY_S)
                    now = await to_thread.run_sync(self._stamp)
                    if now is not None and now != seen:  # while an editor replaces it, it may not be there
                        seen = now
                        await self._reload()

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            facts = os.stat(self._file)  # noqa: PTH116 - three figures of one moment
        except OSError:
            return None
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    async def _reload(self) -> None:
        try:
            settings = await to_thread.run_sync(lambda: self._check(load_settings(self._file)))
            refuse_bad_cameras(configured(settings).pipelines)
        except ConfigurationError as error:
            logger.warning("the configuration is not taken: %s", error)
            self._on_note("error", f"the edited configuration is not taken: {error}"[:1000])
            return
        if self._desired.reconfigure(Desired(self._settings.models.serve, configured(settings).pipelines)):
            logger.info("the cameras of %s are taken anew", self._file)
            self._on_note("info", f"cameras are as {self._file.name} says now, except where an order says otherwise")
        if settings.model_copy(update={"cameras": ()}) != self._settings.model_copy(update={"cameras": ()}):
            self._on_note("warning", f"{self._file.name} has changed beyond its cameras; the rest counts from the next start on")
