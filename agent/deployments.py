"""Orders about models that come over HTTP: the same as the coordinator's, in the failures of HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from agent.http.collaborators import ServiceFailure
from agent.link.outcome import CommandFailed
from agent.orders import Orders
from agent.protocol.operations import ModelDeployArgs

REASONS = {"invalid": "unknown_model", "busy": "busy", "no_space": "not_ready"}


class LocalDeployments:
    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    def deploy(self, model: str, build: Mapping[str, Any]) -> str:
        with _failures():
            return self._orders.order(ModelDeployArgs(name=model, **build)).name

    def cancel(self, model: str) -> bool:
        with _failures():
            return self._orders.withdraw(model)


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except CommandFailed as error:
        raise ServiceFailure(REASONS.get(error.code, "not_ready"), str(error)) from error
