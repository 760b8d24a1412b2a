"""What the HTTP side needs of the rest of the node, declared where it is used; agent/main.py wires the real ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from starlette.types import ASGIApp

from agent.batches.store import BatchStore
from agent.cameras.record import EventRecord
from agent.cameras.store import Filter
from agent.errors import AgentError
from agent.http.keys import Keys
from agent.http.outcome import Outcome
from agent.mode import Allowed, Reason, Refused
from agent.protocol.wire import LeaseKind, Mode
from agent.telemetry.generic import Reading
from agent.worker_protocol import View


class ServiceFailure(AgentError):
    """A service cannot do what was asked; `reason` is one of the keys of errors.FAILURES, anything else is an internal error.

    Services may raise any AgentError: what a worker refused and a lost worker are answered just so.
    """

    code = "service_failure"

    def __init__(self, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Sampling:
    """How to answer. None: the model's own default, for `max_tokens` the rest of its context. A larger `priority` goes first.

    logit_bias  (token id, what is added to its logit)
    grammar     what the answer must match, in llguidance's JSON form; empty: anything
    adapter     name of a LoRA adapter of the model; empty: none
    tenant      whose request this is: tenants share the model fairly
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = -1
    priority: int = 0
    deadline_s: float = 600.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str = ""
    adapter: str = ""
    tenant: str = ""


@dataclass(frozen=True)
class Meant:
    """What a client's name of a model stands for. `thinking`: unless the request says otherwise; None: the model's own default."""

    model: str
    adapter: str = ""
    thinking: bool | None = None


def split_name(name: str) -> Meant:
    """`model:adapter`, where nothing is known of aliases."""
    model, _, adapter = name.partition(":")
    return Meant(model, adapter)


@dataclass(frozen=True)
class Usage:
    """`queued_s`: seconds until the model had room for it; None: not known, because the client had enough before its end."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queued_s: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    token: str
    raw: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    usage: Usage | None = None


class TextService(Protocol):
    def check_room(self, model: str, tenant: str, priority: int) -> None:
        """Raises AgentError where one request more would be refused as busy for certain: asked before work is done on it."""
        ...

    def chat_prompt(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
    ) -> list[int]: ...

    def continued_prompt(self, model: str, messages: Sequence[Mapping[str, Any]], said: str) -> tuple[list[int], int]: ...

    def begins_in_thoughts(self, model: str, thinking: bool | None = None) -> bool: ...

    def encode(self, model: str, text: str) -> list[int]: ...

    def generate(
        self, model: str, prompt_tokens: Sequence[int], sampling: Sampling, continues: bool = False
    ) -> AsyncIterator[TextDelta]: ...

    async def embed(self, model: str, inputs: Sequence[str | Sequence[int]]) -> tuple[NDArray[np.float32], int]: ...

    async def classify(self, model: str, inputs: Sequence[str]) -> Sequence[Sequence[tuple[str, float]]]: ...


@dataclass(frozen=True)
class Picture:
    """What was found in one picture; `jpeg` has the boxes drawn if that was asked for."""

    width: int
    height: int
    latency_ms: float
    detections: Sequence[Mapping[str, Any]]
    jpeg: bytes | None = None


@dataclass(frozen=True)
class Frame:
    jpeg: bytes
    detections: Sequence[Mapping[str, Any]] = ()
    sequence: int = 0


class VisionService(Protocol):
    async def detect(self, model: str, image: bytes, threshold: float | None, annotate: bool) -> Picture: ...

    def cameras(self) -> Sequence[Mapping[str, Any]]: ...

    async def snapshot(self, camera: str, view: View = "drawn") -> bytes: ...

    def frames(self, camera: str, view: View = "drawn") -> AsyncIterator[Frame]: ...


@dataclass(frozen=True)
class BuildView:
    """A build that goes on, or the last one that did not end well. `progress`: share of the whole, None when it is over. `message`: what
    goes on, or why it did not end well.

    status  `building`; `waiting`: built, to be opened; `failed`; `cancelled`
    """

    status: str
    phase: str = ""
    progress: float | None = None
    message: str = ""
    attempts: int = 0


@dataclass(frozen=True)
class AttemptView:
    """One step of the precision ladder. `worst`: the first tensor that left the reference; empty where none was looked for. `notes`: what
    the converter did, in words."""

    precision: str
    status: str
    reason: str = ""
    worst: str = ""
    notes: str = ""


@dataclass(frozen=True)
class ModelView:
    """One model as people and clients see it. `figures` are a few measured numbers by name, units in the name.

    is_current  the engine that serves is the one that is wanted; else `build` says how far that one is
    ladder      what was tried until the engine was proven
    asleep      why it is not in memory (`idle`, `memory`) though it serves: it is loaded when somebody asks; else empty
    unloads     how often that was so, by why; `reloads`: how often somebody asked then
    """

    name: str
    task: str
    status: str
    aliases: tuple[str, ...] = ()
    engine: str = ""
    verdict: str = ""
    licence: str = ""
    figures: Mapping[str, float | str] = field(default_factory=dict)
    is_current: bool = True
    build: BuildView | None = None
    ladder: tuple[AttemptView, ...] = ()
    asleep: str = ""
    unloads: Mapping[str, int] = field(default_factory=dict)
    reloads: int = 0


@dataclass(frozen=True)
class PipelineView:
    """A camera pipeline. `objects`: in the picture now; `counts`: crossings since the start; `truth`: the same where the source knows."""

    id: str
    model: str
    status: str
    fps: float = 0.0
    latency_ms: float = 0.0
    objects: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    truth: Mapping[str, int] | None = None
    message: str = ""


@dataclass(frozen=True)
class WorkerView:
    name: str
    status: str
    pid: int | None = None
    restarts: int = 0
    memory_bytes: int = 0
    message: str = ""


@dataclass(frozen=True)
class EventView:
    """`at` is an ISO 8601 timestamp for people; `number` only grows, so that a reader sees what is new."""

    number: int
    at: str
    kind: str
    severity: str
    message: str


@dataclass(frozen=True)
class NodeSnapshot:
    """The node at one moment. `lease_left_s` None: no lease; `uplink`: connected, disconnected, or standalone."""

    node: str
    version: str
    mode: Mode
    reason: Reason
    epoch: int
    uptime_s: float
    lease_kind: LeaseKind | None = None
    lease_left_s: float | None = None
    uplink: str = "standalone"
    models: tuple[ModelView, ...] = ()
    pipelines: tuple[PipelineView, ...] = ()
    workers: tuple[WorkerView, ...] = ()
    events: tuple[EventView, ...] = ()
    device: Reading = Reading()  # noqa: RUF009 - frozen


class NodeView(Protocol):
    def snapshot(self) -> NodeSnapshot: ...

    def models(self) -> Sequence[ModelView]: ...


class Deployments(Protocol):
    """Orders about models by hand. Both raise ServiceFailure."""

    def deploy(self, model: str, build: Mapping[str, Any]) -> str:
        """Want a model, built as told (see ModelDeployArgs); what failed is tried anew. Its own name."""

    def cancel(self, model: str) -> bool:
        """End its build; whether there was one."""


class Cameras(Protocol):
    """Orders about cameras. Those that change anything raise agent.cameras.orders.CameraRefused."""

    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Of each camera that is wanted, passwords included."""

    def origin(self, camera: str) -> str:
        """`configuration`, `order` or `coordinator`."""

    def is_configured(self, camera: str) -> bool:
        """Whether the configuration file has it too."""

    async def replace(self, camera: str, settings: Mapping[str, Any]) -> bool:
        """Whether it runs so already."""

    async def change(self, camera: str, patch: Mapping[str, Any]) -> bool: ...

    async def remove(self, camera: str) -> None: ...

    async def reset(self, camera: str) -> bool: ...


