"""One connection against a real mosquitto with certificates and an ACL, as section 6.7 of the design asks for."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from agent.link.broker import Broker, LinkLost, PublishRefused
from agent.link.mqtt import Link
from tests.agent.link.broker import Mosquitto, running_mosquitto

pytestmark = pytest.mark.anyio

SECURE = """
cafile {folder}/ca.crt
certfile {folder}/broker.crt
keyfile {folder}/broker.key
require_certificate true
use_identity_as_username true
use_username_as_clientid true
tls_version tlsv1.3
acl_file {folder}/acl
"""
ACL = """
pattern write hotspare/v1/%u/presence
pattern write hotspare/v1/%u/evt/#
pattern read hotspare/v1/%u/cmd/#
"""


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=30)


def make_certificates(folder: Path) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(folder, "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test-ca", "-days", "2")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for name, common in (("broker", "127.0.0.1"), ("node", "jetson-0001")):
        openssl(folder, "req", "-new", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={common}")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-out", f"{name}.crt", "-days", "2", "-extfile", "names")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", *signed)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed; apt-get install openssl")
    folder = tmp_path_factory.mktemp("secure")
    make_certificates(folder)
    (folder / "acl").write_text(ACL)
    with running_mosquitto(folder, SECURE.format(folder=folder)) as broker:
        yield broker


def node_of(broker: Mosquitto) -> Broker:
    folder = broker.folder
    return Broker(
        broker.host,
        broker.port,
        "jetson-0001",
        ca_file=folder / "ca.crt",
        certificate_file=folder / "node.crt",
        key_file=folder / "node.key",
        timeout_s=5.0,
    )


async def test_mutual_tls_carries_many_messages_and_an_acl_is_told_apart_from_a_loss(secure: Mosquitto) -> None:
    async with Link(node_of(secure)) as link:
        for number in range(200):
            await link.publish("hotspare/v1/jetson-0001/evt/x", bytes(number * 50))
        with pytest.raises(PublishRefused, match="Not authorized"):
            await link.publish("hotspare/v1/jetson-0002/presence", b"{}")
        await link.publish("hotspare/v1/jetson-0001/presence", b"{}")


async def test_without_a_certificate_of_the_ca_there_is_no_link(secure: Mosquitto) -> None:
    broker = Broker(secure.host, secure.port, "jetson-0001", ca_file=secure.folder / "ca.crt", timeout_s=3.0)
    with pytest.raises(LinkLost):
        async with Link(broker):
            pass
    stranger = Broker(secure.host, secure.port, "jetson-0001", uses_tls=True, timeout_s=3.0)  # knows no CA of ours
    with pytest.raises(LinkLost, match="certificate verify failed"):
        async with Link(stranger):
            pass


async def test_a_missing_key_file_is_a_lost_link_that_names_it(secure: Mosquitto) -> None:
    gone = Broker(secure.host, secure.port, "jetson-0001", ca_file=secure.folder / "gone.crt")
    with pytest.raises(LinkLost, match="No such file"):
        async with Link(gone):
            pass


async def test_wrong_password_is_refused_and_the_right_one_is_read_from_its_file(tmp_path: Path) -> None:
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed; apt-get install mosquitto")
    await anyio.run_process(["mosquitto_passwd", "-b", "-c", str(tmp_path / "users"), "node", "secret"])
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "wrong").write_text("guess\n")
    with running_mosquitto(tmp_path / "broker", f"allow_anonymous false\npassword_file {tmp_path}/users\n") as broker:
        async with Link(Broker(broker.host, broker.port, "a", username="node", password_file=tmp_path / "password")) as link:
            await link.publish("t", b"")
        with pytest.raises(LinkLost, match="Not authorized"):
            async with Link(Broker(broker.host, broker.port, "a", username="node", password_file=tmp_path / "wrong")):
                pass


async def test_at_most_receive_maximum_messages_wait_unacknowledged_and_come_again(tmp_path: Path) -> None:
    with running_mosquitto(tmp_path) as broker:
        node = Broker(broker.host, broker.port, "node", receive_maximum=3)
        async with Link(node) as link:
            await link.subscribe(["t/+"])
            for number in range(6):
                await link.publish(f"t/{number}", b"", expiry_s=60)
            messages = link.messages()
            first = [await messages.__anext__() for _ in range(3)]
            with anyio.move_on_after(0.3) as waiting:
                await messages.__anext__()
            assert waiting.cancelled_caught
            link.acknowledge(first[0])
        async with Link(node) as link:
            assert link.session_present
            again = []
            async for message in link.messages():
                again.append(message)
                link.acknowledge(message)
                if len(again) == 5:
                    break
        assert [message.topic for message in again] == [f"t/{number}" for number in range(1, 6)]
        assert all(0 < (message.expiry_left_s or 0) <= 60 for message in again)


async def test_a_broker_that_falls_silent_ends_the_wait_of_the_caller() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        broker = Broker("127.0.0.1", silent.getsockname()[1], "node", timeout_s=0.3)
        with pytest.raises(LinkLost, match="no connection"):
            async with Link(broker):
                pass
