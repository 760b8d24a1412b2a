"""What a camera pipeline is told to do: records that are checked whole, before anything changes.

Every refusal is a RecordError that names the field, as in `pipeline door: zones[1].points[0]: [1.2, 0.5] is not within 0..1`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Literal, Optional, Sequence, Tuple

from agent.worker.areas import DAY_S, Mask, Zone, check_zone
from agent.worker.lines import Line
from agent.worker.polygons import check_name, check_point, check_polygon
from agent.worker.sources import Decoder, Source, Transport, parse_source
from models.record import RecordError

MAX_SHAPES = 32
LEAST_STALE_S, MOST_STALE_S = 0.05, 60.0
MAX_DAYS = 3650
MAX_FAILURES = 1000


@dataclass(frozen=True)
class Recording:
    """Clips of events: `pre_s` before and `post_s` after, at most `max_s` in all. `labels` whose events are recorded; empty: all."""

    enabled: bool = False
    pre_s: float = 5.0
    post_s: float = 5.0
    max_s: float = 60.0
    labels: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Motion:
    """Look only at frames in which something moves: at least `min_share` of the picture; and at one every `forced_s` anyway."""

    enabled: bool = False
    min_share: float = 0.002
    forced_s: float = 10.0


@dataclass(frozen=True)
class PipelineSettings:
    """What a camera pipeline does. All but `source`, `decoder`, `transport`, `mode`, `width` and `height` change while it runs.

    source     `conveyor:`, `file:/path`, `rtsp://…`, `rtsps://…`, `http(s)://…`, `v4l2:/dev/video0`, `csi:0`;
               options follow a `?`, see agent/worker/sources.py
    fps        frames looked at per second, at most
    floor_fps  what is left of that while the device is busy with requests; never more than `fps`
    mode       `freshest`: what is not looked at in time is dropped; `every_frame`: the source waits; `auto`: as the source asks
    enabled    False: the camera is closed and nothing is seen, until it is True again
    stale_s    how old a frame may be when the detector begins with it; older ones are dropped and counted
    threshold  score from which something counts as seen; None: the model's own. `thresholds`: of some labels, another
    min_area   share of the picture below which something is too small to count
    labels     what to report and count; empty: everything
    line, lines  where to count; `line` is one more of `lines`
    zones      where to notice who comes, stays and goes
    masks      what nobody may see
    record     clips of events
    media      folder for clips, given by the daemon; empty: no clips
    motion     whether to look only when something moves
    keep_days  how long the daemon keeps its events; None: as all others
    alert_failures  after so many failed connections in a row an event says so, once; 0: never
    decoder    of RTSP: `ffmpeg`, or `gstreamer`, which uses a Jetson's hardware
    transport  of RTSP: `tcp`, or `udp` for cameras that can only do that: what is lost on the way is then missing in the picture
    width, height  size of a rendered source, and of csi
    """

    id: str
    source: str
    model: str
    fps: float = 10.0
    floor_fps: float = 1.0
    mode: Literal["auto", "freshest", "every_frame"] = "auto"
    stale_s: float = 0.5
    enabled: bool = True
    threshold: Optional[float] = None
    thresholds: Dict[str, float] = field(default_factory=dict)
    min_area: float = 0.0
    labels: Tuple[str, ...] = ()
    line: Optional[Line] = None
    lines: Tuple[Line, ...] = ()
    zones: Tuple[Zone, ...] = ()
    masks: Tuple[Mask, ...] = ()
    record: Recording = Recording()
    media: str = ""
    motion: Motion = Motion()
    decoder: Decoder = "ffmpeg"
    transport: Transport = "tcp"
    width: int = 640
    height: int = 360
    keep_days: Optional[float] = None
    alert_failures: int = 5

    @property
    def all_lines(self) -> Tuple[Line, ...]:
        return (() if self.line is None else (self.line,)) + self.lines

    @property
    def is_patient(self) -> Optional[bool]:
        """Whether the source waits for every frame to be looked at; None: as the source says itself."""
        return {"auto": None, "freshest": False, "every_frame": True}[self.mode]

    def parsed_source(self) -> Source:
        """Raises ValueError, without credentials in it."""
        return parse_source(self.source, self.width, self.height, self.fps, self.decoder, self.transport)

    def has_source_of(self, other: PipelineSettings) -> bool:
        """Whether a camera that is open for the other settings serves these as well."""
        # A rendered source is rendered at the rate that is looked at, unless it names its own.
        is_rendered = self.source.startswith("conveyor:") and "fps=" not in self.source
        ours, theirs = ((each.source, each.width, each.height, each.mode, each.decoder, each.transport) for each in (self, other))
        return ours == theirs and (self.fps == other.fps or not is_rendered)

    def check(self) -> None:
        """Raises RecordError where a value cannot be used; the message names the pipeline and the field."""
        try:
            self._check_rates()
            source = self.parsed_source()
            if self.mode == "every_frame" and source.kind in ("stream", "device", "csi"):
                raise ValueError(
                    f"mode: a live source does not wait, so `every_frame` is for files and rendered sources, not {source.label}"
                )
            _check_names("lines", self.all_lines)
            for name, line in _named(self):
                check_line(line, name)
            _check_names("zones", self.zones)
            for index, zone in enumerate(self.zones):
                check_zone(zone, f"zones[{index}]")
            _check_names("masks", self.masks)
            for index, mask in enumerate(self.masks):
                check_name(mask.name, f"masks[{index}].name")
                check_polygon(mask.points, f"masks[{index}].points")
            self._check_recording()
        except ValueError as error:
            raise RecordError(f"pipeline {self.id}: {error}") from error

    def _check_rates(self) -> None:
        if not 0 < self.fps <= 120:
            raise ValueError(f"fps {self.fps} is not in 0..120")
        if not 0 <= self.floor_fps <= 120:
            raise ValueError(f"floor_fps {self.floor_fps} is not in 0..120")
        self._check_limits()
        if not 0 < self.motion.min_share < 1:
            raise ValueError(f"motion.min_share {self.motion.min_share} is not between 0 and 1")
        if not 0 < self.motion.forced_s <= DAY_S:
            raise ValueError(f"motion.forced_s {self.motion.forced_s} is not in 0..{DAY_S:.0f}")

    def _check_limits(self) -> None:
        if not LEAST_STALE_S <= self.stale_s <= MOST_STALE_S:
            raise ValueError(f"stale_s {self.stale_s} is not in {LEAST_STALE_S}..{MOST_STALE_S:.0f}")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold {self.threshold} is not between 0 and 1")
        for label, score in self.thresholds.items():
            if not 0 < score < 1:
                raise ValueError(f"thresholds.{label}: {score} is not between 0 and 1")
        if not 0 <= self.min_area < 1:
            raise ValueError(f"min_area {self.min_area} is not in 0..1; it is a share of the picture")
        if self.keep_days is not None and not 0 < self.keep_days <= MAX_DAYS:
            raise ValueError(f"keep_days {self.keep_days} is not in 0..{MAX_DAYS}")
        if not 0 <= self.alert_failures <= MAX_FAILURES:
            raise ValueError(f"alert_failures {self.alert_failures} is not in 0..{MAX_FAILURES}")

    def _check_recording(self) -> None:
        record = self.record
        for name, value, limit in (("pre_s", record.pre_s, 60.0), ("post_s", record.post_s, 300.0), ("max_s", record.max_s, 3600.0)):
            if not 0 <= value <= limit:
                raise ValueError(f"record.{name} {value} is not in 0..{limit:.0f}")
        if record.max_s < record.pre_s + record.post_s:
            raise ValueError(f"record.max_s {record.max_s} is less than pre_s and post_s together, {record.pre_s + record.post_s}")
        if self.media and not self.media.startswith("/"):
            raise ValueError(f"media {self.media!r} is not an absolute path")


def check_line(line: Line, where: str) -> None:
    check_name(line.name, f"{where}.name")
    check_point(line.start, f"{where}.start")
    check_point(line.end, f"{where}.end")
    if line.start == line.end:
        raise ValueError(f"{where}.end: the line from {line.start} to {line.end} has no length; give two different points")
    if not 0 <= line.margin < 0.5:
        raise ValueError(f"{where}.margin: {line.margin} is not in 0..0.5")


def _named(settings: PipelineSettings) -> Sequence[Tuple[str, Line]]:
    one = [("line", settings.line)] if settings.line is not None else []
    return one + [(f"lines[{index}]", line) for index, line in enumerate(settings.lines)]


def _check_names(field: str, shapes: Sequence[Any]) -> None:
    names = [shape.name for shape in shapes]
    if len(names) > MAX_SHAPES:
        raise ValueError(f"{field}: {len(names)} are more than the {MAX_SHAPES} taken here")
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"{field}: the name {name!r} is given twice")
