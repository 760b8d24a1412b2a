"""Payloads of the wire protocol, one class per topic kind.

Timestamps are for people: no rule compares the clocks of two machines.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, JsonValue, StringConstraints

from agent.protocol.wire import (
    Clock,
    CommandId,
    Count,
    Digest,
    EventClass,
    LeaseKind,
    Message,
    Mode,
    Name,
    NodeId,
    Severity,
    Short,
    Status,
    Text,
    Wire,
)


class Presence(Message):
    """Birth, clean stop and will. A death counts only if its (boot, sess) equals that of the latest birth (R1).

    `boot` names one start of the device with one state store: it changes when either is new, and all counters of the
    node may start again then. `mode_for_s` says how long the mode has held, without a clock that both ends share.
    """

    node: NodeId
    boot: Short
    sess: Count
    state: Literal["online", "offline", "draining"]
    reason: Literal["birth", "will", "shutdown", "update", "reboot"]
    mode: Mode
    epoch: Count
    mode_for_s: float | None = None
    ts: AwareDatetime


class Hardware(Wire):
    module: Short = "unknown"
    serial_hash: Short | None = None
    mem_mb: Count | None = None


class Endpoint(Wire):
    """Where clients and balancers reach the node's HTTP API."""

    host: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:_-]{0,252}$")]
    port: Annotated[int, Field(ge=1, le=65_535)]
    tls: bool = False


class Backup(Wire):
    """What the node offers as a backup: its share among backups and the load it can bear."""

    weight: Annotated[int, Field(ge=0, le=1000)] = 1
    max_rps: Annotated[float, Field(gt=0)] = 1.0


class MetaBody(Wire):
    """What the node is: inventory, capabilities, endpoint."""

    agent: Short
    proto: Annotated[tuple[int, ...], Field(max_length=16)] = (1,)
    hw: Hardware = Hardware()
    sw: dict[Short, Short] = Field(default_factory=dict, max_length=32)
    ops: Annotated[tuple[Short, ...], Field(max_length=64)] = ()
    endpoint: Endpoint | None = None
    backup: Backup | None = None
    cert_exp: AwareDatetime | None = None


class Meta(MetaBody, Message):
    """Registration. `hash` is over everything but itself, `boot` included, so an equal hash means nothing to say."""

    node: NodeId
    boot: Short
    hash: Digest | None = None


class ModelState(Wire):
    name: Name
    digest: Digest | None = None
    engine: Digest | None = None
    status: Literal["serving", "building", "failed", "previous", "ready"]
    task: Short | None = None
    message: Text | None = None


class PipelineState(Wire):
    id: Name
    status: Literal["running", "starting", "stopped", "failed", "paused"]
    fps: float | None = None
    is_slowed: bool = False
    message: Text | None = None


class StateBody(Wire):
    """What runs, as opposed to what is desired."""

    desired_rev: Count = 0
    applied_rev: Count = 0
    models: Annotated[tuple[ModelState, ...], Field(max_length=128)] = ()
    pipelines: Annotated[tuple[PipelineState, ...], Field(max_length=128)] = ()


class State(StateBody, Message):
    """Reported on change. `seq` of state and heartbeat only ever grows within one `boot` (R9)."""

    node: NodeId
    boot: Short
    seq: Count
    mode: Mode
    epoch: Count
    lease_kind: LeaseKind | None = None
    lease_left_s: float | None = None
    clock: Clock = "unsynced"


class LineCounts(Wire):
    """Objects that crossed a line since the camera's start, by direction."""

    forward: Count = 0
    backward: Count = 0


Labels = dict[Short, Count]


class CameraState(Message):
    """How a camera is and what it sees now. `objects` and each of `zones`: how many of a label; a zone that holds nothing is empty.

    `state`: starting, connecting, streaming, stalled, backing_off, ended, failed, paused; `words` says it to people. `is_slowed`: requests
    for text have the device.
    """

    node: NodeId
    id: Name
    ts: AwareDatetime
    state: Short
    words: Text
    fps: float = 0.0
    age_ms: float | None = None
    is_slowed: bool = False
    objects: Labels = Field(default_factory=dict, max_length=200)
    zones: dict[Short, Labels] = Field(default_factory=dict, max_length=64)
    lines: dict[Short, LineCounts] = Field(default_factory=dict, max_length=64)


