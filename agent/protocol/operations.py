"""The commands a node may get: arguments, lane and what a restart does to each. One literal table. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, JsonValue, ValidationError

from agent.protocol.messages import Command
from agent.protocol.wire import CameraId, CommandId, Digest, LeaseKind, MessageError, Name, Short, Text, Wire, first_fault

Lane = Literal["control", "work"]
LeaseSeconds = Annotated[float, Field(gt=0, le=86_400)]


class PingArgs(Wire):
    echo: Short | None = None


class ActivateArgs(Wire):
    """`full` takes traffic now; `contingent` lets a warm node serve as soon as a balancer sends it some (L7)."""

    lease_s: LeaseSeconds
    kind: LeaseKind = "full"
    weight: Annotated[int, Field(ge=0, le=1000)] = 1


class RenewArgs(Wire):
    lease_s: LeaseSeconds


class StandbyArgs(Wire):
    reason: Text | None = None


class DrainArgs(Wire):
    """Out of service for maintenance: finish what is in flight, then neither lease nor autonomy until a new order."""

    reason: Text | None = None


Target = Literal["auto", "onnxruntime", "native", "tensorrt", "tensorrt_rtx"]
BuildPrecision = Literal["auto", "fp32", "tf32", "fp16", "int8", "int4"]


class ModelDeployArgs(Wire):
    """The fields after `digest` say how the engine is built and are kept with the order; without them the node's configuration counts.

    `calibration` names an entry of the node's calibration folder. `accept_unverified`: serve it even if it is not proven to be the model.
    """

    name: Name
    digest: Digest | None = None
    precision: BuildPrecision | None = None
    target: Target | None = None
    calibration: Name | None = None
    accept_unverified: bool | None = None


class ModelRemoveArgs(Wire):
    name: Name


class PipelineStartArgs(Wire):
    """Without `source` and `model` the pipeline of that id is known from configuration or the desired document."""

    id: Name
    source: Text | None = None
    model: Name | None = None
    settings: dict[str, JsonValue] = Field(default_factory=dict, max_length=64)


class PipelineStopArgs(Wire):
    id: Name


class CameraSetArgs(Wire):
    """Changes a camera's settings by JSON Merge Patch (RFC 7396): null takes one away. One that is not known needs source and model."""

    id: CameraId
    settings: dict[str, JsonValue] = Field(max_length=64)


class CameraRemoveArgs(Wire):
    id: CameraId


class CameraResetArgs(Wire):
    """Back to what the node's configuration file says of it."""

    id: CameraId


class ConfigSetArgs(Wire):
    values: dict[str, JsonValue] = Field(max_length=64)


class DiagCollectArgs(Wire):
    parts: Annotated[tuple[Literal["logs", "journal", "telemetry", "models", "workers", "config"], ...], Field(max_length=6)] = (
        "telemetry",
        "workers",
        "models",
    )


class AgentUpdateArgs(Wire):
    version: Short
    digest: Digest


class AgentRestartArgs(Wire):
    reason: Text | None = None


class CancelArgs(Wire):
    id: CommandId


@dataclass(frozen=True, slots=True)
class Operation:
    """`moves_lease`: carries an epoch and goes through lease.decide.

    `after_restart`: what becomes of one found in execution when the node starts (R7). Resume what leads to the same end
    when done again; a restart is what some ops were to bring about.
    """

    args: type[Wire]
    lane: Lane
    moves_lease: bool = False
    after_restart: Literal["interrupted", "resume", "succeeded"] = "interrupted"


OPS: Mapping[str, Operation] = {
    "ping": Operation(PingArgs, "control", after_restart="resume"),
    "activate": Operation(ActivateArgs, "control", moves_lease=True, after_restart="resume"),
    "renew": Operation(RenewArgs, "control", moves_lease=True, after_restart="resume"),
    "standby": Operation(StandbyArgs, "control", moves_lease=True, after_restart="resume"),
    "drain": Operation(DrainArgs, "control", moves_lease=True, after_restart="resume"),
    "cancel": Operation(CancelArgs, "control"),
    "model.deploy": Operation(ModelDeployArgs, "work", after_restart="resume"),
    "model.remove": Operation(ModelRemoveArgs, "work", after_restart="resume"),
    "pipeline.start": Operation(PipelineStartArgs, "work", after_restart="resume"),
    "pipeline.stop": Operation(PipelineStopArgs, "work", after_restart="resume"),
    "camera.set": Operation(CameraSetArgs, "work", after_restart="resume"),
    "camera.remove": Operation(CameraRemoveArgs, "work", after_restart="resume"),
    "camera.reset": Operation(CameraResetArgs, "work", after_restart="resume"),
    "config.set": Operation(ConfigSetArgs, "work"),
    "diag.collect": Operation(DiagCollectArgs, "work"),
    "agent.update": Operation(AgentUpdateArgs, "work"),
    "agent.restart": Operation(AgentRestartArgs, "control", after_restart="succeeded"),
}


def arguments(command: Command) -> Wire:
    """The checked arguments. Raises KeyError for an op not in the table, MessageError for arguments that do not fit."""
    kind = OPS[command.op].args
    try:
        return kind.model_validate_json(json.dumps(command.args))
    except ValidationError as error:
        raise MessageError(first_fault(kind, error)) from error
