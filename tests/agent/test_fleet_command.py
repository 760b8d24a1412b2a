"""`hotspare fleet` against the real coordinator process, with a real node behind a real broker."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

import anyio
import pytest

from agent.commands.fleet import parse_arguments
from agent.commands.fleet_client import FleetError, safe
from agent.demo.programs import free_port, program
from tests.agent.link.broker import running_mosquitto
from tests.coordinator.fleet import NOWHERE, fleet_node, until

HOTSPARE = (sys.executable, "-m", "agent.cli")


@dataclass
class Answer:
    status: int
    out: str
    err: str


async def hotspare(*words: str) -> Answer:
    done = await anyio.run_process([*HOTSPARE, *words], check=False, stdout=PIPE, stderr=PIPE, env={"COLUMNS": "200"})
    return Answer(done.returncode, done.stdout.decode(), done.stderr.decode())


@asynccontextmanager
async def coordinator_process(folder: Path) -> AsyncIterator[tuple[list[str], Path]]:
    """Yields `fleet --coordinator … --token-file …` and the coordinator's log."""
    http_port, token, log = free_port(), folder / "token", folder / "coordinator.log"
    token.write_text("s3cret")
    with running_mosquitto(folder / "broker") as broker:
        (folder / "coordinator.toml").write_text(
            f'name = "coord-a"\ndatabase = "{folder / "coordinator.sqlite"}"\n'
            f'[primary]\nurl = "{NOWHERE}"\ninterval_s = 60.0\n[broker]\nport = {broker.port}\n'
            f'[leases]\ncontingent = false\n[http]\nport = {http_port}\ntoken_file = "{token}"\n'
        )
        command = [*HOTSPARE, "coordinator", "--config", str(folder / "coordinator.toml")]
        async with program(command, log, http_port) as process, fleet_node(broker, folder / "node"):
            yield ["fleet", "--coordinator", f"http://127.0.0.1:{http_port}", "--token-file", str(token)], log
            process.send_signal(signal.SIGTERM)
            with anyio.fail_after(10):
                assert await process.wait() == 0


@pytest.mark.anyio
async def test_an_operator_lists_shows_commands_and_watches(tmp_path: Path) -> None:
    async with coordinator_process(tmp_path) as (fleet, log):
        await until(lambda: "node edge-a is registered" in log.read_text())
        sent = await hotspare(*fleet, "send", "edge-a", "ping", "echo=hello")
        assert (sent.status, sent.err) == (0, "")
        assert "succeeded" in sent.out and '"echo": "hello"' in sent.out
        listed = await hotspare(*fleet, "ls")
        assert "primary: up" in listed.out and "edge-a" in listed.out and "tiny" in listed.out
        shown = json.loads((await hotspare(*fleet, "show", "edge-a")).out)
        assert shown["meta"]["agent"] == "0.1" and shown["commands"][0]["status"] == "succeeded"
        watched = await hotspare(*fleet, "watch", "--once")
        assert watched.status == 0 and "edge-a sync" in watched.out

        refused = await hotspare(*fleet, "send", "edge-a", "model.deploy", "name=tiny", "--deadline", "5")
        assert refused.status == 1 and "unsupported: this node has no op 'model.deploy'" in refused.err
        unknown = await hotspare(*fleet, "show", "edge/../z")
        assert unknown.status == 1 and "Traceback" not in unknown.err
        no_token = await hotspare(*fleet[:3], "ls")
        assert no_token.status == 1 and "token" in no_token.err
    assert "Traceback" not in await anyio.Path(log).read_text()


@pytest.mark.anyio
async def test_only_the_forgotten_word_is_asked_for() -> None:
    wrong = await hotspare("fleet", "send", "edge-a")
    assert wrong.status == 2
    assert wrong.err.splitlines()[-1].endswith("the following arguments are required: op")


@pytest.mark.anyio
async def test_without_a_coordinator_it_says_so(tmp_path: Path) -> None:
    nobody = await hotspare("fleet", "--coordinator", f"http://127.0.0.1:{free_port()}", "ls")
    assert nobody.status == 1 and "HOTSPARE_COORDINATOR" in nobody.err and "Traceback" not in nobody.err
    no_file = await hotspare("fleet", "--token-file", str(tmp_path / "none"), "ls")
    assert no_file.status == 1 and "--token-file" in no_file.err and "Traceback" not in no_file.err


@pytest.mark.anyio
async def test_a_coordinator_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "coordinator.sqlite").write_text("this is no database, whatever its name says; it is long enough to be looked at. " * 20)
    (tmp_path / "c.toml").write_text(f'database = "{tmp_path / "coordinator.sqlite"}"\n[primary]\nurl = "{NOWHERE}"\n')
    broken = await hotspare("coordinator", "--config", str(tmp_path / "c.toml"))
    assert (broken.status, "not a database" in broken.err, "Traceback" in broken.err) == (1, True, False)
    (tmp_path / "c.toml").write_text(f'database = "d"\n[primary]\nurl = "{NOWHERE}"\n[leases]\nrenew_s = 80.0\n')
    unsafe = await hotspare("coordinator", "--config", str(tmp_path / "c.toml"))
    assert unsafe.status != 0 and "at most half" in unsafe.err


def test_arguments_are_json_where_they_parse() -> None:
    assert parse_arguments(["a=1", "b=true", 'c={"d": [2]}', "e=text", "f=a=b"]) == {
        "a": 1,
        "b": True,
        "c": {"d": [2]},
        "e": "text",
        "f": "a=b",
    }
    with pytest.raises(FleetError, match="NAME=VALUE"):
        parse_arguments(["lease_s"])


def test_what_a_node_says_cannot_paint_the_terminal() -> None:
    assert safe("\x1b[2J[red]ok[/red]\u009b") == "\ufffd[2J\\[red]ok\\[/red]\ufffd"
