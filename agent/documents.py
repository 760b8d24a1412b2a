"""The coordinator's desired documents: taken whole or refused whole, and told which."""

from __future__ import annotations

import logging
from collections.abc import Callable

from agent.cameras.configured import refuse_bad_cameras
from agent.config import ConfigurationError
from agent.desired import DesiredState
from agent.known_models import KnownModels
from agent.protocol.messages import Desired as Document
from agent.protocol.messages import DesiredModel
from agent.protocol.wire import Severity
from models.catalog import CatalogError
from models.manifest import manifest_digest

logger = logging.getLogger(__name__)


class Documents:
    """`came` for each document that the session hands on, `released` when the node no longer serves by its own decision.

    While it does, the newest document is held: what it serves with stays until somebody else answers for it (L8).
    `tell`: severity, revision and what became of it.
    """

    def __init__(
        self, desired: DesiredState, known: KnownModels, is_autonomous: Callable[[], bool], tell: Callable[[Severity, int, str], None]
    ) -> None:
        self._desired = desired
        self._known = known
        self._is_autonomous = is_autonomous
        self._tell = tell
        self._held: Document | None = None
        self._refused = 0

    def came(self, document: Document) -> None:
        if self._is_autonomous():
            self._held = document
            return
        pipelines = {
            one.id: {**one.settings, "id": one.id, "source": one.source, "model": self._known.own_name(one.model)}
            for one in document.pipelines
        }
        try:
            models = tuple(self._own_name(model) for model in document.models)
            refuse_bad_cameras(pipelines)
            is_news = self._desired.take(document.rev, models, pipelines)
        except (ConfigurationError, OSError) as error:  # it comes again with the next session, and is not told of again
            logger.error("desired state of revision %d is not taken: %s", document.rev, error)  # noqa: TRY400 - the trace adds nothing
            if document.rev != self._refused:
                self._refused = document.rev
                self._tell("error", document.rev, f"is not taken: {error}")
            return
        if is_news:
            logger.info("desired state of revision %d taken", document.rev)
            self._tell("info", document.rev, "is taken")

    def released(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self.came(held)

    def _own_name(self, model: DesiredModel) -> str:
        """Without a digest an unknown model fails later, where it can be reported; with one it must be that very manifest."""
        if model.digest is None:
            return self._known.own_name(model.name)
        try:
            manifest = self._known.find(model.name)
        except CatalogError as error:
            raise ConfigurationError(str(error)) from error
        if (digest := f"sha256:{manifest_digest(manifest)}") != model.digest:
            raise ConfigurationError(f"the manifest of {model.name} here has {digest}, not {model.digest}")
        return manifest.name
