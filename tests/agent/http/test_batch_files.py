"""Files of requests through the unmodified `openai` client against a real server."""

from __future__ import annotations

import hashlib
import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from agent.http.batches import MOST_OF_ONE
from agent.http.collaborators import Limits, ServiceFailure
from agent.http.keys import KeyRules
from tests.agent.batches.rooms import jsonl, opened, request
from tests.agent.http.conftest import House

Serve = Callable[[House], str]
FINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(batches=opened(tmp_path / "batches"))


@pytest.fixture
def url(house: House, serve: Serve) -> str:
    return serve(house)


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture
def api(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url) as client:
        yield client


def until(api: openai.OpenAI, batch: Batch, *statuses: str) -> Batch:
    ends_s = time.monotonic() + 60
    while time.monotonic() < ends_s:
        batch = api.batches.retrieve(batch.id)
        if batch.status in statuses:
            return batch
        time.sleep(0.02)
    raise AssertionError(f"{batch.id} is {batch.status} after a minute, not {statuses}")


def order(api: openai.OpenAI, requests: list[dict[str, Any]], endpoint: Any = "/v1/chat/completions", **fields: Any) -> Batch:
    file = api.files.create(file=("in.jsonl", BytesIO(jsonl(requests))), purpose="batch")
    return api.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def lines(api: openai.OpenAI, file: str | None) -> dict[str, dict[str, Any]]:
    assert file is not None
    told = [json.loads(line) for line in api.files.content(file).text.splitlines()]
    assert len({one["custom_id"] for one in told}) == len(told)
    return {one["custom_id"]: one for one in told}


def refused(call: Callable[[], Any], status: int) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    assert caught.value.status_code == status, caught.value.message
    return caught.value


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_kept_shown_given_back_and_deleted(api: openai.OpenAI, tmp_path: Path) -> None:
    content = jsonl([request("a")])
    file = api.files.create(file=("of mine.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200})
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(content), "of mine.jsonl", "batch")
    assert file.expires_at == file.created_at + 7200
    assert api.files.retrieve(file.id) == file
    assert api.files.content(file.id).read() == content
    assert api.files.wait_for_processing(file.id).status == "processed"
    (kept,) = tmp_path.glob("batches/files/*.jsonl")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert api.files.delete(file.id).deleted
    assert refused(lambda: api.files.retrieve(file.id), 404).code == "file_not_found"
    assert not list(tmp_path.glob("batches/files/*"))


def test_files_come_in_pages(api: openai.OpenAI) -> None:
    made = [api.files.create(file=(f"{index}.jsonl", b"{}\n"), purpose="batch").id for index in range(5)]
    assert {file.id for file in api.files.list()} == set(made)
    turned = [file.id for file in api.files.list(limit=2)]
    assert sorted(turned) == sorted(made), "the client turns three pages by itself, each file once"
    assert turned == [file.id for file in api.files.list(limit=2, order="asc")][::-1]
    assert not api.files.list(purpose="batch_output").data
    assert refused(lambda: api.files.list(after="file-none"), 400).param == "after"


@pytest.mark.parametrize("purpose", ["fine-tune", "assistants", "vision", "user_data"])
def test_files_for_anything_else_are_refused_by_name(api: openai.OpenAI, purpose: Any, tmp_path: Path) -> None:
    error = refused(lambda: api.files.create(file=("a", b"x"), purpose=purpose), 400)
    assert (error.param, error.code) == ("purpose", "unsupported_parameter")
    assert purpose in error.message
    assert not list(tmp_path.glob("batches/files/*")), "and nothing of it is left"


def test_a_form_whose_purpose_comes_last_or_that_is_none(url: str) -> None:
    whole = b'--b\r\nContent-Disposition: form-data; name="file"; filename="../../etc/a.jsonl"\r\n\r\n{}\n\r\n'
    purpose = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    head = {"Content-Type": "multipart/form-data; boundary=b"}

    def post(body: bytes, headers: dict[str, str] = head) -> httpx.Response:
        return httpx.post(f"{url}/v1/files", content=body, headers=headers, trust_env=False)

    good = post(whole + purpose).json()
    assert (good["bytes"], good["filename"]) == (3, "a.jsonl")
    for body, headers, words in (
        (whole, head, "ended before"),
        (b"nonsense", head, "no form"),
        (whole + whole + purpose, head, "two of them"),
        (purpose, head, "file"),
        (whole + purpose.replace(b'"purpose"', b'"extra"'), head, "purpose"),
        (b"{}", {"Content-Type": "application/json"}, "multipart"),
    ):
        answer = post(body, headers)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    assert len(httpx.get(f"{url}/v1/files", trust_env=False).json()["data"]) == 1


def test_a_form_of_many_parts_or_headers(url: str) -> None:
    field = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    wide = b"--b\r\n" + b"".join(b"X-%d: %s\r\n" % (index, b"y" * 3000) for index in range(3)) + field[5:]
    for body, words in ((17 * field, "16 parts"), (wide, "8192 bytes")):
        head = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = httpx.post(f"{url}/v1/files", content=body + b"--b--\r\n", headers=head, trust_env=False)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]