class HttpLoad(Wire):
    rps: float = 0.0
    p50_ms: float | None = None
    p99_ms: float | None = None
    err: Count = 0
    inflight: Count = 0


class OutboxLoad(Wire):
    n: Count = 0
    oldest_s: float = 0.0
    dropped: Count = 0


class HeartbeatBody(Wire):
    """Load in percent, memory in MB used, temperatures by zone in degrees Celsius; None where nothing measures it."""

    cpu: float | None = None
    gpu: float | None = None
    mem_mb: Count | None = None
    temp_c: dict[Short, float] = Field(default_factory=dict, max_length=32)
    power_w: float | None = None
    throttled: bool | None = None
    http: HttpLoad = HttpLoad()


class Heartbeat(HeartbeatBody, Message):
    """`mono` is the node's boot clock; the next one comes after about `interval_s`."""

    node: NodeId
    boot: Short
    sess: Count
    seq: Count
    ts: AwareDatetime
    mono: float
    clock: Clock = "unsynced"
    mode: Mode
    epoch: Count
    interval_s: float | None = None
    outbox: OutboxLoad = OutboxLoad()


class Command(Message):
    """An order to one node. `args` are checked against the table in operations.py once the op is known.

    `epoch` belongs to the ops that move the lease and to nothing else. `deadline_s` counts from the moment of sending
    and is the Message Expiry of the publication too.
    """

    id: CommandId
    op: Short
    node: NodeId
    epoch: Count | None = None
    issued_at: AwareDatetime
    deadline_s: Annotated[float, Field(gt=0, le=7 * 86_400)]
    issuer: Short
    args: dict[str, JsonValue] = Field(default_factory=dict, max_length=256)


class Failure(Wire):
    """The `error` of a result. An unknown code of a newer node stays readable: the field is a string on the wire."""

    code: Short
    message: Text
    retryable: bool = False


class Result(Message):
    """One step of a command. `seq` grows by one with each step of this command and survives restarts of the node."""

    id: CommandId
    op: Short
    node: NodeId
    seq: Count
    status: Status
    progress: Annotated[float, Field(ge=0, le=1)] | None = None
    step: Short | None = None
    epoch: Count
    replayed: bool = False
    error: Failure | None = None
    output: dict[str, JsonValue] = Field(default_factory=dict, max_length=256)


class Event(Message):
    id: CommandId
    node: NodeId
    event_class: EventClass = Field(validation_alias="class", serialization_alias="class")
    severity: Severity = Field(validation_alias="sev", serialization_alias="sev")
    ts: AwareDatetime
    mono: float
    data: dict[str, JsonValue] = Field(default_factory=dict, max_length=256)


class Sync(Wire):
    """`data` of the event class `sync`, sent after every CONNACK: the coordinator re-issues what is not final."""

    boot: Short
    sess: Count
    epoch: Count
    desired_rev: Count
    last_cmd_ids: Annotated[tuple[CommandId, ...], Field(max_length=20)] = ()
    journal_open: Annotated[tuple[CommandId, ...], Field(max_length=64)] = ()


class DesiredModel(Wire):
    name: Name
    digest: Digest | None = None


class DesiredPipeline(Wire):
    id: Name
    source: Text
    model: Name
    settings: dict[str, JsonValue] = Field(default_factory=dict, max_length=64)


class Desired(Message):
    """All that should stay true on a node, always in full; `rev` only ever grows."""

    rev: Count
    models: Annotated[tuple[DesiredModel, ...], Field(max_length=64)] = ()
    pipelines: Annotated[tuple[DesiredPipeline, ...], Field(max_length=64)] = ()
    config: dict[str, JsonValue] = Field(default_factory=dict, max_length=64)


class CoordinatorPresence(Message):
    """Birth and will of the acting coordinator; the higher `term` is the truth."""

    coordinator: Short
    term: Count
    online: bool
    ts: AwareDatetime


class Resync(Message):
    """Asks all nodes for birth, meta, state and sync again, each after a random part of `spread_s`."""

    spread_s: Annotated[float, Field(ge=0, le=3600)] = 0.0


def meta_hash(meta: Meta) -> str:
    """`sha256:…` over the canonical JSON of all fields but `hash`."""
    fields = meta.model_dump(mode="json", exclude={"hash"}, exclude_none=True)
    return "sha256:" + hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
