"""The broker that the configuration names."""

from __future__ import annotations

from agent.config import Settings
from agent.link.broker import Broker


def configured_broker(settings: Settings) -> Broker:
    mqtt = settings.mqtt
    return Broker(
        mqtt.host,
        mqtt.port,
        client_id=settings.node.id,
        username=mqtt.username or None,
        password_file=mqtt.password_file,
        ca_file=mqtt.ca,
        certificate_file=mqtt.certificate,
        key_file=mqtt.key,
    )
