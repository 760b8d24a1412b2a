"""Discovery by the rules that Home Assistant publishes: https://www.home-assistant.io/integrations/mqtt/ and its pages for each component.

The rules stand here in our words: keys that a component knows, those it must have, those that exclude each other. Templates are rendered
with Jinja on the very messages that the node sends.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jinja2
import pytest

from agent.cameras.home_assistant import ENTITIES_MAX, Device, discovery
from agent.cameras.reports import camera_state, has_news
from agent.protocol import topics
from agent.protocol.wire import encode

TOPIC = re.compile(r"homeassistant/(?P<component>\w+)/(?P<node_id>[a-zA-Z0-9_-]+)/(?P<object_id>[a-zA-Z0-9_-]+)/config")
COMMON = {
    "availability", "availability_mode", "availability_template", "availability_topic", "default_entity_id", "device", "enabled_by_default",
    "encoding", "entity_category", "entity_picture", "icon", "json_attributes_template", "json_attributes_topic", "name", "object_id",
    "origin", "payload_available", "payload_not_available", "platform", "qos", "unique_id",
}  # fmt: skip
STATEFUL = {"device_class", "expire_after", "force_update", "state_topic", "value_template"}
KNOWN = {
    "image": COMMON | {"content_type", "image_encoding", "image_topic", "url_template", "url_topic"},
    "binary_sensor": COMMON | STATEFUL | {"off_delay", "payload_off", "payload_on"},
    "switch": COMMON
    | {"command_template", "command_topic", "device_class", "optimistic", "payload_off", "payload_on", "retain", "state_off", "state_on"}
    | {"state_topic", "value_template"},
    "sensor": COMMON
    | STATEFUL
    | {"last_reset_value_template", "options", "state_class", "suggested_display_precision", "unit_of_measurement"},
}
DEVICE = {"configuration_url", "connections", "hw_version", "identifiers", "manufacturer", "model", "model_id", "name", "serial_number",
          "suggested_area", "sw_version", "via_device"}  # fmt: skip
BINARY_CLASSES = {"occupancy", "motion", "presence", "problem", "connectivity"}
REPORT = {
    "id": "belt", "state": "streaming", "fps": 9.98, "age_ms_p50": 12.5, "objects": {"parcel": 2}, "is_slowed": False,
    "zones": {"gate": {"parcel": 1}, "yard 1": {}}, "lines": {"kerb": {"forward": {"parcel": 3, "ball": 4}, "backward": {}}},
}  # fmt: skip
SETTINGS = {
    "model": "conveyor-detr",
    "zones": [{"name": "gate", "points": []}, {"name": "yard 1", "labels": ["parcel"]}, {"name": "yard_1"}],
    "line": {"name": "kerb"},
}
BELT = Device("spare-1", "belt", "0.1.0", SETTINGS, ("parcel", "ball"), "http://10.0.0.7:8080/")


def entities(device: Device = BELT) -> dict[str, dict[str, Any]]:
    return {topic: json.loads(payload) for topic, payload in discovery("homeassistant", device).items()}


def rendered(template: str, state: dict[str, Any]) -> str:
    return jinja2.Environment(autoescape=False).from_string(template).render(value_json=state)


def said(**changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(encode(camera_state("spare-1", {**REPORT, **changes})))
    return told


def value(key: str, state: dict[str, Any], device: Device = BELT) -> str:
    (entity,) = [entity for topic, entity in entities(device).items() if topic.endswith(f"/belt_{key}/config")]
    return rendered(entity["value_template"], state)


def test_every_payload_is_one_that_home_assistant_takes() -> None:
    found = entities()
    assert len({entity["unique_id"] for entity in found.values()}) == len(found)
    for topic, entity in found.items():
        match = TOPIC.fullmatch(topic)
        assert match, topic
        assert match["node_id"] == "spare-1"
        component = match["component"]
        assert set(entity) <= KNOWN[component], topic
        check_common(entity)
        if component == "image":
            assert ("image_topic" in entity) != ("url_topic" in entity)
            assert entity["content_type"] == "image/jpeg"
        else:
            assert entity["state_topic"] == "hotspare-data/v1/spare-1/belt/state"
        if component == "switch":
            assert entity["command_topic"] == "hotspare-data/v1/spare-1/belt/enabled"
            assert topics.parse(entity["command_topic"]).kind == "camera-switch"
        if component == "binary_sensor":
            assert entity["device_class"] in BINARY_CLASSES
        if component == "sensor":
            check_sensor(entity)


def check_common(entity: dict[str, Any]) -> None:
    assert entity["name"] and entity["unique_id"]
    device = entity["device"]
    assert set(device) <= DEVICE
    assert device["identifiers"] == ["hotspare_spare-1_belt"]
    assert device["configuration_url"].startswith(("http://", "https://", "homeassistant://"))
    assert set(entity["origin"]) <= {"name", "sw_version", "support_url"} and entity["origin"]["name"]
    assert entity["availability_mode"] in ("all", "any", "latest")
    for source in entity["availability"]:
        assert set(source) <= {"topic", "payload_available", "payload_not_available", "value_template"} and source["topic"]
    assert entity.get("entity_category", "diagnostic") in ("config", "diagnostic")


def check_sensor(entity: dict[str, Any]) -> None:
    assert entity.get("state_class", "measurement") in ("measurement", "measurement_angle", "total", "total_increasing")
    if "options" in entity:
        assert entity["device_class"] == "enum" and "state_class" not in entity and "unit_of_measurement" not in entity
    assert entity.get("entity_category") != "config"  # sensors may not


@pytest.mark.parametrize(
    ("key", "on", "off"),
    [
        ("occupied", {}, {"objects": {}}),
        ("label_parcel", {}, {"objects": {"ball": 2}}),
        ("zone_gate", {}, {"zones": {"gate": {}}}),
        ("zone_gate_parcel", {}, {"zones": {"gate": {"ball": 1}}}),
        ("zone_gate_ball", {"zones": {"gate": {"ball": 1}}}, {"zones": {}}),
        ("problem", {"state": "stalled"}, {}),
    ],
)
def test_a_sensor_is_on_and_off_with_what_the_node_says(key: str, on: dict[str, Any], off: dict[str, Any]) -> None:
    assert value(key, said(**on)) == "ON"
    assert value(key, said(**off)) == "OFF"


def test_figures_and_availability_follow_the_node() -> None:
    assert value("line_kerb_forward", said()) == "7"
    assert value("line_kerb_backward", said()) == "0"
    assert value("fps", said()) == "9.98"
    assert value("status", said(state="backing_off")) == "backing_off"
    (picture,) = [entity for entity in entities().values() if "image_topic" in entity]
    node, camera = picture["availability"]
    assert [rendered(camera["value_template"], said(state=state)) for state in ("streaming", "stalled")] == ["online", "offline"]
    assert [rendered(node["value_template"], {"state": state}) for state in ("online", "offline", "draining")] == [
        "online",
        "offline",
        "online",
    ]


def test_a_name_is_text_whatever_it_holds() -> None:
    evil = """"}} {{ ''.__class__ }} {% x %} \\ ü"""
    device = Device("spare-1", "belt", "0.1.0", {"labels": [evil, "über"]})
    state = {"objects": {evil: 1}}
    keys = [topic.split("/")[3].removeprefix("belt_") for topic in entities(device) if "_label_" in topic]
    assert len(set(keys)) == 2
    assert [value(key, state, device) for key in keys] == ["ON", "OFF"]


