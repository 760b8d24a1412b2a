"""The wire between the daemon and its workers: the one file both sides share.

A frame is two big-endian 32-bit lengths, a JSON object with the field `type`, and raw bytes (token ids, a JPEG, embeddings). Both sides
ship together, so unknown fields are errors. Every request carries a number; it is answered by any number of `Tokens` and exactly one
`Done` or `Failed`. `Status`, `CameraEvent` and `CameraFrame` come unasked.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any, Dict, Literal, Optional, Tuple, Type, Union

from models.record import RecordError, from_mapping, to_mapping

HEADER = struct.Struct(">II")
MAX_JSON_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 64 << 20
SMALL_BYTES = 128_000  # what a message over MQTT may hold (agent/protocol/wire.py)

View = Literal["drawn", "plain", "small"]


class ProtocolError(RuntimeError):
    """The other side sent something that is no frame; the connection is not usable any more."""


# ── daemon → worker ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class OpenModel:
    """Load the converted model in `folder`; its artefact decides the runtime. `manifest` is the manifest's mapping, `options` those of
    EngineOptions. A model of that name that is open already is replaced. Done{…facts of the engine}."""

    request: int
    model: str
    manifest: Dict[str, Any]
    folder: str
    options: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CloseModel:
    request: int
    model: str


@dataclass(frozen=True)
class Generate:
    """Continue the prompt in the payload (little-endian int32 token ids).

    Streams `Tokens` and ends with Done{finish: stop|length, prompt_tokens, generated_tokens, cached_tokens, queued_s}, the last of them
    seconds until it had a slot. A stop token is not sent.

    logit_bias  (token id, what is added to its logit)
    grammar     what the text must match, in llguidance's JSON form; empty: anything
    adapter     name of the LoRA adapter in the model's folder; empty: none
    tenant      whose request this is: tenants share the slots fairly
    """

    request: int
    model: str
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: Optional[int] = None
    stop_tokens: Tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = -1
    priority: int = 0
    deadline_s: float = 600.0
    logit_bias: Tuple[Tuple[int, float], ...] = ()
    grammar: str = ""
    adapter: str = ""
    tenant: str = ""


@dataclass(frozen=True)
class Encode:
    """Run a text encoder over sequences of token ids: payload = int32 ids one after another, `lengths` cuts them.

    Done carries float32 rows: embeddings [n, dimensions] or class logits [n, classes], with result {"columns": …}.
    """

    request: int
    model: str
    lengths: Tuple[int, ...]
    deadline_s: float = 60.0


@dataclass(frozen=True)
class Detect:
    """Detect objects in the encoded picture (JPEG or PNG) in the payload. Done{detections, width, height, latency_ms}; with `annotate`, the
    payload of Done is the picture with boxes as JPEG."""

    request: int
    model: str
    threshold: Optional[float] = None
    annotate: bool = False
    deadline_s: float = 60.0


@dataclass(frozen=True)
class StartPipeline:
    """Start a camera pipeline, or change one that runs; `settings` is the whole mapping of a PipelineSettings (agent/worker/settings.py).

    A running pipeline whose source stays keeps its camera open, its tracks and its events: Done{source, is_reopened}. What cannot be used
    is refused whole, Failed("invalid") names the field, and what ran goes on as it did.
    """

    request: int
    pipeline: str
    settings: Dict[str, Any]


@dataclass(frozen=True)
class StopPipeline:
    request: int
    pipeline: str


@dataclass(frozen=True)
class Watch:
    """Send `CameraFrame`s of a pipeline, at most `fps` a second, until `seconds` from now; the daemon renews while somebody looks.

    view  `drawn`: with what was seen; `plain`; `small`: plain, and of at most SMALL_BYTES. Each is watched for itself.
    """

    request: int
    pipeline: str
    fps: float = 10.0
    seconds: float = 5.0
    view: View = "drawn"


@dataclass(frozen=True)
class Cancel:
    """Give up the request numbered `target`; it ends with Failed(code="cancelled") unless it has ended already."""

    request: int
    target: int


@dataclass(frozen=True)
class Shutdown:
    request: int


# ── worker → daemon ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Ready:
    pid: int
    python: str
    versions: Dict[str, str]


@dataclass(frozen=True)
class Tokens:
    """Newly generated token ids of a request; `logprobs` holds one [[token, logprob], …] list per token if they were asked for, the
    generated token first. `cached_tokens` of the prompt were not computed again."""

    request: int
    tokens: Tuple[int, ...]
    logprobs: Tuple[Any, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True)
class Done:
    request: int
    result: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """codes: invalid, unknown_model, busy, cancelled, deadline, engine, memory (too little to open a model), internal.

    `retry_after_s`: when `busy` may be over, if known."""

    request: int
    code: str
    message: str
    retry_after_s: Optional[float] = None


@dataclass(frozen=True)
class Status:
    """Once a second: what this worker holds and does; also the sign that its loop is alive. `busy_s`: seconds of work since its start."""

    models: Dict[str, Dict[str, Any]]
    pipelines: Dict[str, Dict[str, Any]]
    busy_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Pace:
    """How fast cameras may go while requests for text need the device: at most `fps` a second each; None: as configured."""

    request: int
    fps: Optional[float] = None


@dataclass(frozen=True)
class CameraEvent:
    """Something happened in front of a camera, or to it.

    kinds: camera, unreachable, object, crossed, zone, recording; what `data` holds for each stands in agent/worker/events.py. The payload
    is a JPEG where `data["has_snapshot"]` says so, else empty.
    """

    pipeline: str
    kind: str
    data: Dict[str, Any]


@dataclass(frozen=True)
class CameraFrame:
    """One JPEG (payload) of a watched pipeline in the view that was asked for, and what was seen in it."""

    pipeline: str
    sequence: int
    age_ms: float
    detections: Tuple[Dict[str, Any], ...] = ()
    view: View = "drawn"


Request = Union[OpenModel, CloseModel, Generate, Encode, Detect, StartPipeline, StopPipeline, Watch, Pace, Cancel, Shutdown]
Report = Union[Ready, Tokens, Done, Failed, Status, CameraEvent, CameraFrame]
Message = Union[Request, Report]

TYPES: Dict[str, Type[Any]] = {
    kind.__name__: kind
    for kind in (
        OpenModel, CloseModel, Generate, Encode, Detect, StartPipeline, StopPipeline, Watch, Pace, Cancel, Shutdown,
        Ready, Tokens, Done, Failed, Status, CameraEvent, CameraFrame,
    )
}  # fmt: skip


def encode_frame(message: Message, payload: bytes = b"") -> bytes:
    """The bytes of one frame. Raises ProtocolError if it is over a limit."""
    text = json.dumps({"type": type(message).__name__, **to_mapping(message)}, separators=(",", ":")).encode()
    if len(text) > MAX_JSON_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"{type(message).__name__} is too large: {len(text)} bytes of JSON (limit {MAX_JSON_BYTES}), "
            f"{len(payload)} of payload (limit {MAX_PAYLOAD_BYTES})"
        )
    return HEADER.pack(len(text), len(payload)) + text + payload


def frame_lengths(header: bytes) -> Tuple[int, int]:
    """(JSON bytes, payload bytes) that follow an 8-byte header. Raises ProtocolError if over a limit."""
    json_bytes, payload_bytes = HEADER.unpack(header)
    if json_bytes > MAX_JSON_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"frame announces {json_bytes} + {payload_bytes} bytes, over the limits")
    return json_bytes, payload_bytes


def decode_message(text: bytes) -> Message:
    """Parse the JSON part of a frame. Raises ProtocolError."""
    try:
        values = json.loads(text)
        kind = TYPES[values.pop("type")]
        message: Message = from_mapping(kind, values)
    except (ValueError, KeyError, TypeError, AttributeError, RecordError) as error:
        raise ProtocolError(f"not a message: {error}: {text[:200]!r}") from error
    return message
