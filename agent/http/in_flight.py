"""How many inference requests are being answered: all of them, for draining, and those that this node answers itself, for their bound."""

from __future__ import annotations

import anyio
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.http.errors import ApiError
from agent.http.paths import is_inference


class InFlight:
    """A count; draining waits for none."""

    def __init__(self) -> None:
        self.count = 0
        self._is_idle = anyio.Event()
        self._is_idle.set()

    def enter(self) -> None:
        if self.count == 0:
            self._is_idle = anyio.Event()
        self.count += 1

    def leave(self) -> None:
        self.count -= 1
        if self.count == 0:
            self._is_idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """True once nothing is in flight, False if that took longer than `timeout_s`."""
        with anyio.move_on_after(timeout_s):
            while self.count:
                await self._is_idle.wait()
        return self.count == 0


class AnsweredHere:
    """ASGI around the endpoints: at most `most` inference requests at a time. What the primary or a kept answer serves never comes here."""

    def __init__(self, app: ASGIApp, most: int, in_flight: InFlight) -> None:
        self._app = app
        self._most = most
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_inference(scope):
            await self._app(scope, receive, send)
            return
        if self._in_flight.count >= self._most:
            await too_many(self._in_flight.count, "are answered here").response()(scope, receive, send)
            return
        self._in_flight.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight.leave()


def too_many(count: int, what: str) -> ApiError:
    return ApiError(
        429, f"{count} requests {what}, the limit of this node; try again soon", type_="rate_limit_error", code="busy",
        headers={"Retry-After": "1"},
    )  # fmt: skip
