"""uvicorn inside the agent's task group: a bound socket, no signal handlers, a stop with a deadline, no patience for slow heads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import anyio
import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from agent.http.collaborators import Limits

LOG = logging.getLogger(__name__)


class HttpServer:
    """Serves `app` on `listener` until `stop()` or cancellation; `started` is set once connections are answered.

    On stop no new connections are taken, `closing` is set for answers that have no end of their own, the others have `stop_s` to end,
    then they are cut.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        limits: Limits | None = None,
        stop_s: float = 10.0,
        closing: anyio.Event | None = None,
    ) -> None:
        self._listener = listener
        self._address: tuple[str, int] = listener.getsockname()[:2]
        self._closing = closing or anyio.Event()
        limits = limits or Limits()
        config = uvicorn.Config(
            app, http=_protocol(limits.header_s), ws="none", lifespan="off", loop="none", interface="asgi3", log_config=None,
            access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=75, h11_max_incomplete_event_size=32 << 10,
            timeout_graceful_shutdown=max(1, round(stop_s)),
        )  # fmt: skip
        self._server = _Server(config)
        self.started = self._server.is_up

    @property
    def port(self) -> int:
        return self._address[1]

    @property
    def url(self) -> str:
        """For people on this machine: a listener on all addresses is reached at the loopback one."""
        host, port = self._address
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def stop(self) -> None:
        self._closing.set()
        self._server.should_exit = True

    async def run(self) -> None:
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            # A cancelled server leaves before its own shutdown: nothing may go on answering, and the port must be free.
            self._closing.set()
            if self._server.is_serving:
                with anyio.CancelScope(shield=True):
                    await self._server.shutdown(sockets=[self._listener])
            self._listener.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = anyio.Event()
        self.is_serving = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the agent."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.is_serving = True
        self.is_up.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.is_serving = False
        await super().shutdown(sockets=sockets)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError with the address in its words."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it each answer, sent as head and body, waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {error.strerror}; change http.host or http.port") from error
    listener.setblocking(False)
    return listener


def _protocol(header_s: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1 protocol, which closes a connection whose request head does not arrive within `header_s`.

    uvicorn limits only the idle time between requests; a client that sends a byte now and then would hold its connection for ever.
    """

    class BoundedHead(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head_timer = self.loop.call_later(header_s, self._close_without_head)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            is_in_head = self.conn.their_state is h11.IDLE
            if not is_in_head:
                self._stop_head_timer()
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(header_s, self._close_without_head)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head_timer()
            super().connection_lost(exc)

        def _close_without_head(self) -> None:
            self._head_timer = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

        def _stop_head_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return BoundedHead
