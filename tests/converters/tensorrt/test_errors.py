"""Messages as TensorRT 8.5 to 11 and RTX log them, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from converters.tensorrt_from_onnx.errors import CAUSES, CODES, MAX_QUOTED, build_error, parse_error

DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/common/dispatch/checkMacros.cpp:250 "
    "(cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"
)


@pytest.mark.parametrize(
    ("message", "code", "remedy"),
    [
        (
            "10: [optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (Could not find any implementation for node "
            "{ForeignNode[/decoder/norm1/Constant...(Unnamed Layer* 812) [Shuffle]]}.)",
            "no_kernel",
            "stop pipelines",
        ),
        (
            "Could not find any implementation for node conv_0 + relu_0 due to insufficient workspace. See verbose log",
            "no_memory",
            "larger workspace_bytes",
        ),
        (
            "2: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (no further information)",
            "no_memory",
            "stop pipelines",
        ),
        ("[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)", "no_memory", "stop pipelines"),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([tactic.cpp:1676: enumerate_tactics] Tactic Selection: no tactics to "
            "implement the operation within workspace limit. Consider increase the allowed workspace size if applicable.",
            "no_memory",
            "larger workspace_bytes",
        ),
        (
            "4: [network.cpp::validate::2963] Error Code 4: Internal (Network has dynamic or shape inputs, but no optimization profile "
            "has been defined.)",
            "no_profile",
            "`profiles`",
        ),
        ("CUDA initialization failure with error: 35", "no_device", "check the driver"),
        ("Error Code 2: Internal Error (Build canceled by user)", "cancelled", "again"),
        ("BuildCanceled (Build canceled by user)", "cancelled", "again"),
        ("Validation failed: DLA core 0 does not support kernel size 64", "failed", "dla_core -1"),
        ("a message that nobody has seen before", "failed", "look at the log"),
    ],
)
def test_a_failed_build_is_explained(message: str, code: str, remedy: str) -> None:
    error = build_error([message], "")
    assert error.code == code and remedy in str(error)
    assert message.split("(")[0].strip(" .")[:40] in str(error)


def test_the_node_is_taken_from_the_message() -> None:
    assert build_error(["Could not find any implementation for node norm_3."], "").node == "norm_3"
    assert (
        build_error(["Could not find any implementation for node {ForeignNode[a.weight...b + c]}."], "").node
        == "{ForeignNode[a.weight...b + c]}"
    )


def test_the_reason_wins_over_what_was_only_tried() -> None:
    """RTX logs a missing driver of every build, and goes on."""
    assert (
        build_error([DRIVER, "Network has dynamic or shape inputs, but no optimization profile has been defined"], "").code == "no_profile"
    )
    assert build_error([DRIVER], "").code == "no_device"


def test_silence_is_told_as_such() -> None:
    assert "gave no reason" in str(build_error([], "TensorRT gave no reason"))


def test_a_long_message_is_cut() -> None:
    assert len(str(build_error(["x" * 100_000], ""))) < MAX_QUOTED + 200


def test_all_codes_are_known() -> None:
    assert {cause.code for cause in CAUSES} <= set(CODES)


@dataclass
class Eight:
    """A ParserError as TensorRT 8 has it: without names."""

    description: str
    kind: str = "INVALID_NODE"

    def code(self) -> Any:
        return SimpleNamespace(name=self.kind)

    def desc(self) -> str:
        return self.description

    def node(self) -> int:
        return 3


class Ten(Eight):
    def node_name(self) -> str:
        return "strange"

    def node_operator(self) -> str:
        return "Frobnicate"


MISSING = 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
EIGHT_LOG = [
    'ModelImporter.cpp:726: While parsing node number 3 [Frobnicate -> "y"]:',
    "ModelImporter.cpp:727: --- Begin node ---",
    'ModelImporter.cpp:728: input: "a"\noutput: "y"\nname: "strange"\nop_type: "Frobnicate"\ndomain: "example"\n',
    "ModelImporter.cpp:729: --- End node ---",
    "ModelImporter.cpp:732: ERROR: ModelImporter.cpp:158 In function parseGraph:\n[6] Invalid Node - strange",
]


@pytest.mark.parametrize(("error", "log"), [(Ten(MISSING), []), (Eight(MISSING), EIGHT_LOG)], ids=["10", "8.5"])
def test_node_and_operator_come_from_the_parser_or_its_log(error: Any, log: list[str]) -> None:
    found = parse_error([error], log)
    assert (found.code, found.node, found.operator) == ("unsupported_operator", "strange", "Frobnicate")
    assert str(found).startswith("node strange (Frobnicate): ") and "another opset" in str(found)


def test_other_parser_errors_keep_their_kind() -> None:
    assert parse_error([Ten("In node 3: unusual", "UNSUPPORTED_NODE_ATTR")], []).code == "unsupported_operator"
    assert parse_error([Ten("odd shape", "INVALID_GRAPH")], []).code == "parse"
    assert "1 more after it" in str(parse_error([Ten("odd"), Ten("odd")], []))
    assert parse_error([], []).code == "failed"
