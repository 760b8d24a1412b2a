"""What Home Assistant is told so that each camera becomes a device there, by itself. Pure.

Rules: https://www.home-assistant.io/integrations/mqtt/#mqtt-discovery and the pages image.mqtt, binary_sensor.mqtt, sensor.mqtt beside it.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.protocol import topics

LABELS_MAX = 12  # with more, only those that the settings name: eighty classes are no dashboard
ENTITIES_MAX = 64
STATES = ("starting", "connecting", "streaming", "stalled", "backing_off", "ended", "failed", "paused", "unknown")


@dataclass(frozen=True)
class Device:
    """A camera as far as Home Assistant is concerned. `labels`: what its model knows; `url`: the node's page, empty if nobody knows it."""

    node: str
    camera: str
    version: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    url: str = ""


def discovery(prefix: str, device: Device) -> dict[str, bytes]:
    """Topic → payload of every entity of a camera."""
    told: dict[str, bytes] = {}
    for component, key, entity in _entities(device)[:ENTITIES_MAX]:
        identifier = f"{_slug(device.camera)}_{key}"
        payload = {**_common(device, identifier), **entity}
        if component == "image":
            del payload["state_topic"]
        told[f"{prefix}/{component}/{device.node}/{identifier}/config"] = json.dumps(payload, separators=(",", ":")).encode()
    return told


def _entities(device: Device) -> list[tuple[str, str, dict[str, Any]]]:
    settings = device.settings
    labels = _labels(settings.get("labels")) or (device.labels if len(device.labels) <= LABELS_MAX else ())
    picture = {"image_topic": topics.camera_image(device.node, device.camera), "content_type": "image/jpeg"}
    found = [
        ("image", "picture", {"name": "Picture", **picture}),
        ("binary_sensor", "problem", _problem(device)),
        ("sensor", "status", _status(device)),
        ("sensor", "fps", _frame_rate()),
        ("switch", "enabled", _switch(device)),
        ("binary_sensor", "occupied", _occupancy("Anything in view", "value_json.objects.values() | sum > 0")),
    ]  # fmt: skip
    found += [
        ("binary_sensor", f"label_{_slug(label)}", _occupancy(label, f"value_json.objects.get({_text(label)}, 0) > 0")) for label in labels
    ]
    for zone in _shapes(settings.get("zones")):
        name = str(zone.get("name", "zone"))
        here = f"(value_json.zones.get({_text(name)}) or {{}})"
        found.append(("binary_sensor", f"zone_{_slug(name)}", _occupancy(name, f"{here}.values() | sum > 0")))
        for label in _labels(zone.get("labels")) or labels:
            key = f"zone_{_slug(name)}_{_slug(label)}"
            found.append(("binary_sensor", key, _occupancy(f"{name} {label}", f"{here}.get({_text(label)}, 0) > 0")))
    for line in _shapes([settings.get("line"), *(settings.get("lines") or ())]):
        name = str(line.get("name", "line"))
        for direction in ("forward", "backward"):
            value = f"{{{{ (value_json.lines.get({_text(name)}) or {{}}).get('{direction}', 0) }}}}"
            counter = {"name": f"{name} {direction}", "state_class": "total_increasing", "value_template": value}
            found.append(("sensor", f"line_{_slug(name)}_{direction}", counter))
    return found


def _common(device: Device, identifier: str) -> dict[str, Any]:
    about = {
        "identifiers": [f"hotspare_{device.node}_{device.camera}"],
        "name": f"{device.camera} on {device.node}",
        "manufacturer": "Hotspare",
        "model": str(device.settings.get("model", "camera")),
        "sw_version": device.version,
    }
    return {
        "unique_id": f"hotspare_{device.node}_{identifier}",
        "device": {**about, "configuration_url": device.url} if device.url else about,
        "origin": {"name": "Hotspare", "sw_version": device.version},
        "availability": [_node_is_there(device), _camera_streams(device)],
        "availability_mode": "all",
        "state_topic": topics.camera_state(device.node, device.camera),
    }


def _node_is_there(device: Device) -> dict[str, str]:
    """By the node's will, which the broker publishes for it."""
    template = "{{ 'offline' if value_json.state == 'offline' else 'online' }}"
    return {"topic": topics.presence(device.node), "value_template": template}


def _camera_streams(device: Device) -> dict[str, str]:
    template = "{{ 'online' if value_json.state == 'streaming' else 'offline' }}"
    return {"topic": topics.camera_state(device.node, device.camera), "value_template": template}


def _problem(device: Device) -> dict[str, Any]:
    """Says that a camera does not stream, so it must be there when it does not."""
    return {
        "name": "Problem", "device_class": "problem", "entity_category": "diagnostic", "availability": [_node_is_there(device)],
        "value_template": "{{ 'OFF' if value_json.state == 'streaming' else 'ON' }}",
    }  # fmt: skip


def _status(device: Device) -> dict[str, Any]:
    return {
        "name": "Status", "device_class": "enum", "options": list(STATES), "entity_category": "diagnostic",
        "availability": [_node_is_there(device)], "value_template": "{{ value_json.state }}",
    }  # fmt: skip


def _switch(device: Device) -> dict[str, Any]:
    """Resumes and pauses the camera."""
    return {
        "name": "Enabled", "command_topic": topics.camera_switch(device.node, device.camera), "qos": 1, "icon": "mdi:cctv",
        "availability": [_node_is_there(device)], "value_template": "{{ 'OFF' if value_json.state == 'paused' else 'ON' }}",
    }  # fmt: skip


def _frame_rate() -> dict[str, Any]:
    return {
        "name": "Frame rate", "unit_of_measurement": "fps", "state_class": "measurement", "entity_category": "diagnostic",
        "value_template": "{{ value_json.fps }}",
    }  # fmt: skip


def _occupancy(name: str, condition: str) -> dict[str, Any]:
    return {"name": name, "device_class": "occupancy", "value_template": f"{{{{ 'ON' if {condition} else 'OFF' }}}}"}


def _text(value: str) -> str:
    """A string literal for a Jinja template, in ASCII: names are people's, and must not become code."""
    return json.dumps(value)


def _slug(name: str) -> str:
    """What may stand in a topic of discovery; two names never become one."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:40]
    return plain if plain == name else f"{plain}_{zlib.crc32(name.encode()):08x}"


def _labels(value: Any) -> tuple[str, ...]:
    return tuple(str(each) for each in value) if isinstance(value, list | tuple) else ()


def _shapes(value: Any) -> list[Mapping[str, Any]]:
    """Zones or lines of settings that the worker has not yet seen: what is none is left out."""
    found = value if isinstance(value, Sequence) and not isinstance(value, str) else []
    return [each for each in found if isinstance(each, Mapping)]