def test_a_client_that_leaves_in_the_middle_of_an_upload_is_no_fault(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"

    def told() -> str:
        return httpx.get(f"{url}/metrics", trust_env=False).text

    with socket.create_connection((host, int(port))) as client:
        client.sendall(head)
        begins = time.monotonic()
        while not list(tmp_path.glob("batches/files/.upload.*")):
            assert time.monotonic() < begins + 60
            time.sleep(0.02)
    while "hotspare_client_disconnects_total 1.0" not in told():
        assert time.monotonic() < begins + 60
        time.sleep(0.02)
    assert not list(tmp_path.glob("batches/files/.upload.*"))
    assert 'endpoint="/v1/files",method="POST",status="500"' not in told()
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.anyio
async def test_a_length_of_many_digits(client: httpx.AsyncClient) -> None:
    """No server of today lets it through."""
    body = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    head = {"Content-Type": "multipart/form-data; boundary=b", "Content-Length": "0" * 5000}
    answer = await client.post("/v1/files", content=body, headers=head)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")


def test_a_file_over_the_limit_is_refused_before_and_while_it_comes(serve: Serve, tmp_path: Path) -> None:
    house = House(batches=opened(tmp_path / "batches", file_bytes=1 << 20), limits=Limits(upload_bytes=1 << 20))
    url = serve(house)
    with client_of(url) as api:
        for size in ((1 << 20) + 1, 3 << 20):
            assert refused(lambda size=size: api.files.create(file=("a", b"x" * size), purpose="batch"), 413).code == "request_too_large"  # type: ignore[misc]
        assert api.files.create(file=("a", b"x" * (1 << 20)), purpose="batch").bytes == 1 << 20

    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(64):
            yield b"x" * (1 << 16)

    answer = httpx.post(f"{url}/v1/files", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"}, trust_env=False)
    assert answer.status_code == 413
    assert len(list(tmp_path.glob("batches/files/*"))) == 2, "content and record of the one that fits"


def test_a_full_disk_is_told_and_leaves_nothing(serve: Serve, tmp_path: Path) -> None:
    free = [1 << 40]
    house = House(batches=opened(tmp_path / "batches", free_bytes=free))
    with client_of(serve(house)) as api:
        free.append(1 << 20)
        error = refused(lambda: api.files.create(file=("a", b"x" * 100), purpose="batch"), 507)
        assert error.code == "insufficient_storage"
        assert "batches.keep_free_mb" in error.message
        free.append(1 << 40)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))  # a write that really fails, half-way
        try:
            assert refused(lambda: api.files.create(file=("a", b"x" * (4 << 20)), purpose="batch"), 507).code == "insufficient_storage"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(tmp_path.glob("batches/files/*"))
        assert api.files.create(file=("a", b"x" * 100), purpose="batch").bytes == 100


