"""The page at `/`: static files of this package, served from memory, with a policy that lets nothing else run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "camera.js": "text/javascript; charset=utf-8",
    "mjpeg.js": "text/javascript; charset=utf-8",
    "cameras.js": "text/javascript; charset=utf-8",
    "events.js": "text/javascript; charset=utf-8",
    "zones.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "models.js": "text/javascript; charset=utf-8",
    "sla.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
FOLDER = files("agent.http") / "ui"


def router() -> APIRouter:
    return serving({name: ((FOLDER / name).read_bytes(), kind) for name, kind in FILES.items()}, POLICY)


def serving(sources: Mapping[str, tuple[bytes, str]], policy: str) -> APIRouter:
    """`index.html` at `/`, each file below `/ui/`, with its content type. The coordinator's page too."""
    routes = APIRouter()

    def serve(path: str, name: str) -> None:
        content, kind = sources[name]
        headers = {**HEADERS, "Content-Security-Policy": policy, "Content-Type": kind}

        async def page() -> Response:
            return Response(content, headers=headers)

        routes.add_api_route(path, page, methods=["GET"], response_model=None, include_in_schema=False)

    serve("/", "index.html")
    for name in sources:
        serve(f"/ui/{name}", name)
    return routes
