"""Why a plan was not built, in words that say what to do: TensorRT itself returns None and leaves the reason in its log.

The patterns come from the logs of TensorRT 8.5 to 11 and TensorRT-RTX 1.7 and from the issues of NVIDIA/TensorRT.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Dict, Optional, Pattern, Sequence, Tuple

CODES = (
    "bad_request",
    "parse",
    "unsupported_operator",
    "unsupported",
    "no_memory",
    "no_kernel",
    "no_profile",
    "no_space",
    "cancelled",
    "no_device",
    "failed",
)
MAX_QUOTED = 600


class PlanError(Exception):
    """No plan. `code` is one of CODES; `node` and `operator` name the place in the ONNX graph where it is known, else are empty."""

    def __init__(self, code: str, message: str, node: str = "", operator: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.node = node
        self.operator = operator

    def to_json(self) -> Dict[str, str]:
        return {"code": self.code, "message": str(self), "node": self.node, "operator": self.operator}


@dataclass(frozen=True)
class Cause:
    pattern: Pattern[str]
    code: str
    remedy: str


def _cause(pattern: str, code: str, remedy: str) -> Cause:
    return Cause(re.compile(pattern, re.IGNORECASE), code, remedy)


_MEMORY = "stop pipelines and other programs, or give swap, then build again; a smaller workspace leaves more for the rest of the build"
_QUANTISED = "quantise signed and symmetric (zero point 0), weights per channel, biases not at all"

# The first that fits decides: what names its reason stands before what is a consequence.
CAUSES: Tuple[Cause, ...] = (
    _cause(r"Build ?Cancell?ed|cancell?ed by user", "cancelled", "start the build again"),
    _cause(
        r"no optimization profile|optimization profile .*(missing|not been? (defined|set))|missing dimensions in profile",
        "no_profile",
        "give minimum, optimum and maximum shapes of every dynamic input in `profiles`",
    ),
    _cause(
        r"within workspace limit|workspace size is too small|insufficient workspace|needs? .*workspace|tactics? .*skipp.*workspace",
        "no_memory",
        "the workspace is too small for this model: give a larger workspace_bytes",
    ),
    _cause(r"out of memory|OutOfMemory|insufficient memory|MemoryAlloc|bad_alloc|requested amount of GPU memory", "no_memory", _MEMORY),
    _cause(
        r"could not find any implementation for node",
        "no_kernel",
        f"that is TensorRT's way to say that no kernel fitted into the memory it had: {_MEMORY}; "
        "where plenty is free, a larger workspace_bytes or another precision of that node helps",
    ),
    _cause(r"has type (U?Int\d+) but must have type|zero.?point.*(must be|only).*(zero|symmetric)", "unsupported_operator", _QUANTISED),
    _cause(
        r"plugin not found|plugin creator .*not found|No importer registered|UNSUPPORTED_NODE|getPluginCreator could not find",
        "unsupported_operator",
        "export with another opset or another form of that layer, fold it away, or let ONNX Runtime run this model",
    ),
    _cause(r"DLA", "failed", "build for the GPU (dla_core -1), or with fp16 or int8 and static shapes, which are what a DLA runs"),
    _cause(r"lean runtime|VERSION_COMPATIBLE", "unsupported", "this TensorRT has no lean runtime: build without version_compatible"),
    _cause(r"strongly.?typed", "parse", "the types in the ONNX graph do not fit together: convert its precision again, or build from fp32"),
    _cause(r"must have at least one output|Failed to parse|ParseFromCodedStream|cannot be found", "parse", "give a whole ONNX file"),
    # Last: RTX says so of what it only tried, and goes on.
    _cause(
        r"CUDA initialization failure|no CUDA-capable device|driver version is insufficient|factory function returned nullptr",
        "no_device",
        "a plan is built on the GPU that will run it: check the driver (`nvidia-smi`, /dev/nvhost-gpu) and the rights on its devices",
    ),
)

_NODE = re.compile(r"(?:for|of|in) node:? +(\{.*?\}|[^\s,;]+)")
_PARSING = re.compile(r'While parsing node number \d+ \[(?P<operator>\S+)(?: -> "[^"]*")?')
_BEGIN = re.compile(r"(?:Node name: *|\bname: *\")(?P<node>[^\"\n]+)")


def build_error(messages: Sequence[str], otherwise: str) -> PlanError:
    """The error behind TensorRT's kept messages, oldest first. `otherwise` is said where it kept silent."""
    for cause in CAUSES:
        for message in messages:
            if cause.pattern.search(message):
                node = _NODE.search(message)
                return PlanError(cause.code, f"{quoted(message)}: {cause.remedy}", node.group(1).rstrip(".") if node else "")
    reason = quoted(messages[-1]) if messages else otherwise
    return PlanError("failed", f"{reason}: look at the log of the build; another precision or optimization_level may avoid it")


def parse_error(errors: Sequence[Any], messages: Sequence[str]) -> PlanError:
    """The error of an ONNX parser. errors: its ParserErrors; before TensorRT 10 they know no names, but the log has them."""
    if not errors:
        return build_error(messages, "the ONNX parser gave up without a reason")
    parser_error = errors[0]
    node = parser_error.node_name() if hasattr(parser_error, "node_name") else _said(_BEGIN, "node", messages)
    operator = parser_error.node_operator() if hasattr(parser_error, "node_operator") else _said(_PARSING, "operator", messages)
    code = getattr(parser_error.code(), "name", str(parser_error.code()))
    found = build_error([f"{code}: {parser_error.desc()}"], "")
    kind = found.code if found.code != "failed" else "unsupported_operator" if code.startswith("UNSUPPORTED") else "parse"
    place = f"node {node or parser_error.node()} ({operator}): " if operator else ""
    more = f"; {len(errors) - 1} more after it" if len(errors) > 1 else ""
    return PlanError(kind, f"{place}{found}{more}", node, operator)


def quoted(message: str) -> str:
    """A message of TensorRT on one line and within bounds."""
    line = " ".join(message.split()).rstrip(".:")
    return line if len(line) <= MAX_QUOTED else f"{line[:MAX_QUOTED]}…"


def _said(pattern: Pattern[str], group: str, messages: Sequence[str]) -> str:
    found: Optional[str] = None
    for message in messages:
        match = pattern.search(message)
        found = match.group(group).strip() if match else found
    return found or ""
