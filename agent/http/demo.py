"""The switch of the stand-in for the cloud API, which `hotspare demo` runs in a process of its own."""

from __future__ import annotations

import httpx
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from agent.http.collaborators import Demo, ServiceFailure
from agent.http.requests import SwitchRequest

READ_S = 1.0
SWITCH_S = 15.0  # it opens or closes a port, and waits until that is so


class RemoteSwitch:
    """`GET url` answers {"on": …}, `POST url?on=true|false` sets it. `async with` holds the connection."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = httpx.AsyncClient(trust_env=False)

    async def __aenter__(self) -> RemoteSwitch:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def primary_is_on(self) -> bool | None:
        try:
            answer = await self._client.get(self._url, timeout=READ_S)
            return bool(answer.raise_for_status().json()["on"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    async def switch_primary(self, on: bool) -> None:
        try:
            answer = await self._client.post(self._url, params={"on": "true" if on else "false"}, timeout=SWITCH_S)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise ServiceFailure("not_ready", f"the demo's primary could not be switched: {error}") from error


def router(demo: Demo) -> APIRouter:
    routes = APIRouter()

    @routes.post("/demo/primary", response_model=None)
    async def switch(body: SwitchRequest) -> Response:
        """Let the stand-in for the cloud API fail, or recover."""
        await demo.switch_primary(body.on)
        return JSONResponse({"primary_is_on": await demo.primary_is_on()})

    return routes
