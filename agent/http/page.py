"""The page at `/`: static files of this package, served from memory, with a policy that lets nothing else run."""

from __future__ import annotations

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
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def router() -> APIRouter:
    routes = APIRouter()
    folder = files("agent.http") / "ui"

    def serve(path: str, name: str) -> None:
        content, kind = (folder / name).read_bytes(), FILES[name]

        async def page() -> Response:
            return Response(content, headers={**HEADERS, "Content-Type": kind})

        routes.add_api_route(path, page, methods=["GET"], response_model=None, include_in_schema=False)

    serve("/", "index.html")
    for name in FILES:
        serve(f"/ui/{name}", name)
    return routes
