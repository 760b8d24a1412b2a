"""The load balancer's configuration: rendered, tested, put in place atomically, taken up by a reload. Only when it changed.

nginx's defaults do not fail over a POST that was answered with an error; `non_idempotent` and the listed codes do. A request may then run
twice, which is harmless for inference. An `https` primary is reached through a bridge server, since one upstream cannot mix TLS and plain.
Sources: nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_next_upstream, …/ngx_http_upstream_module.html#server.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import anyio

from coordinator.config import NginxSettings

logger = logging.getLogger(__name__)

RELOAD_DEADLINE_S = 20.0
LEFT_OUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Backup:
    """A node behind the balancer. `host` and `port` come from its registration and are checked there. `leads`: it holds a full lease."""

    node: str
    host: str
    port: int
    weight: int
    leads: bool = False


class NginxError(RuntimeError):
    """nginx refused the configuration or the reload; the message carries its words."""


def render(settings: NginxSettings, primary_url: str, backups: Sequence[Backup]) -> str:
    """The http-level snippet: one upstream and the server that clients talk to.

    The primary comes first and the nodes are its backups. While nodes hold a full lease they lead and the primary is theirs: a primary that
    hangs would else cost each request its deadline, and one that has come back is still reached when the nodes stand down. Either change is
    a reload, which forgets nginx's own count of failures: neither the primary nor a node stays shunned for what it was before.
    """
    primary = urlsplit(primary_url)
    is_bridged = primary.scheme == "https"
    address = f"127.0.0.1:{settings.bridge_port}" if is_bridged else f"{primary.hostname}:{primary.port or 80}"
    has_leaders = any(backup.leads for backup in backups)
    servers = [f"  server {address}{' backup' if has_leaders else ''} max_fails=3 fail_timeout=5s;"]
    servers += [_server(backup) for backup in sorted(backups, key=lambda backup: backup.node)]
    lines = [
        "# Rendered by the Hotspare coordinator; changes made here are overwritten.",
        "upstream hotspare {",
        "  zone hotspare 64k;",
        *servers,
        "  keepalive 16;",
        "}",
        "server {",
        f"  listen {settings.listen};",
        "  client_max_body_size 32m;",
        "  location / {",
        "    proxy_pass http://hotspare;",
        "    proxy_http_version 1.1;",
        '    proxy_set_header Connection "";',
        "    proxy_set_header Host $host;",
        "    proxy_buffering off;",
        "    proxy_connect_timeout 1s;",
        f"    proxy_read_timeout {_time(settings.read_timeout_s)};",
        "    proxy_next_upstream error timeout invalid_header http_500 http_502 http_503 http_504 http_429 non_idempotent;",
        f"    proxy_next_upstream_tries {2 + len(backups)};",
        f"    proxy_next_upstream_timeout {_time(settings.read_timeout_s + 10)};",
        "    add_header X-Upstream $upstream_addr always;",
        "  }",
        "}",
    ]
    if is_bridged:
        lines += _bridge(settings, primary_url)
    return "\n".join(lines) + "\n"


def _server(backup: Backup) -> str:
    role = "" if backup.leads else " backup"
    return f"  server {_host(backup.host)}:{backup.port}{role} weight={max(1, backup.weight)} max_fails=2 fail_timeout=5s;  # {backup.node}"


def _bridge(settings: NginxSettings, primary_url: str) -> list[str]:
    primary = urlsplit(primary_url)
    return [
        "server {",
        f"  listen 127.0.0.1:{settings.bridge_port};",
        "  client_max_body_size 32m;",
        "  location / {",
        f"    proxy_pass https://{primary.netloc};",
        "    proxy_http_version 1.1;",
        '    proxy_set_header Connection "";',
        f"    proxy_set_header Host {primary.hostname};",
        "    proxy_ssl_server_name on;",
        f"    proxy_ssl_name {primary.hostname};",
        "    proxy_ssl_verify on;",
        "    proxy_ssl_verify_depth 4;",
        "    proxy_ssl_trusted_certificate /etc/ssl/certs/ca-certificates.crt;",
        "    proxy_buffering off;",
        "    proxy_connect_timeout 1s;",
        f"    proxy_read_timeout {_time(settings.read_timeout_s)};",
        "  }",
        "}",
    ]


def _time(seconds: float) -> str:
    """nginx takes no fractions."""
    return f"{max(1, round(1000 * seconds))}ms"


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Balancer:
    """Keeps nginx's file equal to what was rendered last.

    A backup that nginx refuses, for its host cannot be resolved say, is left out and asked about again later: one node's address must
    not keep the others out of the file.
    """

    def __init__(self, settings: NginxSettings, primary_url: str) -> None:
        self._settings = settings
        self._primary_url = primary_url
        self._in_place: str | None = None
        self._is_loaded = False
        self._left_out: dict[Backup, float] = {}
        self._next_s = -float("inf")

    def hold(self) -> None:
        """Nothing changes for `min_interval_s`: who has just begun to listen does not know yet who is there."""
        self._next_s = anyio.current_time() + self._settings.min_interval_s

    async def apply(self, backups: Sequence[Backup]) -> bool:
        """Bring nginx up to date; whether it was reloaded. Raises NginxError, the old file still in place, if nginx refuses the new one."""
        file, now_s = self._settings.file, anyio.current_time()
        if file is None or now_s < self._next_s:
            return False
        if self._in_place is None and file.is_file():
            self._in_place = await anyio.Path(file).read_text()
        wanted = [backup for backup in backups if now_s >= self._left_out.get(backup, now_s)]
        if self._is_up_to_date(wanted):
            return False
        self._next_s = now_s + self._settings.min_interval_s
        if (text := self._render(wanted)) != self._in_place:
            wanted = await self._accepted(wanted)
            if self._is_up_to_date(wanted):
                return False
            text = self._render(wanted)
            await anyio.to_thread.run_sync(_replace, file, text)
            self._in_place, self._is_loaded = text, False
        if self._settings.reload_command:
            await _run(self._settings.reload_command)
        self._is_loaded = True
        logger.info("nginx reloaded with %d backup servers: %s", len(wanted), ", ".join(backup.node for backup in wanted) or "none")
        return True

    def _render(self, backups: Sequence[Backup]) -> str:
        return render(self._settings, self._primary_url, backups)

    def _is_up_to_date(self, backups: Sequence[Backup]) -> bool:
        return self._is_loaded and self._render(backups) == self._in_place

    async def _accepted(self, backups: Sequence[Backup]) -> list[Backup]:
        self._left_out = {backup: until_s for backup, until_s in self._left_out.items() if until_s > anyio.current_time()}
        try:
            await self._test(self._render(backups))
            return list(backups)
        except NginxError:
            await self._test(self._render([]))  # refused as well: it is not the backups
        accepted: list[Backup] = []
        for backup in backups:
            try:
                await self._test(self._render([backup]))
                accepted.append(backup)
            except NginxError as error:
                self._left_out[backup] = anyio.current_time() + LEFT_OUT_S
                logger.error("node %s is left out of the balancer: %s", backup.node, error)  # noqa: TRY400 — the message says it all
        return accepted

    async def _test(self, text: str) -> None:
        with tempfile.TemporaryDirectory(prefix="hotspare-nginx-") as folder:
            snippet, whole = Path(folder) / "snippet.conf", Path(folder) / "nginx.conf"
            snippet.write_text(text)
            whole.write_text(f"pid {folder}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{ access_log off; include {snippet}; }}\n")
            await _run((*self._settings.test_command, str(whole)))


async def _run(command: Sequence[str]) -> None:
    try:
        with anyio.fail_after(RELOAD_DEADLINE_S):
            done = await anyio.run_process(list(command), check=False)
    except (OSError, TimeoutError) as error:
        raise NginxError(f"{' '.join(command)}: {error or 'no answer'}; is nginx installed and may this user reload it?") from error
    if done.returncode != 0:
        raise NginxError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()[-500:]}")


def _replace(file: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
