"""Topic names of the wire protocol: build, parse and the delivery policy of each kind. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

ROOT = "hotspare/v1"
DATA_ROOT = "hotspare-data/v1"
COORDINATOR = "_coord"

NODE_PATTERN = r"^[a-z0-9][a-z0-9-]{2,62}$"
LEAF_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_NODE = re.compile(NODE_PATTERN[:-1] + r"\Z")
_LEAF = re.compile(LEAF_PATTERN[:-1] + r"\Z")

Kind = Literal[
    "presence", "meta", "state", "hb", "res", "evt", "cmd", "desired", "coord-presence", "coord-resync", "data", "camera-state",
    "camera-image", "camera-switch",
]  # fmt: skip
_PLAIN: frozenset[str] = frozenset({"presence", "meta", "state", "hb", "desired"})
_WITH_LEAF: frozenset[str] = frozenset({"res", "evt", "cmd"})
_OF_CAMERA: Mapping[str, Kind] = {"state": "camera-state", "image": "camera-image", "enabled": "camera-switch"}

DAY_S = 86_400


class TopicError(ValueError):
    """A topic name or one of its parts is not of this protocol. Callers drop the message and report it."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One parsed name. `node` is None for the coordinator's; `leaf` is the command id, event class, op or pipeline."""

    kind: Kind
    node: str | None = None
    leaf: str | None = None

    def __str__(self) -> str:
        return build(self)


@dataclass(frozen=True, slots=True)
class Policy:
    """How messages of one kind travel. `expiry_s` None: never expires, or the sender computes it (hb, cmd)."""

    sender: Literal["node", "coordinator", "home"]
    qos: Literal[0, 1]
    retain: bool
    expiry_s: int | None


POLICIES: Mapping[Kind, Policy] = {
    "presence": Policy("node", 1, True, 7 * DAY_S),
    "meta": Policy("node", 1, True, 30 * DAY_S),
    "state": Policy("node", 1, True, DAY_S),
    "hb": Policy("node", 0, False, None),  # 3 x its interval
    "res": Policy("node", 1, False, DAY_S),
    "evt": Policy("node", 1, False, DAY_S),
    "data": Policy("node", 0, False, 60),
    "camera-state": Policy("node", 1, True, DAY_S),
    "camera-image": Policy("node", 0, True, DAY_S),
    "camera-switch": Policy("home", 1, False, None),  # Home Assistant's, which sends no expiry
    "cmd": Policy("coordinator", 1, False, None),  # the command's deadline_s
    "desired": Policy("coordinator", 1, True, None),
    "coord-presence": Policy("coordinator", 1, True, None),
    "coord-resync": Policy("coordinator", 1, False, 60),
}


def is_node_id(text: str) -> bool:
    return _NODE.match(text) is not None


def build(topic: Topic) -> str:
    """The name on the wire. Raises TopicError for parts that no parser would take back."""
    kind, node, leaf = topic.kind, topic.node, topic.leaf
    if kind in ("coord-presence", "coord-resync"):
        if node is not None or leaf is not None:
            raise TopicError(f"{kind} has neither node nor leaf, got {node!r} and {leaf!r}")
        return f"{ROOT}/{COORDINATOR}/{kind.removeprefix('coord-')}"
    if node is None or not is_node_id(node):
        raise TopicError(f"node id {node!r} does not match {NODE_PATTERN}")
    if kind in _PLAIN:
        if leaf is not None:
            raise TopicError(f"{kind} has no leaf, got {leaf!r}")
        return f"{ROOT}/{node}/{kind}"
    if leaf is None or not _LEAF.match(leaf):
        raise TopicError(f"leaf {leaf!r} of {kind} does not match {LEAF_PATTERN}")
    if kind in _OF_CAMERA.values():
        return f"{DATA_ROOT}/{node}/{leaf}/{next(last for last, known in _OF_CAMERA.items() if known == kind)}"
    return f"{DATA_ROOT}/{node}/{leaf}" if kind == "data" else f"{ROOT}/{node}/{kind}/{leaf}"


def parse(name: str) -> Topic:
    """The inverse of build. Raises TopicError for every other name, wildcards included."""
    match name.split("/"):
        case ["hotspare", "v1", "_coord", ("presence" | "resync") as which]:
            return Topic("coord-presence" if which == "presence" else "coord-resync")
        case ["hotspare", "v1", node, kind] if kind in _PLAIN and is_node_id(node):
            return Topic(cast("Kind", kind), node)
        case ["hotspare", "v1", node, kind, leaf] if kind in _WITH_LEAF and is_node_id(node) and _LEAF.match(leaf):
            return Topic(cast("Kind", kind), node, leaf)
        case ["hotspare-data", "v1", node, leaf] if is_node_id(node) and _LEAF.match(leaf):
            return Topic("data", node, leaf)
        case ["hotspare-data", "v1", node, leaf, of] if of in _OF_CAMERA and is_node_id(node) and _LEAF.match(leaf):
            return Topic(_OF_CAMERA[of], node, leaf)
        case _:
            raise TopicError(f"topic {name[:120]!r} is not of {ROOT} or {DATA_ROOT}")


def presence(node: str) -> str:
    return build(Topic("presence", node))


def meta(node: str) -> str:
    return build(Topic("meta", node))


def state(node: str) -> str:
    return build(Topic("state", node))


def heartbeat(node: str) -> str:
    return build(Topic("hb", node))


def desired(node: str) -> str:
    return build(Topic("desired", node))


def result(node: str, command_id: str) -> str:
    return build(Topic("res", node, command_id))


def event(node: str, event_class: str) -> str:
    return build(Topic("evt", node, event_class))


def command(node: str, op: str) -> str:
    return build(Topic("cmd", node, op))


def data(node: str, pipeline: str) -> str:
    return build(Topic("data", node, pipeline))


def camera_state(node: str, pipeline: str) -> str:
    return build(Topic("camera-state", node, pipeline))


def camera_image(node: str, pipeline: str) -> str:
    return build(Topic("camera-image", node, pipeline))


def camera_switch(node: str, pipeline: str) -> str:
    return build(Topic("camera-switch", node, pipeline))


def switch_subscription(node: str) -> str:
    """Where Home Assistant switches cameras; asked for only by a node that tells it of them."""
    return f"{DATA_ROOT}/{node}/+/enabled"


def coordinator_presence() -> str:
    return build(Topic("coord-presence"))


def coordinator_resync() -> str:
    return build(Topic("coord-resync"))


def node_subscriptions(node: str) -> tuple[str, ...]:
    """All that a node ever subscribes to: a fixed list, so that no message can make it ask for a forbidden topic."""
    return (
        f"{ROOT}/{node}/cmd/+",
        desired(node),
        coordinator_presence(),
        coordinator_resync(),
    )


COORDINATOR_SUBSCRIPTIONS: tuple[str, ...] = (
    f"{ROOT}/+/presence",
    f"{ROOT}/+/meta",
    f"{ROOT}/+/state",
    f"{ROOT}/+/hb",
    f"{ROOT}/+/res/+",
    f"{ROOT}/+/evt/+",
)
