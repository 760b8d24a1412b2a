"""Composition root of the coordinator: the only place that wires its parts."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import anyio
import httpx
import uvicorn

from coordinator.config import CoordinatorSettings
from coordinator.control import Control
from coordinator.http import build_app
from coordinator.registry import Registry

logger = logging.getLogger(__name__)


async def run_coordinator(settings: CoordinatorSettings) -> None:
    """Runs until SIGTERM or SIGINT. Raises OSError if the address is taken or the database cannot be opened."""
    registry = Registry(settings.database)
    try:
        async with httpx.AsyncClient(follow_redirects=False, trust_env=False) as client, anyio.create_task_group() as tasks:
            control = Control(settings, registry, client)
            tasks.start_soon(control.run)
            server = _Server(uvicorn.Config(build_app(control, registry, settings.http.token_file), log_config=None, lifespan="off"))
            bound = socket.create_server((settings.http.host, settings.http.port))
            logger.info("coordinator listens on http://%s:%d", settings.http.host, bound.getsockname()[1])
            tasks.start_soon(server.serve, [bound])
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    break
            server.should_exit = True
            tasks.cancel_scope.cancel()
    finally:
        registry.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are run_coordinator's."""
        yield