def test_files_beyond_the_budget_push_out_the_oldest_that_no_batch_uses(serve: Serve, tmp_path: Path) -> None:
    house = House(batches=opened(tmp_path / "batches", total_bytes=3 << 20))
    house.node.close()
    with client_of(serve(house)) as api:
        used = order(api, [request("a", "x" * (1 << 20))])
        idle = api.files.create(file=("b", b"x" * (1 << 20)), purpose="batch").id
        newer = api.files.create(file=("c", b"x" * (1 << 20)), purpose="batch").id
        assert {file.id for file in api.files.list()} == {used.input_file_id, newer}
        assert refused(lambda: api.files.retrieve(idle), 404)
        error = refused(lambda: api.files.create(file=("d", b"x" * (5 << 19)), purpose="batch"), 507)
        assert "batches.budget_mb" in error.message
        assert refused(lambda: api.files.delete(used.input_file_id), 409).code == "file_in_use"


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_is_answered_line_by_line_and_a_bad_line_fails_alone(api: openai.OpenAI, house: House) -> None:
    requests = [
        *(request(f"good-{index}", f"line {index}") for index in range(20)),
        request("hot", temperature=3),
        request("unknown", model="gpt-99"),
        request("lost", "boom"),
    ]
    batch = order(api, requests, metadata={"night": "1"}, output_expires_after={"anchor": "created_at", "seconds": 3600})
    assert (batch.status, batch.object, batch.metadata) == ("validating", "batch", {"night": "1"})
    batch = until(api, batch, *FINAL)
    assert batch.status == "completed"
    assert batch.request_counts
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (23, 20, 3)
    assert batch.in_progress_at
    assert batch.finalizing_at
    assert batch.completed_at
    assert batch.expires_at == batch.created_at + 24 * 3600
    assert batch.usage
    assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.input_tokens_details.cached_tokens) == (40, 40, 20)
    good = lines(api, batch.output_file_id)
    assert set(good) == {f"good-{index}" for index in range(20)}
    one = good["good-7"]
    assert one["id"].startswith("batch_req_")
    assert one["error"] is None
    assert one["response"]["status_code"] == 200
    assert one["response"]["request_id"].startswith("req_")
    assert one["response"]["body"]["object"] == "chat.completion"
    assert one["response"]["body"]["choices"][0]["message"]["content"] == "line 7"
    bad = lines(api, batch.error_file_id)
    codes = {name: (line["response"]["status_code"], line["response"]["body"]["error"]["code"]) for name, line in bad.items()}
    assert codes == {"hot": (400, "invalid_value"), "unknown": (404, "model_not_found"), "lost": (503, "worker_lost")}
    assert house.text.most_running <= house.lines.at_once
    assert house.text.last
    assert house.text.last.priority == -1
    output = api.files.retrieve(str(batch.output_file_id))
    assert (output.purpose, output.expires_at) == ("batch_output", output.created_at + 3600)
    assert api.files.content(batch.input_file_id).read() == jsonl(requests)
    assert not house.outcomes, "lines are no requests of clients, and no promise is kept or broken by them"


@pytest.mark.parametrize(
    ("endpoint", "body", "read"),
    [
        ("/v1/completions", {"model": "parrot", "prompt": "p q"}, lambda body: body["choices"][0]["text"] == "p q"),
        ("/v1/embeddings", {"model": "letters", "input": ["a", "abc"]}, lambda body: body["data"][1]["embedding"][0] == 3.0),
        ("/v1/responses", {"model": "parrot", "input": "to items"}, lambda body: body["output"][0]["content"][0]["text"] == "to items"),
    ],
)
def test_the_other_endpoints(api: openai.OpenAI, endpoint: str, body: dict[str, Any], read: Callable[[Any], bool]) -> None:
    requests = [{"custom_id": str(index), "method": "POST", "url": endpoint, "body": body} for index in range(3)]
    batch = until(api, order(api, requests, endpoint), *FINAL)
    assert batch.status == "completed"
    told = lines(api, batch.output_file_id)
    assert all(read(told[str(index)]["response"]["body"]) for index in range(3))
    assert batch.error_file_id is None
    assert batch.usage
    assert batch.usage.input_tokens > 0


