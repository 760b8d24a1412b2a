"""Payloads: what goes out comes back, untrusted bytes end in MessageError and nothing else."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from agent.protocol.messages import Command, Desired, Event, Heartbeat, Meta, Presence, Result, State, meta_hash
from agent.protocol.operations import OPS, ActivateArgs, DiagCollectArgs, arguments
from agent.protocol.ulid import encode as ulid_of
from agent.protocol.ulid import is_ulid, new_ulid, next_value, window_start
from agent.protocol.wire import MAX_PAYLOAD_BYTES, MessageError, Wire, decode, encode, wire_now

KINDS: list[type[Wire]] = [Presence, Meta, State, Heartbeat, Command, Result, Event, Desired]


def command(op: str, args: dict[str, JsonValue]) -> Command:
    return Command(id=new_ulid(), op=op, node="abc", issued_at=wire_now(), deadline_s=30, issuer="c", args=args)


def test_what_goes_out_comes_back() -> None:
    sent = Event(
        id=new_ulid(), node="abc", event_class="thermal", severity="warning", ts=wire_now(), mono=1.5, data={"gpu": [1, {"a": None}]}
    )
    payload = encode(sent)
    assert decode(Event, payload) == sent
    assert {"class", "sev"} <= json.loads(payload).keys()


@given(st.sampled_from(KINDS), st.binary(max_size=300) | st.text().map(str.encode))
def test_any_bytes_are_a_message_or_a_message_error(kind: type[Wire], payload: bytes) -> None:
    with suppress(MessageError):
        decode(kind, payload)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.sampled_from(["v", "id", "node", "op", "seq", "ts", "epoch", "args", "class", "rev"])


@given(
    st.sampled_from(KINDS),
    st.dictionaries(FIELDS, json_values),
)
def test_any_object_is_a_message_or_a_message_error(kind: type[Wire], document: dict[str, JsonValue]) -> None:
    with suppress(MessageError):
        decode(kind, json.dumps(document).encode())


@pytest.mark.parametrize("payload", [b"[" * 100_000, b'{"v":1,"x":' + b"9" * 60_000 + b"}", b" " * (MAX_PAYLOAD_BYTES + 1)])
def test_hostile_shapes_are_bounded(payload: bytes) -> None:
    with pytest.raises(MessageError):
        decode(State, payload)


def test_a_message_too_big_to_send_is_refused_here_and_not_by_the_broker() -> None:
    with pytest.raises(MessageError, match="over the limit"):
        encode(command("ping", {"echo": "x" * MAX_PAYLOAD_BYTES}))


def test_not_a_number_is_not_json() -> None:
    text = encode(command("ping", {})).replace(b'"args":{}', b'"args":{"x":NaN}')
    with pytest.raises(MessageError):
        decode(Command, text)


def test_r10_unknown_fields_are_ignored_and_another_major_is_not() -> None:
    document = json.loads(encode(command("ping", {})))
    assert decode(Command, json.dumps({**document, "priority": 9}).encode()).op == "ping"
    with pytest.raises(MessageError):
        decode(Command, json.dumps({**document, "v": 2}).encode())


def test_arguments_are_checked_against_the_table() -> None:
    assert arguments(command("activate", {"lease_s": 90, "kind": "contingent"})) == ActivateArgs(lease_s=90, kind="contingent")
    assert arguments(command("diag.collect", {"parts": ["logs"]})) == DiagCollectArgs(parts=("logs",))
    for op, args in (
        ("activate", {}),
        ("activate", {"lease_s": -1}),
        ("pipeline.start", {"id": "../x"}),
        ("agent.update", {"version": "2"}),
    ):
        with pytest.raises(MessageError):
            arguments(command(op, dict(args)))


def test_r8_what_moves_the_lease_is_never_in_the_lane_of_builds() -> None:
    assert {op for op, operation in OPS.items() if operation.lane == "control"} == {
        "activate",
        "renew",
        "standby",
        "drain",
        "cancel",
        "ping",
        "agent.restart",
    }
    assert all(operation.lane == "control" for operation in OPS.values() if operation.moves_lease)


def test_an_equal_meta_has_an_equal_hash() -> None:
    first, second = (Meta(node="abc", boot=boot, agent="1", sw={"b": "2", "a": "1"}) for boot in ("x", "x"))
    assert meta_hash(first) == meta_hash(second.model_copy(update={"hash": meta_hash(first)}))
    assert meta_hash(first) != meta_hash(first.model_copy(update={"boot": "y"}))


@given(st.lists(st.integers(0, (1 << 48) - 1), min_size=2, max_size=20))
def test_ulids_only_grow_whatever_the_clock_does(clock_ms: list[int]) -> None:
    last, seen = 0, []
    for now_ms in clock_ms:
        last = next_value(now_ms, last)
        seen.append(ulid_of(last))
    assert seen == sorted(set(seen)) and all(map(is_ulid, seen))


def test_a_window_of_ids_follows_the_time_inside_them() -> None:
    week_s = 7 * 86_400
    newest, inside, outside = (ulid_of((2_000_000_000_000 - age_s * 1000) << 80 | 5) for age_s in (0, week_s, week_s + 1))
    assert outside < window_start(newest, week_s) <= inside
