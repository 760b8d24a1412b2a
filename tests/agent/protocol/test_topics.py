"""Topic names: build and parse are each other's inverse, and nothing else is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol import topics
from agent.protocol.topics import POLICIES, Topic, TopicError, build, parse

nodes = st.from_regex(topics.NODE_PATTERN, fullmatch=True).filter(lambda text: not text.endswith("\n"))
leaves = st.from_regex(topics.LEAF_PATTERN, fullmatch=True).filter(lambda text: not text.endswith("\n"))
plain = st.builds(Topic, st.sampled_from(["presence", "meta", "state", "hb", "desired"]), nodes)
leafed = st.builds(Topic, st.sampled_from(["res", "evt", "cmd", "data", "camera-state", "camera-image", "camera-switch"]), nodes, leaves)
fleet = st.builds(Topic, st.sampled_from(["coord-presence", "coord-resync"]))


@given(plain | leafed | fleet)
def test_parse_undoes_build(topic: Topic) -> None:
    assert parse(build(topic)) == topic


@given(st.text() | st.lists(st.sampled_from(["hotspare", "v1", "_coord", "presence", "+", "#", "abc", "cmd", ""])).map("/".join))
def test_what_parses_is_built_again_the_same(name: str) -> None:
    try:
        topic = parse(name)
    except TopicError:
        return
    assert build(topic) == name


@pytest.mark.parametrize(
    "name",
    ["", "hotspare/v1/+/cmd/ping", "hotspare/v2/abc/state", "edge/v1/abc/state", "hotspare/v1/_coord/state", "hotspare/v1/ab/state",
     "hotspare/v1/ABC/state", "hotspare/v1/abc/cmd/../x", "hotspare/v1/abc/state\n", "hotspare/v1/abc/presence/x", "/hotspare/v1/abc/hb"],
)  # fmt: skip
def test_foreign_names_are_refused(name: str) -> None:
    with pytest.raises(TopicError):
        parse(name)


def test_parts_that_would_break_out_are_refused() -> None:
    for topic in (Topic("cmd", "abc", "a/b"), Topic("cmd", "abc", "+"), Topic("state", "a/b"), Topic("state"), Topic("hb", "abc", "x")):
        with pytest.raises(TopicError):
            build(topic)


def test_commands_are_never_retained_and_nodes_subscribe_only_to_their_own() -> None:
    assert not POLICIES["cmd"].retain
    for subscription in topics.node_subscriptions("abc"):
        sent_by = POLICIES[parse(subscription.replace("+", "ping")).kind].sender
        assert sent_by == "coordinator"
        assert subscription.startswith(("hotspare/v1/abc/", "hotspare/v1/_coord/"))
