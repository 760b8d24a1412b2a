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


STOP_S = 2.0


async def run_coordinator(settings: CoordinatorSettings) -> None:
    """Runs until SIGTERM or SIGINT. Raises OSError if the address is taken, sqlite3.Error if the database cannot be used,
    ValueError if the token file is empty.

    The nodes are not told goodbye: a coordinator that is back before the delay of its will was never away for them.
    """
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(contextlib.closing(Registry(settings.database)))
        registry.check()
        family = socket.AF_INET6 if ":" in settings.http.host else socket.AF_INET
        bound = stack.enter_context(socket.create_server((settings.http.host, settings.http.port), family=family))
        async with httpx.AsyncClient(follow_redirects=False, trust_env=False) as client:
            control = Control(settings, registry, client)
            app = build_app(control, registry, settings.http.token_file, settings.http.host)
            server = _Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none", server_header=False, access_log=False))
            serving = anyio.Event()
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(control.run)
                    tasks.start_soon(_serve, server, bound, serving)
                    url = _url(settings.http.host, bound.getsockname()[1])
                    logger.info("coordinator listens on %s, fleet page: %s/", url, url)
                    async for _ in signals:
                        break
                    server.should_exit = True
                    with anyio.move_on_after(STOP_S):
                        await serving.wait()
                    tasks.cancel_scope.cancel()


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _serve(server: uvicorn.Server, bound: socket.socket, ended: anyio.Event) -> None:
    await server.serve([bound])
    ended.set()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are run_coordinator's."""
        yield
