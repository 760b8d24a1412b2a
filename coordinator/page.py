"""The fleet's page: which files, under which policy. Looks and small parts are those of the node's page: one product, one style."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from agent.http.page import FILES as NODE_FILES
from agent.http.page import FOLDER as NODE_FOLDER

OWN = {
    "index.html": "text/html; charset=utf-8",
    "fleet.css": "text/css; charset=utf-8",
    "fleet.js": "text/javascript; charset=utf-8",
    "words.js": "text/javascript; charset=utf-8",
    "primary.js": "text/javascript; charset=utf-8",
    "nodes.js": "text/javascript; charset=utf-8",
    "node.js": "text/javascript; charset=utf-8",
    "orders.js": "text/javascript; charset=utf-8",
    "events.js": "text/javascript; charset=utf-8",
}
SHARED = {name: NODE_FILES[name] for name in ("style.css", "dom.js", "icon.svg")}
FILES = OWN | SHARED
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def sources() -> Mapping[str, tuple[bytes, str]]:
    """Each file's content and its type."""
    folder = files("coordinator") / "ui"
    return {name: (((folder if name in OWN else NODE_FOLDER) / name).read_bytes(), kind) for name, kind in FILES.items()}
