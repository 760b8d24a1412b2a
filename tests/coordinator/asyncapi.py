"""docs/asyncapi.yaml from the code and the examples of docs/protocol.md: `python -m tests.coordinator.asyncapi` writes it anew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # its stubs are one more package for one call
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from agent.protocol import messages, topics
from agent.protocol.operations import OPS
from agent.protocol.topics import POLICIES, Kind
from agent.protocol.wire import MAX_PAYLOAD_BYTES, Message

DOCS = Path(__file__).parent.parent.parent / "docs"
FILE = DOCS / "asyncapi.yaml"
EXAMPLE = re.compile(r"^```json (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

MODELS: dict[Kind, type[Message]] = {
    "presence": messages.Presence,
    "meta": messages.Meta,
    "state": messages.State,
    "hb": messages.Heartbeat,
    "res": messages.Result,
    "evt": messages.Event,
    "cmd": messages.Command,
    "desired": messages.Desired,
    "coord-presence": messages.CoordinatorPresence,
    "coord-resync": messages.Resync,
    "camera-state": messages.CameraState,
}
ADDRESSES: dict[Kind, str] = {
    **{kind: f"{topics.ROOT}/{{node}}/{kind}" for kind in ("presence", "meta", "state", "hb", "desired")},
    "res": f"{topics.ROOT}/{{node}}/res/{{id}}",
    "evt": f"{topics.ROOT}/{{node}}/evt/{{class}}",
    "cmd": f"{topics.ROOT}/{{node}}/cmd/{{op}}",
    "coord-presence": f"{topics.ROOT}/{topics.COORDINATOR}/presence",
    "coord-resync": f"{topics.ROOT}/{topics.COORDINATOR}/resync",
    "data": f"{topics.DATA_ROOT}/{{node}}/{{pipeline}}",
    "camera-state": f"{topics.DATA_ROOT}/{{node}}/{{pipeline}}/state",
    "camera-image": f"{topics.DATA_ROOT}/{{node}}/{{pipeline}}/image",
    "camera-switch": f"{topics.DATA_ROOT}/{{node}}/{{pipeline}}/enabled",
}
PARAMETERS = {
    "node": "the node's id, which is its MQTT client id too",
    "id": "the command's ULID",
    "class": "the event's class",
    "op": "what is to be done",
    "pipeline": "the pipeline's id",
}


def examples() -> list[tuple[str, dict[str, Any]]]:
    """Topic and payload of each example in protocol.md, in its order."""
    text = (DOCS / "protocol.md").read_text()
    return [(name, json.loads(payload)) for name, payload in EXAMPLE.findall(text)]


def document() -> dict[str, Any]:
    """AsyncAPI 3.0 as seen by a node: it sends what nodes send and receives what a coordinator sends."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Hotspare node",
            "version": "1.0.0",
            "description": f"The wire between node and coordinator; see protocol.md. At most {MAX_PAYLOAD_BYTES} bytes a payload.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {kind: _channel(kind) for kind in POLICIES},
        "operations": {kind: _operation(kind) for kind in POLICIES},
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _channel(kind: Kind) -> dict[str, Any]:
    names = re.findall(r"{(\w+)}", ADDRESSES[kind])
    channel: dict[str, Any] = {
        "address": ADDRESSES[kind],
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _message_names(kind)},
    }
    if names:
        channel["parameters"] = {name: {"description": PARAMETERS[name]} for name in names}
    return channel


def _operation(kind: Kind) -> dict[str, Any]:
    policy = POLICIES[kind]
    binding: dict[str, Any] = {"qos": policy.qos, "retain": policy.retain}
    if policy.expiry_s is not None:
        binding["messageExpiryInterval"] = policy.expiry_s
    return {
        "action": "send" if policy.sender == "node" else "receive",
        "channel": {"$ref": f"#/channels/{kind}"},
        "bindings": {"mqtt": {**binding, "bindingVersion": "0.2.0"}},
    }


def _message_names(kind: Kind) -> list[str]:
    if kind == "cmd":
        return [f"cmd.{op}" for op in OPS]
    return ["evt", "evt.sync"] if kind == "evt" else [kind]


def _messages() -> dict[str, Any]:
    told: dict[str, Any] = {}
    for kind, model in MODELS.items():
        told[kind] = {"payload": {"$ref": f"#/components/schemas/{model.__name__}"}}
    told["data"] = {"payload": {"type": "object", "description": "what the pipeline's task reports"}}
    told["camera-image"] = {"contentType": "image/jpeg", "payload": {"type": "string", "format": "binary", "description": "a JPEG file"}}
    told["camera-switch"] = {"contentType": "text/plain", "payload": {"type": "string", "enum": ["ON", "OFF"]}}
    told["evt.sync"] = {"payload": _narrowed("Event", {"class": {"const": "sync"}, "data": {"$ref": "#/components/schemas/Sync"}})}
    del told["cmd"]
    for op, operation in OPS.items():
        args = {"$ref": f"#/components/schemas/{operation.args.__name__}"}
        told[f"cmd.{op}"] = {"payload": _narrowed("Command", {"op": {"const": op}, "args": args})}
    for name, payload in examples():
        topic = topics.parse(name)
        specific = f"{topic.kind}.{topic.leaf}"
        told[specific if specific in told else topic.kind].setdefault("examples", []).append({"payload": payload})
    return dict(sorted(told.items()))


def _narrowed(model: str, properties: dict[str, Any]) -> dict[str, Any]:
    return {"allOf": [{"$ref": f"#/components/schemas/{model}"}, {"properties": properties}]}


def _schemas() -> dict[str, Any]:
    kinds: list[type[BaseModel]] = [*MODELS.values(), messages.Sync, *(operation.args for operation in OPS.values())]
    _, whole = models_json_schema([(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = json.loads(json.dumps(whole["$defs"]))
    return dict(sorted(schemas.items()))


def text() -> str:
    written: str = yaml.safe_dump(document(), sort_keys=False, allow_unicode=True, width=140)
    return "# Written by `python -m tests.coordinator.asyncapi`; a test compares it with the code.\n" + written


if __name__ == "__main__":
    FILE.write_text(text())