def test_what_a_batch_cannot_be_is_refused_by_name(api: openai.OpenAI) -> None:
    file = api.files.create(file=("a", jsonl([request("a")])), purpose="batch").id
    good: dict[str, Any] = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    for changes, status, param in (
        ({"endpoint": "/v1/images/edits"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"input_file_id": "file-none"}, 404, None),
        ({"metadata": {"a" * 65: "x"}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, 400, "output_expires_after.seconds"),
        ({"extra_body": {"colour": "red"}}, 400, "colour"),
    ):
        error = refused(lambda changes=changes: api.batches.create(**{**good, **changes}), status)  # type: ignore[misc]
        assert param is None or str(error.param).startswith(param)
    assert refused(lambda: api.batches.retrieve("batch_none"), 404).code == "batch_not_found"


def test_an_input_that_is_none_is_told_line_by_line(api: openai.OpenAI) -> None:
    requests = [request("a"), request("a"), request("b", stream=True), {**request("c"), "url": "/v1/embeddings"}]
    batch = until(api, order(api, requests), *FINAL)
    assert (batch.status, batch.output_file_id) == ("failed", None)
    assert batch.failed_at
    assert batch.errors
    told = [(error.line, error.code) for error in batch.errors.data or ()]
    assert told == [(2, "duplicate_custom_id"), (3, "unsupported_parameter"), (4, "invalid_url")]
    assert refused(lambda: api.batches.cancel(batch.id), 409).code == "invalid_status"


def test_batches_come_in_pages_the_newest_first(api: openai.OpenAI) -> None:
    made = [order(api, [request("a")]).id for _ in range(5)]
    assert sorted(batch.id for batch in api.batches.list(limit=2)) == sorted(made)


def test_a_cancelled_batch_keeps_what_it_has(api: openai.OpenAI) -> None:
    batch = order(api, [request("first", "a"), request("stuck", "wait"), *(request(f"wait-{index}", "wait") for index in range(9))])
    ends_s = time.monotonic() + 60
    while (counts := api.batches.retrieve(batch.id).request_counts) is None or counts.completed < 1:
        assert time.monotonic() < ends_s
        time.sleep(0.02)
    assert api.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = until(api, batch, *FINAL)
    assert batch.status == "cancelled"
    assert batch.cancelling_at
    assert batch.cancelled_at
    assert set(lines(api, batch.output_file_id)) == {"first"}
    left = lines(api, batch.error_file_id)
    assert len(left) == 10
    assert {line["error"]["code"] for line in left.values()} == {"batch_cancelled"}
    assert left["stuck"]["response"] is None


def test_while_the_node_may_not_answer_batches_wait(api: openai.OpenAI, house: House) -> None:
    house.node.close()
    batch = order(api, [request("a")])
    batch = until(api, batch, "in_progress")
    time.sleep(0.3)
    assert until(api, batch, "in_progress").request_counts
    assert house.text.last is None, "no model was asked"
    house.node.is_open = True
    assert until(api, batch, *FINAL).status == "completed"


def test_a_line_on_which_the_node_itself_fails_fails_alone(api: openai.OpenAI, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tokens(*_: Any) -> None:
        raise KeyError("a holder that is gone")

    house.keys = {hashlib.sha256(b"none").digest(): KeyRules(tokens_per_minute=9)}
    monkeypatch.setattr("agent.http.allowance.Allowances.overdrawn_s", no_tokens)
    batch = until(api, order(api, [request("a")]), *FINAL)
    assert batch.status == "completed"
    (line,) = lines(api, batch.error_file_id).values()
    assert (line["response"]["status_code"], line["response"]["body"]["error"]["code"]) == (500, "internal_error")


def test_what_passes_is_waited_for(api: openai.OpenAI, house: House) -> None:
    house.text.failure = ServiceFailure("not_ready", "the model is being prepared")
    batch = until(api, order(api, [request("a")]), "in_progress")
    while house.text.last is None:
        time.sleep(0.02)
    house.text.failure = None
    batch = until(api, batch, *FINAL)
    assert (batch.status, batch.error_file_id) == ("completed", None)


def test_an_interactive_request_comes_before_the_lines_of_a_batch(api: openai.OpenAI, house: House) -> None:
    order(api, [request(f"wait-{index}", "wait") for index in range(10)])
    while house.text.running < house.lines.at_once:
        time.sleep(0.02)
    answer = api.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "at once"}])
    assert answer.choices[0].message.content == "at once"
    assert house.text.last
    assert house.text.last.priority == 0
    assert house.text.most_running <= house.lines.at_once + 1


def test_a_key_sees_its_own_only(house: House, serve: Serve) -> None:
    house.keys = {hashlib.sha256(key).digest(): KeyRules() for key in (b"one", b"two")}
    url = serve(house)
    with client_of(url, "one") as one, client_of(url, "two") as two:
        batch = order(one, [request("a")])
        done = until(one, batch, *FINAL)
        assert done.status == "completed"
        assert not two.files.list().data
        assert not two.batches.list().data
        for call in (
            lambda: two.batches.retrieve(batch.id),
            lambda: two.batches.cancel(batch.id),
            lambda: two.files.retrieve(batch.input_file_id),
            lambda: two.files.content(str(done.output_file_id)),
            lambda: two.files.delete(batch.input_file_id),
            lambda: two.batches.create(input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"),
        ):
            refused(call, 404)
        assert len(one.files.list().data) == 2
        assert lines(one, done.output_file_id)
    with client_of(url, "three") as three:
        refused(three.files.list, 401)


def test_one_key_does_not_take_all_places(house: House, serve: Serve) -> None:
    house.keys = {hashlib.sha256(key).digest(): KeyRules() for key in (b"one", b"two")}
    house.node.close()
    url = serve(house)
    with client_of(url, "one") as one, client_of(url, "two") as two:
        made = [order(one, [request("a")]) for _ in range(MOST_OF_ONE)]
        assert "this key" in refused(lambda: order(one, [request("a")]), 429).message
        order(two, [request("a")])
        one.batches.cancel(made[0].id)
        until(one, made[0], *FINAL)
        order(one, [request("a")])


def test_figures_for_prometheus(api: openai.OpenAI, url: str) -> None:
    until(api, order(api, [request("a")]), *FINAL)
    told = httpx.get(f"{url}/metrics", trust_env=False).text
    assert 'hotspare_batches{status="completed"} 1.0' in told
    assert 'hotspare_batches{status="in_progress"} 0.0' in told
    assert "hotspare_batch_files_bytes" in told
