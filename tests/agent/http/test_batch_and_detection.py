"""/v1/batch, /v1/classify, /v1/detect and the cameras."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest

from agent.http.collaborators import ServiceFailure
from tests.agent.http.conftest import House

pytestmark = pytest.mark.anyio


async def test_a_batch_keeps_its_order_and_one_bad_item_fails_alone(client: httpx.AsyncClient, house: House) -> None:
    items: list[Any] = [
        {"prompt": "one two three", "max_tokens": 2},
        {"prompt": "boom"},
        {"messages": [{"role": "user", "content": "four"}], "max_tokens": 50},
        {"prompt": "x", "temperature": 9},
        {"prompt": "x", "messages": []},
        {"prompt": "y", "model": "gpt-99"},
        7,
    ]
    house.text.pace_s = 0.05
    answer = await client.post("/v1/batch", json={"requests": [*items, {"neither": 1}]})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [item["index"] for item in results] == list(range(8))
    assert (results[0]["text"], results[0]["finish_reason"], results[0]["usage"]["completion_tokens"]) == ("one two", "length", 2)
    assert results[1]["error"]["code"] == "worker_lost"
    assert results[2]["text"] == "four"
    assert results[3]["error"]["param"] == "temperature"
    assert results[5]["error"]["code"] == "model_not_found"
    assert results[6]["error"]["type"] == "invalid_request_error"
    assert results[7]["error"]["param"] == "neither"
    assert answer.json()["model"] == "parrot"
    assert house.text.most_running >= 2, "items run at the same time"


async def test_a_full_batch_leaves_room_in_the_workers_queue(client: httpx.AsyncClient, house: House) -> None:
    house.text.pace_s = 0.02
    answer = await client.post("/v1/batch", json={"requests": [{"prompt": f"{number} is it"} for number in range(64)]})
    assert [item["text"] for item in answer.json()["results"]] == [f"{number} is it" for number in range(64)]
    assert house.text.most_running == house.limits.batch_items


async def test_a_batch_is_bounded(client: httpx.AsyncClient) -> None:
    for requests in ([], [{"prompt": "x"}] * 65):
        answer = await client.post("/v1/batch", json={"requests": requests})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "requests"


async def test_classification(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/classify", json={"input": ["a", "b"], "top": 1})
    assert answer.json()["model"] == "moods"
    assert answer.json()["data"][1] == {
        "object": "classification", "index": 1, "label": "calm", "scores": [{"label": "calm", "score": 0.75}],
    }  # fmt: skip


async def test_a_picture_comes_in_three_forms(client: httpx.AsyncClient, house: House) -> None:
    text = base64.b64encode(b"PICTURE").decode()
    for answer in (
        await client.post("/v1/detect?threshold=0.3", files={"file": ("a.jpg", b"PICTURE", "image/jpeg")}),
        await client.post("/v1/detect?threshold=0.3", content=b"PICTURE", headers={"content-type": "image/png"}),
        await client.post("/v1/detect", json={"image": text, "threshold": 0.3}),
        await client.post("/v1/detect", json={"image": f"data:image/jpeg;base64,{text}", "threshold": 0.3}),
    ):
        assert answer.status_code == 200, answer.text
        assert house.vision.asked == ("boxes", b"PICTURE", 0.3, False)
        assert answer.json()["detections"] == [{"label": "parcel", "score": 0.93, "box": [1.0, 2.0, 30.0, 40.0]}]
        assert (answer.json()["width"], answer.json()["height"]) == (64, 48)


async def test_a_detector_is_refused_in_the_words_of_text_models(client: httpx.AsyncClient) -> None:
    for model, status, words in (("nope", 404, "there is no model 'nope'"), ("parrot", 400, "parrot is a model for generation")):
        answer = await client.post(f"/v1/detect?model={model}", content=b"PICTURE", headers={"content-type": "image/jpeg"})
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith(words)
        assert answer.json()["error"]["param"] == "model"


async def test_the_annotated_picture(client: httpx.AsyncClient, house: House) -> None:
    answer = await client.post("/v1/detect?annotate=true", content=b"PICTURE", headers={"content-type": "image/jpeg"})
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.content == house.vision.jpeg
    assert answer.headers["X-Detections"] == "1"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"content": b"junk", "headers": {"content-type": "image/jpeg"}}, 400),
        ({"content": b"", "headers": {"content-type": "image/jpeg"}}, 400),
        ({"content": b"x", "headers": {"content-type": "text/html"}}, 415),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"json": {"image": "%%%"}}, 400),
        ({"json": {"image": "http://example.org/cat.jpg"}}, 400),
        ({"json": {"image": "aaaa", "threshold": 2}}, 400),
        ({"json": ["aaaa"]}, 400),
        ({"content": b"x", "headers": {"content-type": "image/jpeg"}, "params": {"threshold": "nan"}}, 400),
        ({"content": b"x", "headers": {"content-type": "image/jpeg"}, "params": {"annotate": "perhaps"}}, 400),
    ],
)
async def test_what_is_no_picture_is_refused(client: httpx.AsyncClient, request_: dict[str, Any], status: int) -> None:
    answer = await client.post("/v1/detect", **request_)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


async def test_cameras(client: httpx.AsyncClient, house: House) -> None:
    assert [item["id"] for item in (await client.get("/cameras")).json()["data"]] == ["belt"]
    assert (await client.get("/cameras/belt")).json()["fps"] == 12.0
    assert (await client.get("/cameras/belt/snapshot.jpg")).content == house.vision.jpeg
    house.vision.failure = ServiceFailure("worker_lost", "worker vision died")
    assert (await client.get("/cameras/belt/stream.mjpg")).status_code == 503
    for path in ("/cameras/attic", "/cameras/attic/snapshot.jpg", "/cameras/attic/stream.mjpg"):
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "camera_not_found")
