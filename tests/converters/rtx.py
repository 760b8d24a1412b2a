"""TensorRT-RTX: the real parser and builder of strongly typed networks, which need neither GPU nor driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

Shapes = dict[str, tuple[list[int], list[int], list[int]]]


def plan_bytes(path: Path, shapes: Shapes | None = None) -> int:
    """Size of the plan that TensorRT-RTX builds of a graph; `shapes`: input → least, usual, largest. Fails with what it complained of."""
    rtx = pytest.importorskip("tensorrt_rtx")
    complaints: list[str] = []

    class Logger(rtx.ILogger):  # type: ignore[misc,name-defined]  # the module has no types
        def __init__(self) -> None:
            rtx.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= rtx.ILogger.Severity.ERROR:
                complaints.append(message)

    # All of them are held until the end: the parser keeps no reference of its own.
    logger = Logger()
    builder = rtx.Builder(logger)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        pytest.fail(f"{path.name}: {[(error.node_name(), error.node_operator(), error.desc()) for error in errors]}")
    config = builder.create_builder_config()
    config.clear_flag(rtx.BuilderFlag.TF32)
    if shapes:
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *sizes)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, complaints
    size: int = plan.nbytes
    return size
