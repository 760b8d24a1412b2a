"""Who may import whom, and which files alone may import what is heavy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("agent", "converters", "coordinator", "models")

ADDRESSES = "agent.worker.addresses"  # what of a camera's address may be shown: one rule for all

# What each part may import of the project; the longest matching prefix decides.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "models": ("models",),
    "converters": ("models", "converters"),
    "agent": ("models", "converters", "agent"),
    "agent/protocol": ("agent.protocol",),
    "agent/worker": ("models", "agent.worker", "agent.worker_protocol"),
    "agent/worker_protocol.py": ("models",),
    # The command line starts the coordinator, and the demo renders its first nginx file.
    "agent/commands/coordinator.py": ("agent", "coordinator"),
    "agent/demo": ("agent", "coordinator", "models"),
    # One MQTT edge and one probe for both ends: a second would be the same code again (docs/decisions.md).
    "coordinator": (
        "coordinator",
        "agent.protocol",
        "agent.link.mqtt",
        "agent.link.broker",
        "agent.gateway.probe",
        "agent.http.hosts",
        "agent.http.page",  # how a page's files are served, and the style that both pages have
        "agent.worker.addresses",
    ),
}

# Heavy or platform-bound modules and their homes.
HOMES: dict[str, tuple[str, ...]] = {
    "paho": ("agent/link/mqtt.py",),
    "onnxruntime": ("models/engines/", "converters/"),
    "tensorrt": ("models/engines/", "converters/tensorrt_from_onnx/"),
    "tensorrt_rtx": ("models/engines/", "converters/tensorrt_from_onnx/"),
    "cuda": ("models/engines/",),
    "pycuda": ("models/engines/",),
    "cv2": ("models/pictures.py", "models/scaling.py", "agent/worker/"),
    "av": ("agent/worker/",),
    "transformers": ("converters/onnx_from_transformers",),
    "torch": ("converters/onnx_from_transformers",),
    "onnx": ("converters/",),
    "tokenizers": ("models/tokenizer.py", "converters/"),
    "llguidance": ("models/tasks/generation/constrain.py", "agent/http/grammars.py"),
    "jinja2": ("models/chat_template.py", "converters/"),
    "fastapi": ("agent/http/", "agent/demo/", "coordinator/http.py"),
    "redis": ("agent/gateway/answers_redis.py",),
    "uvicorn": ("agent/http/", "coordinator/main.py"),
    "pydantic": ("agent/", "coordinator/"),
}
DATA_PLANE = (
    "models",
    "agent/worker",
    "agent/worker_protocol.py",
    "converters/__init__.py",
    "converters/tensorrt_from_onnx",
    "converters/child.py",
    "converters/evaluate.py",
)


def sources() -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(source: str) -> tuple[str, ...]:
    owner = max((prefix for prefix in MAY_IMPORT if source == prefix or source.startswith(f"{prefix}/")), key=len)
    return MAY_IMPORT[owner]


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.mark.parametrize("source", sources())
def test_imports_point_one_way(source: str) -> None:
    ours = {module for module in imports(source) if module.split(".")[0] in PACKAGES}
    # `from agent import log` is seen as `agent` and as `agent.log`; the second says what is meant.
    wrong = {module for module in ours if not within(module, allowed(source)) and not any(other.startswith(f"{module}.") for other in ours)}
    assert not wrong, f"{source} may import {allowed(source)} of the project, not {wrong}"


@pytest.mark.parametrize("source", sources())
def test_heavy_modules_stay_at_home(source: str) -> None:
    for module in {name.split(".")[0] for name in imports(source)}:
        if module in HOMES:
            assert source.startswith(HOMES[module]), f"{module} is imported by {source}; its homes are {HOMES[module]}"


@pytest.mark.parametrize("source", [source for source in sources() if source.startswith(DATA_PLANE)])
def test_the_data_plane_is_written_for_python_3_8(source: str) -> None:
    ast.parse((ROOT / source).read_text(), feature_version=(3, 8))