class Sightings(Protocol):
    """What the cameras saw; see agent/cameras/keeper.py. `kept` counts by (camera, label) since the start."""

    kept: Mapping[tuple[str, str], int]
    dropped: int

    async def page(self, wanted: Filter, before: int | None, limit: int) -> Sequence[EventRecord]: ...

    async def event(self, identifier: str) -> EventRecord | None: ...

    def snapshot(self, event: EventRecord) -> Path: ...

    def clip(self, event: EventRecord) -> Path: ...


class Gate(Protocol):
    def __call__(self) -> Allowed | Refused: ...


class Demo(Protocol):
    """The stand-in for the cloud API that `hotspare demo` starts."""

    async def primary_is_on(self) -> bool | None:
        """None where it cannot be told."""

    async def switch_primary(self, on: bool) -> None:
        """Raises ServiceFailure if that did not work."""


def nobody() -> Keys:
    """No key is asked for."""
    return {}


@dataclass(frozen=True)
class Services:
    """`text` or `vision` None: this node runs no such pipelines. `keys`: SHA-256 of the API keys, and their rules; empty: open.

    `around` puts the gateway and the answer cache between the door and the endpoints; `record` is told how each inference request ended,
    `sla` reports what that came to. `meant` reads a client's name of a model; an unknown one stands for itself.
    `batches` None: no files are kept here. `names`: what this node is called where no keys are asked for (agent/http/hosts.py).
    """

    node_id: str
    node: NodeView
    gate: Gate
    text: TextService | None = None
    vision: VisionService | None = None
    demo: Demo | None = None
    keys: Callable[[], Keys] = nobody
    deployments: Deployments | None = None
    around: Callable[[ASGIApp], ASGIApp] | None = None
    record: Callable[[Outcome], None] | None = None
    sla: Callable[[], Mapping[str, Any]] | None = None
    cameras: Cameras | None = None
    sightings: Sightings | None = None
    meant: Callable[[str], Meant] = split_name
    batches: BatchStore | None = None
    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Limits:
    """`in_flight`: inference requests that this node answers itself at the same time; `forwarded`: those that wait for the primary, for a
    kept answer or for an equal request."""

    json_bytes: int = 8 << 20
    picture_bytes: int = 20 << 20
    body_s: float = 30.0
    header_s: float = 10.0
    answer_s: float = 600.0
    in_flight: int = 32
    forwarded: int = 256
    batch_items: int = 8  # of all batches, at the same time; the worker's queue has 16 places beside its slots, and chats need some
    upload_bytes: int = 200 << 20
    upload_s: float = 600.0
    pictures: int = 4  # each holds up to picture_bytes of memory
    watchers: int = 8
    head_hold_s: float = 10.0
    keep_alive_s: float = 10.0
