"""A form that is written to the disk as it comes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
from fastapi import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from agent.http.errors import ApiError
from agent.http.upload import Form, plain_name, read_form

HEAD = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
)
TAIL = b"\r\n--b--\r\n"


async def read(pieces: Sequence[bytes], target: Path, most_bytes: int = 1 << 30) -> Form:
    messages = iter(pieces)

    async def receive() -> Message:
        piece = next(messages, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def has_room(_: int) -> None:
        pass

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"multipart/form-data; boundary=b")]}
    return await read_form(Request(scope, receive), target, has_room, most_bytes)


@pytest.mark.anyio
async def test_a_file_of_any_size_takes_the_memory_of_a_piece(tmp_path: Path) -> None:
    piece = b"0123456789abcdef" * 4096  # the same object each time: what is counted is ours
    target = tmp_path / "file"
    tracemalloc.start()
    try:
        form = await read([HEAD, *[piece] * 512, TAIL], target)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert form.size == target.stat().st_size == 32 << 20
    assert form.fields == {"purpose": "batch"}
    assert peak < 8 << 20


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(1, 40), max_size=40))
def test_wherever_the_pieces_are_cut_the_file_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cuts: list[int]
) -> None:
    target = tmp_path_factory.mktemp("form") / "file"
    body, pieces = HEAD + content + TAIL, []
    for cut in cuts:
        pieces.append(body[:cut])
        body = body[cut:]
    form = anyio.run(read, [*pieces, body], target)
    assert target.read_bytes() == content
    assert (form.size, form.filename) == (len(content), "a")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(HEAD) + 20), st.binary(max_size=40))
def test_a_broken_form_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes) -> None:
    target = tmp_path_factory.mktemp("form") / "file"
    with pytest.raises(ApiError) as refused:
        anyio.run(read, [(HEAD + b"x" * 20)[:cut] + noise.replace(b"-", b"+")], target)
    assert refused.value.status_code == 400


def test_the_name_of_a_file_has_no_folders_and_nothing_that_does_not_print() -> None:
    assert plain_name("..\\..\\a/b\x00\n.jsonl") == "b.jsonl"
    assert plain_name("/") == "upload"
    assert len(plain_name("x" * 1000)) == 255
