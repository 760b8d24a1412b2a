"""What should run on this node: the configuration, changed by orders that outlive a restart.

Orders (deploy, remove, start, stop) are kept as differences to the configuration in one small file, so that an edited configuration still
counts; a whole document from the coordinator takes the place of both models and pipelines.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from agent.state import Desired
from models.durable import write_atomically

logger = logging.getLogger(__name__)

FILE_NAME = "desired.json"
FOR_US_ALONE = 0o600  # passwords of cameras are in it
Origin = Literal["configuration", "order", "coordinator"]


@dataclass(frozen=True, slots=True)
class Changes:
    """Differences to the configuration: model → wanted or not, pipeline → settings or None for stopped, model → how it is to be built."""

    revision: int = 0
    is_whole: bool = False
    models: Mapping[str, bool] = field(default_factory=dict)
    pipelines: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    builds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def apply(configured: Desired, changes: Changes) -> Desired:
    """The configuration with the orders carried out; a whole document starts from nothing."""
    models = [] if changes.is_whole else list(configured.models)
    for model, wanted in changes.models.items():
        if wanted and model not in models:
            models.append(model)
        elif not wanted and model in models:
            models.remove(model)
    pipelines = {} if changes.is_whole else dict(configured.pipelines)
    for pipeline, settings in changes.pipelines.items():
        if settings is None:
            pipelines.pop(pipeline, None)
        else:
            pipelines[pipeline] = settings
    return Desired(tuple(models), pipelines, changes.revision, changes.builds)


class DesiredState:
    """Holds the changes, durably: every change is on the disk before anything acts on it."""

    def __init__(self, configured: Desired, folder: Path, on_change: Callable[[], None] = lambda: None) -> None:
        self._configured = configured
        self._file = folder / FILE_NAME
        self._changes = _read(self._file)
        self.on_change = on_change

    @property
    def value(self) -> Desired:
        return apply(self._configured, self._changes)

    def want_model(self, model: str, wanted: bool, build: Mapping[str, Any] | None = None) -> None:
        """`build`: how its engine is to be built, in the place of what an earlier order said; None leaves that, empty forgets it.

        Raises OSError, with nothing changed, when the disk does not take it; so does every other change.
        """
        models = {**self._changes.models, model: wanted}
        if wanted == (model in self._base.models):  # nothing is left to differ in
            del models[model]
        builds = dict(self._changes.builds)
        if build is not None:
            builds[model] = dict(build)
        if not wanted or not builds.get(model):
            builds.pop(model, None)
        self._write(replace(self._changes, models=models, builds=builds))

    def is_ordered(self, model: str) -> bool:
        """Whether it is wanted for an order alone, and not for the configuration or the coordinator's document."""
        return self._changes.models.get(model) is True and not self._changes.is_whole

    def want_pipeline(self, pipeline: str, settings: Mapping[str, Any] | None) -> None:
        pipelines = {**self._changes.pipelines, pipeline: settings}
        if settings == self._base.pipelines.get(pipeline):
            del pipelines[pipeline]
        self._write(replace(self._changes, pipelines=pipelines))

    def origin(self, pipeline: str) -> Origin:
        """Whose settings of a pipeline count."""
        if self._changes.is_whole and pipeline in self._changes.pipelines:
            return "coordinator"
        return "order" if pipeline in self._changes.pipelines else "configuration"

    def configured_pipeline(self, pipeline: str) -> Mapping[str, Any] | None:
        """What the configuration says of it, whatever was ordered since."""
        return self._base.pipelines.get(pipeline)

    def reconfigure(self, configured: Desired) -> bool:
        """The configuration has changed; orders go on winning over it. Whether anything is wanted otherwise than before."""
        before, self._configured = self.value, configured
        if is_news := self.value != before:
            self.on_change()
        return is_news

    @property
    def _base(self) -> Desired:
        return Desired() if self._changes.is_whole else self._configured

    def known_pipeline(self, pipeline: str) -> Mapping[str, Any] | None:
        """Settings of a pipeline that is or once was wanted, so that it can be started by its id alone."""
        return self._changes.pipelines.get(pipeline) or self._configured.pipelines.get(pipeline)

    def take(self, revision: int, models: tuple[str, ...], pipelines: Mapping[str, Mapping[str, Any]]) -> bool:
        """Adopt the coordinator's whole document unless it is older than the one adopted last; whether it was news."""
        if revision <= self._changes.revision:
            return False
        self._write(Changes(revision, True, dict.fromkeys(models, True), dict(pipelines)))
        return True

    def _write(self, changes: Changes) -> None:
        document = {
            "revision": changes.revision,
            "is_whole": changes.is_whole,
            "models": dict(changes.models),
            "pipelines": {key: dict(value) if value is not None else None for key, value in changes.pipelines.items()},
            "builds": {key: dict(value) for key, value in changes.builds.items()},
        }
        write_atomically(self._file, json.dumps(document, indent=1).encode(), FOR_US_ALONE)
        self._changes = changes
        self.on_change()


def _read(file: Path) -> Changes:
    try:
        with suppress(PermissionError):
            file.chmod(FOR_US_ALONE)  # of an earlier version it may be anybody's to read
        document = json.loads(file.read_bytes())
        pipelines = {name: None if settings is None else dict(settings) for name, settings in document["pipelines"].items()}
        models = {name: bool(wanted) for name, wanted in document["models"].items()}
        builds = {name: dict(build) for name, build in document.get("builds", {}).items()}
        return Changes(int(document["revision"]), bool(document["is_whole"]), models, pipelines, builds)
    except FileNotFoundError:
        return Changes()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = file.with_suffix(".damaged")
        file.replace(aside)
        logger.error("%s is damaged (%s); it was moved to %s and the configuration alone counts", file, error, aside)  # noqa: TRY400
        return Changes()
