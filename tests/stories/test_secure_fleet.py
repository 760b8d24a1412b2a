"""A fleet over the example of a broker: certificates made as docs/operations.md says, each name held to its own topics."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from agent.demo.primary import SwitchablePrimary
from agent.demo.programs import find, program
from agent.demo.stage import to_toml
from agent.link.broker import Broker, LinkLost, PublishRefused
from agent.link.mqtt import Link
from tests.conftest import ROOT
from tests.stories.house import House, needs_programs, until

pytestmark = [pytest.mark.anyio, needs_programs, pytest.mark.timeout(300)]
NODE, STRANGER = "gateway-0001", "gateway-0002"


def make_certificates(folder: Path) -> None:
    """With the very lines of the documentation, and one node more."""
    lines = re.search(r"```sh certificates\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)
    assert lines is not None
    script = f"set -e\n{lines[1]}certificate {STRANGER}\n"
    environment = {**os.environ, "BROKER": "IP:127.0.0.1"}
    subprocess.run(["sh", "-c", script], cwd=folder, env=environment, check=True, capture_output=True, timeout=60)


def write_broker(folder: Path, port: int) -> list[str]:
    """The example with its paths in `folder`; returns the command."""
    text = (ROOT / "systemd" / "mosquitto.conf").read_text()
    for there, here in (
        ("/etc/mosquitto/pki", folder),
        ("/etc/mosquitto/hotspare.acl", ROOT / "systemd" / "mosquitto.acl"),
        ("/var/lib/mosquitto", folder),
    ):
        assert there in text
        text = text.replace(there, str(here))
    # As root mosquitto becomes another user, who may not read this folder.
    (folder / "mosquitto.conf").write_text(text.replace("listener 8883", f"user root\nlistener {port} 127.0.0.1"))
    return [find("mosquitto"), "-c", str(folder / "mosquitto.conf")]


def login(folder: Path, name: str) -> dict[str, str]:
    return {"ca": str(folder / "ca.pem"), "certificate": str(folder / f"{name}.pem"), "key": str(folder / f"{name}.key")}


def broker_for(folder: Path, port: int, name: str) -> Broker:
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    return Broker("127.0.0.1", port, name, ca_file=folder / "ca.pem", certificate_file=certificate, key_file=key, timeout_s=20.0)


async def test_a_node_registers_and_obeys_and_names_keep_to_their_topics(tmp_path: Path) -> None:
    house = House(tmp_path)
    make_certificates(tmp_path)
    settings = house.node_settings(NODE, mqtt={"host": "127.0.0.1", "port": house.broker, **login(tmp_path, NODE)}, models={"serve": []})
    async with (
        program(write_broker(tmp_path, house.broker), tmp_path / "mosquitto.log", house.broker),
        anyio.create_task_group() as tasks,
    ):
        primary = SwitchablePrimary()
        tasks.start_soon(primary.run)
        coordinator = {
            "database": str(tmp_path / "registry.sqlite"),
            "primary": {"url": primary.url},
            "broker": {"host": "127.0.0.1", "port": house.broker, **login(tmp_path, "coordinator")},
            "http": {"port": house.coordinator},
        }
        (tmp_path / "coordinator.toml").write_text(to_toml(coordinator))
        hotspare = [sys.executable, "-m", "agent.cli"]
        async with (
            program(
                [*hotspare, "coordinator", "--config", str(tmp_path / "coordinator.toml")], tmp_path / "coordinator.log", house.coordinator
            ),
            house.node(settings),
        ):
            fleet = [*hotspare, "fleet", "--coordinator", f"http://127.0.0.1:{house.coordinator}"]

            async def obeys() -> bool:
                done = await anyio.run_process([*fleet, "send", NODE, "ping", "echo=hello"], check=False, stderr=subprocess.STDOUT)
                return done.returncode == 0 and b"hello" in done.stdout

            await until(obeys, 60, "the node answers a ping of the coordinator")

            async with Link(broker_for(tmp_path, house.broker, STRANGER)) as stranger:
                await stranger.publish(f"hotspare/v1/{STRANGER}/presence", b"{}")
                for topic in (f"hotspare/v1/{NODE}/presence", f"hotspare/v1/{STRANGER}/cmd/ping", "hotspare/v1/_coord/presence"):
                    with pytest.raises(PublishRefused, match="Not authorized"):
                        await stranger.publish(topic, b"{}")
            nobody = Broker("127.0.0.1", house.broker, NODE, ca_file=tmp_path / "ca.pem", timeout_s=20.0)
            with pytest.raises(LinkLost):
                async with Link(nobody):
                    pass
        tasks.cancel_scope.cancel()
