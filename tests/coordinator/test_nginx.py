"""The rendered configuration in a real nginx: a POST fails over, a reload loses nothing, a refused file changes nothing."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import httpx
import pytest

from agent.demo.programs import free_port, nginx_command, program, write_nginx
from coordinator.config import NginxSettings
from coordinator.nginx import Backup, Balancer, NginxError, render

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None, reason="nginx is not installed"),
]


class Upstream(ThreadingHTTPServer):
    """Answers every request with its name, or with `status` and no answer at all."""

    daemon_threads = True

    def __init__(self, name: str, status: int = 200) -> None:
        upstream, self.name, self.status, self.seen = self, name, status, 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                upstream.seen += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = json.dumps({"by": upstream.name, "bytes": len(body)}).encode()
                self.send_response(upstream.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])


@contextmanager
def upstream(name: str, status: int = 200) -> Iterator[Upstream]:
    server = Upstream(name, status)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@asynccontextmanager
async def balancer(folder: Path, primary_port: int, backups: list[Backup]) -> AsyncIterator[tuple[httpx.AsyncClient, Balancer]]:
    (folder / "nginx").mkdir()
    front = free_port()
    settings = NginxSettings(
        file=folder / "nginx" / "hotspare.conf",
        listen=f"127.0.0.1:{front}",
        reload_command=(*nginx_command(folder / "nginx"), "-s", "reload"),
        min_interval_s=0,
    )
    assert settings.file is not None
    url = f"http://127.0.0.1:{primary_port}"
    settings.file.write_text(render(settings, url, backups))
    command = write_nginx(folder / "nginx", settings.file)
    # A reload closes idle connections, which an HTTP client cannot tell from a lost request: each request gets its own.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with (
        program(command, folder / "nginx.log", front),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{front}", limits=limits) as client,
    ):
        yield client, Balancer(settings, url)


async def ask(client: httpx.AsyncClient) -> tuple[int, str]:
    answer = await client.post("/v1/chat/completions", json={"messages": []})
    return answer.status_code, answer.json()["by"]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_post_that_the_primary_answers_with_an_error_goes_to_the_node(tmp_path: Path, status: int) -> None:
    with upstream("cloud", status) as cloud, upstream("edge") as edge:
        async with balancer(tmp_path, cloud.port, [Backup("edge-a", "127.0.0.1", edge.port, 1)]) as (client, _):
            assert await ask(client) == (200, "edge")
            assert cloud.seen == 1


async def test_a_refused_connection_goes_to_the_node_and_a_standby_node_to_the_next(tmp_path: Path) -> None:
    with upstream("sleeping", 503) as sleeping, upstream("awake") as awake:
        backups = [Backup("edge-a", "127.0.0.1", sleeping.port, 5), Backup("edge-b", "127.0.0.1", awake.port, 1)]
        async with balancer(tmp_path, free_port(), backups) as (client, _):
            assert [await ask(client) for _ in range(4)] == [(200, "awake")] * 4
            assert sleeping.seen >= 1, "the gate of the standby node was asked and said no"


async def test_an_active_node_leads_and_a_hanging_primary_costs_nobody_its_deadline(tmp_path: Path) -> None:
    with upstream("edge") as edge, socket.create_server(("127.0.0.1", 0)) as hanging:
        leader = Backup("edge-a", "127.0.0.1", edge.port, 1, leads=True)
        async with balancer(tmp_path, hanging.getsockname()[1], [leader]) as (client, _):
            with anyio.fail_after(2):
                assert [await ask(client) for _ in range(5)] == [(200, "edge")] * 5


async def test_a_primary_that_is_back_is_reached_while_the_nodes_stand_down(tmp_path: Path) -> None:
    with upstream("cloud") as cloud, upstream("edge", 503) as edge:
        async with balancer(tmp_path, cloud.port, [Backup("edge-a", "127.0.0.1", edge.port, 1, leads=True)]) as (client, nginx):
            assert [await ask(client) for _ in range(5)] == [(200, "cloud")] * 5
            assert await nginx.apply([Backup("edge-a", "127.0.0.1", edge.port, 1)])
            seen = edge.seen
            assert await until_answered_by(client, "cloud")
            assert [await ask(client) for _ in range(5)] == [(200, "cloud")] * 5
            assert edge.seen <= seen + 1, "the node is a backup again"


async def until_answered_by(client: httpx.AsyncClient, name: str) -> bool:
    with anyio.move_on_after(10):
        while (await ask(client))[1] != name:  # noqa: ASYNC110 - another process decides
            await anyio.sleep(0.05)
        return True
    return False


async def test_a_healthy_primary_gets_everything_and_a_client_error_is_its_own(tmp_path: Path) -> None:
    with upstream("cloud") as cloud, upstream("edge") as edge:
        async with balancer(tmp_path, cloud.port, [Backup("edge-a", "127.0.0.1", edge.port, 1)]) as (client, _):
            assert await ask(client) == (200, "cloud")
            cloud.status = 400
            assert await ask(client) == (400, "cloud")
            assert edge.seen == 0


async def test_reloads_under_load_lose_no_request(tmp_path: Path) -> None:
    with upstream("cloud") as cloud, upstream("edge") as edge:
        backup = Backup("edge-a", "127.0.0.1", edge.port, 1)
        async with balancer(tmp_path, cloud.port, [backup]) as (client, nginx):
            answers: list[tuple[int, str]] = []
            async with anyio.create_task_group() as tasks:

                async def load() -> None:
                    answers.extend([await ask(client) for _ in range(60)])

                tasks.start_soon(load)
                tasks.start_soon(load)
                for weight in range(2, 6):
                    assert await nginx.apply([Backup("edge-a", "127.0.0.1", edge.port, weight)])
                assert not await nginx.apply([Backup("edge-a", "127.0.0.1", edge.port, 5)]), "unchanged: no reload"
            assert answers == [(200, "cloud")] * 120


async def test_a_backup_that_nginx_refuses_is_left_out_and_the_others_are_not(tmp_path: Path) -> None:
    with upstream("cloud", 503) as cloud, upstream("edge") as edge:
        async with balancer(tmp_path, cloud.port, []) as (client, nginx):
            backups = [Backup("edge-a", "edge-a.invalid", 80, 1), Backup("edge-b", "127.0.0.1", edge.port, 1)]
            assert await nginx.apply(backups)
            with anyio.fail_after(10):
                while await ask(client) != (200, "edge"):  # the workers of before the reload may answer some more
                    assert cloud.seen > 0
            assert "edge-a" not in (tmp_path / "nginx" / "hotspare.conf").read_text()
            assert not await nginx.apply(backups), "not asked again at once"


async def test_a_file_that_nginx_refuses_is_not_put_in_place(tmp_path: Path) -> None:
    with upstream("cloud") as cloud:
        async with balancer(tmp_path, cloud.port, []) as (client, _):
            broken = Balancer(NginxSettings(file=tmp_path / "nginx" / "hotspare.conf", listen="nowhere:x", min_interval_s=0), "http://h")
            before = (tmp_path / "nginx" / "hotspare.conf").read_text()
            with pytest.raises(NginxError, match="emerg"):
                await broken.apply([])
            assert (tmp_path / "nginx" / "hotspare.conf").read_text() == before
            assert await ask(client) == (200, "cloud")


async def test_a_reload_that_failed_is_tried_again(tmp_path: Path) -> None:
    reloads = tmp_path / "reloads"
    command = ("sh", "-c", f"echo . >> {reloads}; test $(wc -l < {reloads}) -ge 2")
    nginx = Balancer(NginxSettings(file=tmp_path / "a.conf", reload_command=command, min_interval_s=0), f"http://127.0.0.1:{free_port()}")
    with pytest.raises(NginxError):
        await nginx.apply([])
    assert await nginx.apply([])
    assert not await nginx.apply([])
    assert len(reloads.read_text().splitlines()) == 2


async def test_an_https_primary_is_bridged_with_its_certificate_checked() -> None:
    text = render(NginxSettings(), "https://api.deepseek.com", [Backup("edge-a", "2001:db8::1", 8080, 2)])
    assert "server 127.0.0.1:8089 max_fails" in text
    assert "proxy_pass https://api.deepseek.com;" in text
    assert "proxy_ssl_verify on;" in text
    assert "server [2001:db8::1]:8080 backup weight=2" in text
