"""What our code uses of TensorRT, read from its source: `trt.X.Y` chains, and attributes of variables that are named after their class."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

MODULE_NAMES = frozenset({"trt", "module", "rtx"})
# A variable of such a name (also with `_` before it) holds an object of that class, wherever one of these files has it.
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "layer": "ILayer",
    "tensor": "ITensor",
    "output": "ITensor",
    "made": "IOptimizationProfile",
    "used": "ITimingCache",
    "host_memory": "IHostMemory",
    "inspector": "EngineInspector",
    "parser_error": "ParserError",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "severity": "ILogger",
    "flags": "NetworkDefinitionCreationFlag",
}


@dataclass(frozen=True, order=True)
class Use:
    """`path` below the module, e.g. `BuilderFlag.TF32` or `IBuilderConfig.set_flag`. arguments: those of a call, -1 for none."""

    path: str
    file: str
    line: int
    arguments: int


def sources() -> list[Path]:
    converter = (ROOT / "converters" / "tensorrt_from_onnx").glob("*.py")
    return sorted((*converter, *(ROOT / "models" / "engines").glob("tensorrt*.py")))


def uses(file: Path) -> Iterator[Use]:
    tree = ast.parse(file.read_text())
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    where = file.relative_to(ROOT).as_posix()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        chain = _chain(node)
        path = _path(chain)
        # Of `trt.BuilderFlag.TF32` the whole, not `trt.BuilderFlag`; of an object's attribute the first, what comes after is of its value.
        if path is None or (chain[0] in MODULE_NAMES and id(node) in inner):
            continue
        call = calls.get(id(node))
        yield Use(path, where, node.lineno, -1 if call is None else len(call.args) + len(call.keywords))


def _chain(node: ast.expr) -> list[str]:
    """`self._plan.engine.num_layers` → ["self", "_plan", "engine", "num_layers"]; empty where it does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def _path(chain: list[str]) -> str | None:
    if not chain or any(name.startswith("__") for name in chain):
        return None
    *owners, attribute = chain
    owner = owners[-1].lstrip("_") if owners else ""
    for index, name in enumerate(owners):
        if name.lstrip("_") in MODULE_NAMES:
            return ".".join(chain[index + 1 :])
    if owner in CLASSES and not attribute.startswith("_"):
        return f"{CLASSES[owner]}.{attribute}"
    return None


def asked() -> Iterator[Use]:
    """`hasattr(x.Y, "Z")` of a module's class: asked for, so it may be absent."""
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
                target, name = node.args
                chain = _chain(target) if isinstance(target, ast.Attribute) else [target.id] if isinstance(target, ast.Name) else []
                if chain and chain[0] in MODULE_NAMES and isinstance(name, ast.Constant):
                    yield Use(".".join((*chain[1:], str(name.value))), file.relative_to(ROOT).as_posix(), node.lineno, -1)
