"""What somebody may order of a camera, checked before anything is written down: shapes, ranges, names.

Fields are those of PipelineSettings in agent/worker/settings.py, whose own check is the second half of this one: what passes here the
worker takes, unless it has no such model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from agent.worker.addresses import FORMS, HIDDEN, is_source, redacted
from agent.worker.settings import PipelineSettings
from models.record import RecordError, from_mapping

CAMERA_ID = r"^[a-z0-9][a-z0-9_-]{0,62}$"
SETTINGS_BYTES_MAX = 64 << 10
RESERVED = ("id", "media")
MIN_AREA = 1e-4
# How the worker names what it refuses: `pipeline door: zones[1].points: …`, `PipelineSettings.motion: unknown field 'speed'; …`
WORKERS_FIELD = re.compile(r"^(?:pipeline [^:]+: |PipelineSettings\.)(?P<path>[a-z_]+[\w.\[\]]*)")
UNKNOWN_FIELD = re.compile(r"^[\w.\[\]]+: (?:unknown field|field) '(?P<name>\w+)'")


class SettingsRefused(ValueError):
    """`field` as the sender wrote it, such as `zones[1].points[0]`; the message names it too."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


Share = Annotated[float, Field(ge=0, le=1)]
Point = tuple[Share, Share]
ShapeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}$")]
Label = Annotated[str, Field(min_length=1, max_length=64)]
Labels = Annotated[tuple[Label, ...], Field(max_length=100)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


def _area(points: tuple[Point, ...]) -> tuple[Point, ...]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if (max(xs) - min(xs)) * (max(ys) - min(ys)) < MIN_AREA:
        raise ValueError("the polygon covers no area; give points that span one")
    return points


Polygon = Annotated[tuple[Point, ...], Field(min_length=3, max_length=32), AfterValidator(_area)]


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=False, allow_inf_nan=False)


class ZoneSettings(_Shape):
    name: ShapeName
    points: Polygon
    labels: Labels = ()
    inertia_frames: Annotated[int, Field(ge=1, le=100)] = 3
    loitering_s: Seconds | dict[Label, Seconds] | None = None


class MaskSettings(_Shape):
    name: ShapeName
    points: Polygon


class LineSettings(_Shape):
    name: ShapeName = "line"
    start: Point = (0.5, 0.0)
    end: Point = (0.5, 1.0)
    anchor: Literal["centre", "foot"] = "centre"
    margin: Annotated[float, Field(ge=0, lt=0.5)] = 0.01
    counts: Literal["once", "every"] = "once"


class RecordSettings(_Shape):
    enabled: bool = False
    pre_s: Annotated[float, Field(ge=0, le=60)] = 5.0
    post_s: Annotated[float, Field(ge=0, le=300)] = 5.0
    max_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    labels: Labels = ()


def _source(value: str) -> str:
    if not is_source(value):
        raise ValueError(f"a source is one of {FORMS}")
    if HIDDEN in value:
        raise ValueError(f"{HIDDEN} stands where something was hidden, and the rest is not what is known; give the whole address")
    return value


class CameraOrder(_Shape):
    source: Annotated[str, Field(max_length=1000), AfterValidator(_source)]
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    fps: Annotated[float, Field(gt=0, le=120)] = 10.0
    floor_fps: Annotated[float, Field(ge=0, le=120)] = 1.0
    mode: Literal["auto", "freshest", "every_frame"] = "auto"
    enabled: bool = True
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    thresholds: Annotated[dict[Label, Annotated[float, Field(gt=0, lt=1)]], Field(max_length=100)] = Field(default_factory=dict)
    min_area: Annotated[float, Field(ge=0, lt=1)] = 0.0
    keep_days: Annotated[float, Field(gt=0, le=3650)] | None = None
    alert_failures: Annotated[int, Field(ge=0, le=1000)] = 5
    labels: Labels = ()
    line: LineSettings | None = None
    lines: Annotated[tuple[LineSettings, ...], Field(max_length=32)] = ()
    zones: Annotated[tuple[ZoneSettings, ...], Field(max_length=32)] = ()
    masks: Annotated[tuple[MaskSettings, ...], Field(max_length=32)] = ()
    record: RecordSettings | None = None
    width: Annotated[int, Field(ge=16, le=7680)] = 640
    height: Annotated[int, Field(ge=16, le=4320)] = 360


def checked(camera: str, settings: Mapping[str, Any]) -> dict[str, JsonValue]:
    """The settings as they are kept: plain JSON, only what was given. Raises SettingsRefused for the first field at fault."""
    for name in RESERVED:
        if name in settings and settings[name] != camera:
            raise SettingsRefused(name, f"{name}: it is this node's to give; leave it out")
    try:
        order = CameraOrder.model_validate({name: value for name, value in settings.items() if name not in RESERVED})
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = _path(fault["loc"])
        raise SettingsRefused(field, f"{field}: {fault['msg'].removeprefix('Value error, ')}"[:500]) from error
    for field in ("lines", "zones", "masks"):
        _check_names(field, [shape.name for shape in getattr(order, field)])
    try:
        kept: dict[str, JsonValue] = order.model_dump(mode="json", exclude_unset=True)
        size_bytes = len(json.dumps(kept, allow_nan=False, ensure_ascii=False).encode())
    except (ValueError, RecursionError) as error:  # in a field that is not known here
        raise SettingsRefused("settings", f"settings: they cannot be kept: {error}") from error
    if size_bytes > SETTINGS_BYTES_MAX:
        raise SettingsRefused("settings", f"settings: more than the {SETTINGS_BYTES_MAX} bytes that a camera may have")
    try:
        from_mapping(PipelineSettings, {**kept, "id": camera}).check()
    except RecordError as error:
        field = workers_field(str(error)) or "settings"
        message = re.sub(r"^PipelineSettings(?:\.|: )", "", str(error)).removeprefix(f"pipeline {camera}: ")
        raise SettingsRefused(field, (message if message.startswith(field) else f"{field}: {message}")[:500]) from error
    return {**kept, "id": camera}


def workers_field(message: str) -> str | None:
    """The field that a refusal of the worker names, as its sender wrote it."""
    path, name = WORKERS_FIELD.match(message), UNKNOWN_FIELD.search(message)
    return ".".join(found for found in (path and path["path"], name and name["name"]) if found) or None


def merged(before: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """`before` changed as RFC 7396 (JSON Merge Patch) says: null removes a field, objects are merged, all else is replaced."""
    result = dict(before)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, Mapping):
            earlier = result.get(name)
            result[name] = merged(earlier if isinstance(earlier, Mapping) else {}, value)
        else:
            result[name] = value
    return result


def with_credentials(settings: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were read from this node and come back: the source's password is hidden in them, and means the one that is known."""
    source, known = settings.get("source"), before.get("source")
    if isinstance(source, str) and HIDDEN in source and isinstance(known, str) and redacted(known) == source:
        return {**settings, "source": known}
    return dict(settings)


def _check_names(field: str, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise SettingsRefused(f"{field}[{index}].name", f"{field}[{index}].name: the name {name!r} is given twice")


def _path(parts: Sequence[str | int]) -> str:
    """pydantic puts the branches of a union into the path, which nobody wrote."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[a-z_]+", part) and part not in ("float", "constrained-str", "dict"):
            path += f".{part}" if path else part
    return path or "settings"
