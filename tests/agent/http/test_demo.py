"""The switch over HTTP, against a real server."""

from __future__ import annotations

import anyio
import pytest
from fastapi import FastAPI

from agent.http.collaborators import ServiceFailure
from agent.http.demo import RemoteSwitch
from agent.http.server import HttpServer, bind

pytestmark = pytest.mark.anyio


def control() -> FastAPI:
    app, state = FastAPI(), {"on": True}

    @app.get("/switch")
    async def read() -> dict[str, bool]:
        return state

    @app.post("/switch")
    async def write(on: bool) -> dict[str, bool]:
        state["on"] = on
        return state

    return app


async def test_the_switch_is_read_and_set_and_its_absence_is_no_crash() -> None:
    server = HttpServer(control(), bind("127.0.0.1", 0), stop_s=1)
    async with RemoteSwitch(f"{server.url}/switch") as switch, anyio.create_task_group() as tasks:
        tasks.start_soon(server.run)
        await server.started.wait()
        assert await switch.primary_is_on() is True
        await switch.switch_primary(False)
        assert await switch.primary_is_on() is False
        server.stop()
    async with RemoteSwitch(f"{server.url}/switch") as switch:
        assert await switch.primary_is_on() is None
        with pytest.raises(ServiceFailure, match="could not be switched"):
            await switch.switch_primary(True)
