from __future__ import annotations

import dataclasses
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.worker_protocol import (
    HEADER,
    MAX_JSON_BYTES,
    MAX_PAYLOAD_BYTES,
    TYPES,
    Done,
    Generate,
    Message,
    ProtocolError,
    Tokens,
    View,
    decode_message,
    encode_frame,
    frame_lengths,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
BY_TYPE: dict[typing.Any, st.SearchStrategy[typing.Any]] = {
    int: st.integers(-(2**63), 2**63),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=40),
    bool: st.booleans(),
    View: st.sampled_from(typing.get_args(View)),
    typing.Optional[int]: st.none() | st.integers(0, 2**63),  # noqa: UP045  # this is the value that the records carry
    typing.Optional[float]: st.none() | st.floats(allow_nan=False),  # noqa: UP045
    typing.Dict[str, typing.Any]: st.dictionaries(st.text(max_size=5), PLAIN, max_size=3),  # noqa: UP006
    typing.Dict[str, str]: st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),  # noqa: UP006
    typing.Dict[str, typing.Dict[str, typing.Any]]: st.dictionaries(  # noqa: UP006
        st.text(max_size=5), st.dictionaries(st.text(max_size=5), PLAIN, max_size=2), max_size=2
    ),
    typing.Tuple[int, ...]: st.lists(st.integers(0, 2**31), max_size=5).map(tuple),  # noqa: UP006
    typing.Tuple[typing.Tuple[int, float], ...]: st.lists(  # noqa: UP006
        st.tuples(st.integers(0, 2**31), st.floats(allow_nan=False)), max_size=3
    ).map(tuple),
    typing.Tuple[typing.Any, ...]: st.lists(PLAIN, max_size=3).map(tuple),  # noqa: UP006
    typing.Tuple[typing.Dict[str, typing.Any], ...]: st.lists(  # noqa: UP006
        st.dictionaries(st.text(max_size=5), PLAIN, max_size=2), max_size=2
    ).map(tuple),
}


def messages() -> st.SearchStrategy[Message]:
    def of(kind: type[typing.Any]) -> st.SearchStrategy[typing.Any]:
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{field.name: BY_TYPE[hints[field.name]] for field in dataclasses.fields(kind)})

    return st.one_of([of(kind) for kind in TYPES.values()])


@given(messages(), st.binary(max_size=100))
def test_every_message_survives_the_wire(message: Message, payload: bytes) -> None:
    frame = encode_frame(message, payload)
    json_bytes, payload_bytes = frame_lengths(frame[: HEADER.size])
    text = frame[HEADER.size : HEADER.size + json_bytes]
    assert decode_message(text) == message
    assert frame[HEADER.size + json_bytes :] == payload
    assert payload_bytes == len(payload)


@given(messages(), st.data())
def test_a_cut_message_is_refused(message: Message, data: st.DataObject) -> None:
    frame = encode_frame(message)
    text = frame[HEADER.size :]
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(ProtocolError):
        decode_message(text[:cut])


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_message(noise)


@pytest.mark.parametrize(("json_bytes", "payload_bytes"), [(MAX_JSON_BYTES + 1, 0), (0, MAX_PAYLOAD_BYTES + 1), (2**32 - 1, 2**32 - 1)])
def test_oversized_frames_are_not_read(json_bytes: int, payload_bytes: int) -> None:
    with pytest.raises(ProtocolError):
        frame_lengths(HEADER.pack(json_bytes, payload_bytes))


def test_oversized_frames_are_not_written() -> None:
    with pytest.raises(ProtocolError):
        encode_frame(Done(1), bytes(MAX_PAYLOAD_BYTES + 1))
    with pytest.raises(ProtocolError):
        encode_frame(Done(1, {"text": "x" * MAX_JSON_BYTES}))


@pytest.mark.parametrize(
    "values",
    [
        {"type": "Nothing", "request": 1},
        {"request": 1},
        {"type": "Tokens", "request": 1},
        {"type": "Tokens", "request": "1", "tokens": []},
        {"type": "Tokens", "request": 1, "tokens": [1.5]},
        {"type": "Tokens", "request": True, "tokens": []},
        {"type": "Tokens", "request": 1, "tokens": [], "colour": "red"},
        {"type": ["Tokens"]},
        [],
        None,
    ],
)
def test_what_is_no_message_is_refused(values: object) -> None:
    with pytest.raises(ProtocolError):
        decode_message(json.dumps(values).encode())


def test_a_token_costs_few_bytes() -> None:
    assert len(encode_frame(Tokens(1, (12345,)))) < 100
    assert len(encode_frame(Generate(1, "model", 5), bytes(4 * 2048))) < 4 * 2048 + 400
