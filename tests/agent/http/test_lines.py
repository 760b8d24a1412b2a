"""One line of a batch as a request to the node's own endpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from numpy.typing import NDArray

from agent.batches.line import Line, Reply
from agent.batches.record import Endpoint
from agent.http.app import Application
from agent.http.collaborators import Limits, ServiceFailure
from agent.http.keys import KeyRules
from tests.agent.batches.test_record import BATCH
from tests.agent.http.conftest import House
from tests.agent.http.fakes import Parrot

pytestmark = pytest.mark.anyio
ONE, TWO = (hashlib.sha256(key).digest() for key in (b"one", b"two"))


@dataclass
class Encoder(Parrot):
    """Takes its time, and counts who is there."""

    asked: int = 0
    present: int = 0
    most: int = 0

    async def embed(self, model: str, inputs: Sequence[str | Sequence[int]]) -> tuple[NDArray[np.float32], int]:
        self.asked += 1
        self.present += 1
        self.most = max(self.most, self.present)
        await anyio.sleep(0.02)
        self.present -= 1
        return await super().embed(model, inputs)


async def asked(
    app: Application, words: str = "hi", owner: str = "", endpoint: Endpoint = "/v1/chat/completions", **changes: Any
) -> tuple[Reply, Any]:
    body = {"model": "parrot", "messages": [{"role": "user", "content": words}], **changes}
    batch = BATCH.model_copy(update={"owner": owner, "endpoint": endpoint})
    reply = await app.ask(batch, Line(1, "a", json.dumps(body).encode()))
    return reply, json.loads(reply.body)


async def test_it_waits_for_others_and_has_the_share_of_its_key(house: House) -> None:
    app = house.app()
    reply, body = await asked(app)
    assert (reply.status, body["choices"][0]["message"]["content"]) == (200, "hi")
    assert house.text.last
    assert (house.text.last.priority, house.text.last.tenant) == (-1, "batches")
    await asked(app, owner=ONE.hex())
    assert house.text.last.tenant == ONE.hex()[:16]


async def test_a_late_failure_keeps_its_status(house: House) -> None:
    """The head of a client's whole answer goes out after a while; nobody waits for that of a line."""
    house.limits = Limits(head_hold_s=0.01, keep_alive_s=0.01)
    house.text.before_s, house.text.late_failure = 0.2, ServiceFailure("busy", "full", retry_after_s=7)
    reply, body = await asked(house.app())
    assert (reply.status, reply.retry_s, body["error"]["code"]) == (429, 7, "busy")


async def test_a_fault_of_ours_fails_that_line_alone(house: House) -> None:
    house.text.failure = ZeroDivisionError("our bug")
    app = house.app()
    reply, body = await asked(app)
    assert (reply.status, body["error"]["code"]) == (500, "internal_error")
    house.text.failure = None
    assert (await asked(app))[0].status == 200


async def test_lines_and_the_items_of_batches_share_their_places(house: House) -> None:
    house.limits = Limits(batch_items=2)
    app = house.app()
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(asked, app, "wait")
        with anyio.fail_after(60):
            while house.text.running < 2:  # noqa: ASYNC110 - the parrot tells nobody
                await anyio.sleep(0.01)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert house.text.most_running == 2
        tasks.cancel_scope.cancel()


async def test_a_line_takes_one_place_whatever_it_asks_for(house: House) -> None:
    app = house.app()
    house.text.pace_s = 0.01
    reply, body = await asked(app, "a b", n=4)
    assert (reply.status, len(body["choices"])) == (200, 4)
    batch = BATCH.model_copy(update={"endpoint": "/v1/completions"})
    reply = await app.ask(batch, Line(1, "a", json.dumps({"model": "parrot", "prompt": [f"p{n}" for n in range(32)]}).encode()))
    assert [choice["text"] for choice in json.loads(reply.body)["choices"]] == [f"p{n}" for n in range(32)]
    assert house.text.most_running == 1


async def test_a_key_pays_for_the_tokens_of_its_lines(house: House) -> None:
    house.keys = {ONE: KeyRules(tokens_per_minute=10, requests_per_minute=1), TWO: KeyRules()}
    app = house.app()
    statuses = [(await asked(app, "a b c", owner=ONE.hex()))[0].status for _ in range(3)]
    assert statuses == [200, 200, 429], "6 tokens each of 10; that there are many requests is no matter"
    reply, body = await asked(app, owner=ONE.hex())
    assert (body["error"]["code"], body["error"]["type"]) == ("rate_limit_exceeded", "tokens")
    assert reply.retry_s > 0
    assert (await asked(app, owner=TWO.hex()))[0].status == 200


async def test_the_lines_of_a_key_that_is_gone_are_not_answered(house: House) -> None:
    house.keys = {TWO: KeyRules()}
    app = house.app()
    reply, body = await asked(app, owner=ONE.hex())
    assert (reply.status, body["error"]["code"]) == (401, "invalid_api_key")
    assert (await asked(app))[0].status == 200, "it was ordered while no key was asked for"
    house.keys = {}
    assert (await asked(app, owner=ONE.hex()))[0].status == 200


async def test_encoders_get_one_line_at_a_time(house: House) -> None:
    encoder = Encoder()
    house.text = encoder
    app = house.app()
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            batch = BATCH.model_copy(update={"endpoint": "/v1/embeddings"})
            tasks.start_soon(app.ask, batch, Line(1, "a", b'{"model": "letters", "input": "a"}'))
    assert (encoder.asked, encoder.most) == (4, 1)