def test_two_names_never_become_one_and_there_are_so_many_entities_and_no_more() -> None:
    zones = [topic for topic in entities() if re.search(r"belt_zone_yard_1\w*/config", topic)]
    assert len({topic for topic in zones if not topic.endswith(("_parcel/config", "_ball/config"))}) == 2
    many = Device("spare-1", "belt", "0.1.0", {"zones": [{"name": f"z{n}"} for n in range(32)]}, ("a", "b", "c"))
    assert len(entities(many)) == ENTITIES_MAX
    coco = Device("spare-1", "belt", "0.1.0", {}, tuple(f"class {n}" for n in range(80)))
    assert not any("_label_" in topic for topic in entities(coco))


def test_any_name_of_a_camera_fits_into_a_topic() -> None:
    first, second = (entities(Device("spare-1", camera, "0.1.0")) for camera in ("Front.Door", "Front_Door"))
    assert all(TOPIC.fullmatch(topic) for topic in (*first, *second))
    assert not set(first) & set(second)


def test_only_what_matters_is_news() -> None:
    assert has_news({}, REPORT)
    assert not has_news(REPORT, {**REPORT, "fps": 3.0, "age_ms_p50": 99.0})
    assert has_news(REPORT, {**REPORT, "objects": {"parcel": 1}})


def test_a_paused_camera_is_switched_off_and_can_be_switched_on() -> None:
    assert value("enabled", said()) == "ON"
    assert value("enabled", said(state="paused")) == "OFF"
    (switch,) = [entity for topic, entity in entities().items() if topic.startswith("homeassistant/switch/")]
    assert [each["topic"] for each in switch["availability"]] == ["hotspare/v1/spare-1/presence"]  # also while it streams nothing
