"""What every payload of the wire protocol is made of: the closed vocabularies, bounded types, and the codec.

Frozen and strict; unknown fields are ignored, for a fleet never upgrades in one step.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from pydantic_core import from_json

from agent.protocol.topics import NODE_PATTERN
from agent.protocol.ulid import ULID_PATTERN

MAX_PAYLOAD_BYTES = 128_000  # brokers are told 131,072 for the whole packet: name and properties need the rest

Mode = Literal["starting", "standby", "active", "autonomous", "draining", "degraded"]
LeaseKind = Literal["full", "contingent"]
Clock = Literal["synced", "unsynced"]
Severity = Literal["info", "warning", "error"]
Status = Literal["accepted", "executing", "succeeded", "failed", "rejected", "timed_out", "cancelled"]
FINAL_STATUSES: frozenset[Status] = frozenset({"succeeded", "failed", "rejected", "timed_out", "cancelled"})
ErrorCode = Literal[
    "stale_epoch", "expired", "invalid", "unsupported", "busy", "unhealthy", "no_space", "digest_mismatch",
    "build_failed", "health_gate", "rolled_back", "interrupted", "internal",
]  # fmt: skip
ERROR_CODES: frozenset[str] = frozenset(get_args(ErrorCode))

Short = Annotated[str, StringConstraints(max_length=128)]
Text = Annotated[str, StringConstraints(max_length=2000)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
CameraId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
NodeId = Annotated[str, StringConstraints(pattern=NODE_PATTERN)]
CommandId = Annotated[str, StringConstraints(pattern=ULID_PATTERN)]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
EventClass = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class MessageError(ValueError):
    """A payload is not of this protocol. The message names the field and is fit for a result or an event."""


class Wire(BaseModel):
    """What every payload and every part of one has in common."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", populate_by_name=True, allow_inf_nan=False, protected_namespaces=())


class Message(Wire):
    """A whole payload. `v` is the major of the topic; fields are only ever added inside a major."""

    v: Literal[1] = 1


M = TypeVar("M", bound=Wire)


def decode(kind: type[M], payload: bytes) -> M:
    """Parses untrusted bytes. Raises MessageError with the first fault."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MessageError(f"payload of {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    try:
        from_json(payload, allow_inf_nan=False, cache_strings=False)  # free-form fields would let NaN through
        return kind.model_validate_json(payload)
    except ValidationError as error:
        raise MessageError(first_fault(kind, error)) from error
    except ValueError as error:
        raise MessageError(f"{kind.__name__}: not JSON: {str(error)[:200]}") from error


def first_fault(kind: type[Wire], error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"])[:120]
    return f"{kind.__name__}: {where or 'payload'}: {fault['msg']}"[:500]


def encode(message: Wire) -> bytes:
    """The bytes on the wire. Raises MessageError when they are too many."""
    payload = message.model_dump_json(by_alias=True, exclude_none=True).encode()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MessageError(f"{type(message).__name__} of {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}; send less")
    return payload


def wire_now() -> datetime:
    """The wall clock, for timestamps that people read."""
    return datetime.now(timezone.utc)
