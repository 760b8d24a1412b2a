"""`hotspare demo`: broker, coordinator, balancer, stand-in primary and one node on this machine, started together and ended together."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
from anyio.abc import Process
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from agent.config import default_state_folder
from agent.demo.primary import SwitchablePrimary
from agent.demo.programs import ProgramError, find, free_port, nginx_command, program, until_ended, write_mosquitto, write_nginx
from coordinator.config import NginxSettings
from coordinator.nginx import render
from models.durable import StoreBusy, exclusive

ATTEMPTS = 2  # of a model, before the demo gives up: the node itself never does
READY_DEADLINE_S = 1800.0  # a slow line and a slow device: the first start fetches 130 MB and converts them
NODE = "demo-node"


@dataclass(frozen=True, slots=True)
class Layout:
    """Folders and ports of one demo. `front` is nginx's, where clients should go."""

    folder: Path
    broker: int
    front: int
    bridge: int
    coordinator: int
    node: int

    @property
    def node_url(self) -> str:
        return f"http://127.0.0.1:{self.node}"

    @property
    def front_url(self) -> str:
        return f"http://127.0.0.1:{self.front}"

    @property
    def coordinator_url(self) -> str:
        return f"http://127.0.0.1:{self.coordinator}"


def layout(folder: Path | None) -> Layout:
    root = (folder or default_state_folder() / "demo").absolute()
    return Layout(root, free_port(1893), free_port(8088), free_port(8089), free_port(8090), free_port(8080))


def coordinator_settings(stage: Layout, primary_url: str) -> dict[str, Any]:
    """Probes every 2 s in place of 30, so that an outage is seen while somebody watches."""
    reload_command = [*nginx_command(stage.folder / "nginx"), "-s", "reload"]
    return {
        "name": "demo",
        "database": str(stage.folder / "coordinator" / "registry.sqlite"),
        "primary": {"url": primary_url, "interval_s": 2.0, "timeout_s": 2.0},
        "broker": {"port": stage.broker},
        "leases": {"lease_s": 15.0, "renew_s": 5.0, "min_active_s": 5.0},
        "nginx": {
            "file": str(stage.folder / "nginx" / "hotspare.conf"),
            "listen": f"127.0.0.1:{stage.front}",
            "bridge_port": stage.bridge,
            "test_command": [find("nginx"), "-t", "-q", "-c"],
            "reload_command": reload_command,
            "min_interval_s": 1.0,
        },
        "http": {"port": stage.coordinator},
    }


def node_settings(stage: Layout, primary: SwitchablePrimary, camera: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "node": {"id": NODE, "state": str(stage.folder / "node"), "weight": 1},
        "http": {"port": stage.node},
        "mqtt": {"host": "127.0.0.1", "port": stage.broker, "heartbeat_active_s": 2.0, "heartbeat_standby_s": 3.0},
        "primary": {"url": primary.url, "interval_s": 2.0, "timeout_s": 2.0},
        "models": {"serve": ["smollm2-135m-instruct", "all-minilm-l6-v2"], "aliases": {"deepseek-chat": "smollm2-135m-instruct"}},
        "cameras": [dict(camera)],
        "demo": {"switch_url": primary.switch_url},
    }


def camera_settings(video: Path | None) -> dict[str, Any]:
    """The rendered belt, or with a mirror and a video at hand DEIMv2 on real pictures."""
    if video is not None and os.environ.get("HOTSPARE_MIRROR"):
        return {"id": "street", "source": f"file:{video.absolute()}?loop=yes", "model": "deimv2-femto", "fps": 10.0, "threshold": 0.5}
    line = {"start": [0.5, 0.0], "end": [0.5, 1.0]}
    gate = {"name": "gate", "points": [[0.35, 0.12], [0.65, 0.12], [0.65, 0.92], [0.35, 0.92]], "loitering_s": 4.0}
    record = {"enabled": True, "labels": ["parcel"], "pre_s": 1.0, "post_s": 1.0}
    return {
        "id": "belt", "source": "conveyor:?seed=7", "model": "conveyor-detr", "fps": 12.0, "floor_fps": 6.0, "threshold": 0.5, "line": line,
        "zones": [gate], "record": record,
    }  # fmt: skip


async def run_demo(folder: Path | None, video: Path | None, console: Console) -> int:
    """Runs until Ctrl-C or SIGTERM. Raises ProgramError if a part does not start, or ends by itself."""
    stage = layout(folder)
    try:
        for name in ("broker", "nginx", "coordinator", "node", "log"):
            (stage.folder / name).mkdir(parents=True, exist_ok=True)
        with exclusive(stage.folder / "demo.lock", 0.0, f"the demo in {stage.folder} (--state takes another folder)"):
            console.print(f"Hotspare demo, state in [bold]{escape(str(stage.folder))}[/bold]", highlight=False, soft_wrap=True)
            return await _perform(stage, video, console)
    except StoreBusy as error:
        raise ProgramError(str(error)) from error
    except OSError as error:
        raise ProgramError(f"{stage.folder} cannot be used: {error}; give --state another folder") from error


async def _perform(stage: Layout, video: Path | None, console: Console) -> int:
    problem: ProgramError | None = None
    # The receiver is around everything, so that a second Ctrl-C finds it too and leaves no program behind.
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:

            def fail(error: ProgramError) -> None:
                nonlocal problem
                problem = problem or error
                tasks.cancel_scope.cancel()

            async def watch(name: str, process: Process, log: Path) -> None:
                try:
                    await until_ended(name, process, log)
                except ProgramError as error:
                    fail(error)

            tasks.start_soon(_end_on_signal, signals, tasks.cancel_scope, console)
            primary = SwitchablePrimary()
            tasks.start_soon(primary.run)
            camera = camera_settings(video)
            settings = node_settings(stage, primary, camera)
            try:
                for name, command, port in await _programs(stage, primary, settings):
                    log = stage.folder / "log" / f"{name}.log"
                    tasks.start_soon(watch, name, await stack.enter_async_context(program(command, log, port)), log)
                await _wait_until_serving(stage, {*settings["models"]["serve"], camera["model"]}, console)
                _welcome(stage, primary, console)
                await anyio.sleep_forever()
            except ProgramError as error:
                fail(error)
    if problem is not None:
        raise problem
    console.print("Everything the demo started has ended; its state stays for the next start.")
    return 0


