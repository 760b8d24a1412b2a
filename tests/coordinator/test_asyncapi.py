"""The documents of the wire protocol say what the code does, and nothing else."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are one more package for one call

from agent.protocol import topics
from agent.protocol.messages import Event, Sync
from agent.protocol.operations import OPS
from agent.protocol.topics import POLICIES, Kind
from agent.protocol.wire import ERROR_CODES, FINAL_STATUSES, Wire, decode
from tests.coordinator import asyncapi
from tests.coordinator.asyncapi import ADDRESSES, MODELS, document, examples

PROTOCOL = (asyncapi.DOCS / "protocol.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    section = PROTOCOL.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_asyncapi_document_is_that_of_the_code() -> None:
    checked_in: dict[str, Any] = yaml.safe_load(asyncapi.FILE.read_text())
    assert checked_in == document(), "the protocol or its examples changed: python -m tests.coordinator.asyncapi"


def test_every_reference_in_the_document_leads_somewhere() -> None:
    whole = document()
    for path in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(whole))):
        found: Any = whole
        for part in path.split("/"):
            found = found[part]
        assert found is not None


def test_every_kind_of_topic_has_an_address_that_the_code_builds_and_parses() -> None:
    assert set(ADDRESSES) == set(POLICIES) == set(get_args(Kind)) == {*MODELS, "data", "camera-image", "camera-switch"}
    values = {"node": "edge-a", "id": "01JBR3Q4M0Z6W1F7K2T9X5C8DE", "class": "sync", "op": "ping", "pipeline": "belt"}
    for kind, address in ADDRESSES.items():
        name = address.format(**values)
        assert topics.parse(name).kind == kind and topics.build(topics.parse(name)) == name


def test_the_table_of_topics_is_that_of_the_code() -> None:
    told = {row[0].strip("`"): (row[1], int(row[2]), row[3] == "yes", row[4]) for row in rows("Topics")}
    special = {"hb": "3 × interval", "cmd": "its deadline"}
    assert told == {
        ADDRESSES[kind]: (
            policy.sender,
            policy.qos,
            policy.retain,
            special.get(kind, "never") if policy.expiry_s is None else f"{policy.expiry_s} s",
        )
        for kind, policy in POLICIES.items()
    }


@pytest.mark.parametrize(("name", "payload"), examples(), ids=lambda value: value if isinstance(value, str) else "")
def test_each_example_is_a_message_of_its_topic(name: str, payload: dict[str, Any]) -> None:
    topic = topics.parse(name)
    message = decode(MODELS[topic.kind], json.dumps(payload).encode())
    assert getattr(message, "node", topic.node) == topic.node
    assert_nothing_ignored(message, payload)
    if isinstance(message, Event) and message.event_class == "sync":
        assert_nothing_ignored(decode(Sync, json.dumps(payload["data"]).encode()), payload["data"])


def assert_nothing_ignored(message: Wire, payload: dict[str, Any]) -> None:
    """An unknown field is ignored on the wire; in an example it would be a mistake."""
    read = message.model_dump(mode="json", by_alias=True)
    assert set(payload) <= set(read)
    for name, value in payload.items():
        if isinstance(value, dict) and isinstance(read[name], dict):
            assert set(value) <= set(read[name])


def test_each_kind_of_message_has_an_example() -> None:
    assert {topics.parse(name).kind for name, _ in examples()} == set(MODELS)


def test_the_table_of_commands_is_that_of_the_code() -> None:
    told = {row[0].strip("`"): row for row in rows("Commands")}
    assert set(told) == set(OPS)
    for op, operation in OPS.items():
        assert told[op][1:3] == [operation.lane, "yes" if operation.moves_lease else "no"]
        args = told[op][3].strip("`")
        assert set(json.loads(args)) == set(operation.args.model_fields) & set(json.loads(args))
        decode(operation.args, args.encode())


def test_statuses_error_codes_and_rules_are_all_named() -> None:
    commands = PROTOCOL.split("\n## Commands\n")[1].split("\n## ")[0]
    codes = commands.split("Error codes:")[1]
    assert set(re.findall(r"`(\w+)`", codes)) == ERROR_CODES
    statuses = set(re.findall(r"`(\w+)`", commands.split("Status:")[1].split("Error codes:")[0]))
    assert statuses - {"issued", "expired"} == {"accepted", "executing", *FINAL_STATUSES}
    assert [row[0].split()[0] for row in rows("Rules")] == [f"R{n}" for n in range(1, 11)] + [f"L{n}" for n in range(1, 11)]