async def _programs(stage: Layout, primary: SwitchablePrimary, node: Mapping[str, Any]) -> list[tuple[str, list[str], int]]:
    """Name, command and port of each, in the order of their start; their configurations are written."""
    snippet = stage.folder / "nginx" / "hotspare.conf"
    nginx = NginxSettings(listen=f"127.0.0.1:{stage.front}", bridge_port=stage.bridge)
    await anyio.Path(snippet).write_text(render(nginx, primary.url, []))
    coordinator_file = await _write(stage.folder / "coordinator.toml", coordinator_settings(stage, primary.url))
    node_file = await _write(stage.folder / "node.toml", node)
    hotspare = [sys.executable, "-m", "agent.cli"]
    return [
        ("mosquitto", write_mosquitto(stage.folder / "broker", stage.broker), stage.broker),
        ("nginx", write_nginx(stage.folder / "nginx", snippet), stage.front),
        ("coordinator", [*hotspare, "coordinator", "--config", str(coordinator_file)], stage.coordinator),
        ("node", [*hotspare, "run", "--config", str(node_file)], stage.node),
    ]


async def _wait_until_serving(stage: Layout, wanted: set[str], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[phase]}"), TimeElapsedColumn())
    bars: dict[str, TaskID] = {}
    serving: set[str] = set()
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
        with Progress(*columns, console=console) as progress, anyio.move_on_after(READY_DEADLINE_S):
            while not serving >= wanted:
                try:
                    node = (await client.get(f"{stage.node_url}/node")).json()
                except (httpx.HTTPError, ValueError) as error:
                    raise ProgramError(f"the node at {stage.node_url} is gone ({error}); see {stage.folder}/log/node.log") from error
                for model in node["models"]:
                    name, build = model["name"], model.get("build") or {}
                    if model["status"] == "failed" and build.get("attempts", 0) >= ATTEMPTS:
                        raise ProgramError(f"{name} cannot be made ready: {build.get('message')}\nsee {stage.folder}/log/node.log")
                    if name not in bars:
                        bars[name] = progress.add_task(name, total=1.0, phase="")
                    _show(progress, bars[name], model)
                serving = {model["name"] for model in node["models"] if model["status"] == "serving"}
                await anyio.sleep(0.3)
    if not serving >= wanted:
        raise ProgramError(f"not all models serve after {READY_DEADLINE_S:g} s; see {stage.folder}/log/node.log")


def _show(progress: Progress, bar: TaskID, model: Mapping[str, Any]) -> None:
    status, build = str(model["status"]), model.get("build") or {}
    fraction = 1.0 if status == "serving" else float(build.get("progress") or 0.0)
    words = [str(build[name]) for name in ("phase", "message") if build.get(name)] if status != "serving" else []
    progress.update(bar, completed=fraction, phase=escape(": ".join(words) or status))


def _welcome(stage: Layout, primary: SwitchablePrimary, console: Console) -> None:
    body = json.dumps({"model": "deepseek-chat", "messages": [{"role": "user", "content": "Why is the sky blue?"}]})
    ask = f"curl -s {stage.front_url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    switch = f"curl -s -X POST '{primary.switch_url}?on=false'"
    fleet = f"{Path(sys.executable).parent / 'hotspare'} fleet --coordinator {stage.coordinator_url} ls"
    console.rule("Hotspare is running")
    console.print(
        f"\nOpen [bold cyan]{stage.node_url}/[/bold cyan]: camera, chat, models, and the switch of the cloud API.", highlight=False
    )
    console.print(f"The fleet as its operator sees it: [bold cyan]{stage.coordinator_url}/[/bold cyan]\n", highlight=False)
    console.print("Three commands to try in another terminal:\n")
    for summary, command in (
        ("ask the front door, where the cloud answers while it is up", ask),
        ("take the cloud down, then ask again: the edge answers", switch),
        ("see the fleet as the coordinator does", fleet),
    ):
        console.print(f"[dim]# {summary}[/dim]", highlight=False)
        console.print(command + "\n", highlight=False, markup=False, soft_wrap=True)  # unbroken, so that it can be copied
    console.print(f"State and logs: {stage.folder}\nCtrl-C ends all of it.", highlight=False, markup=False, soft_wrap=True)


async def _end_on_signal(signals: AsyncIterator[signal.Signals], scope: anyio.CancelScope, console: Console) -> None:
    async for _ in signals:
        console.print("Ending …")
        scope.cancel()
        return


async def _write(file: Path, values: Mapping[str, Any]) -> anyio.Path:
    path = anyio.Path(file)
    await path.write_text(to_toml(values))
    return path


def to_toml(values: Mapping[str, Any]) -> str:
    """The few shapes that our own configurations have: scalars, lists, tables, a list of tables. JSON scalars are TOML scalars."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping) and not _is_tables(value)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"[{key}]", *(f"{name} = {_inline(item)}" for name, item in value.items())]
        elif _is_tables(value):
            for table in value:
                lines += [f"[[{key}]]", *(f"{name} = {_inline(item)}" for name, item in table.items())]
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(_inline, value))}]" if isinstance(value, list) else json.dumps(value)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
