"""Where pictures come from: a rendered belt, a file, a network camera, a device. Each is opened into an iterator of grabs.

conveyor:?seed=7&fps=15      rendered; `fps`, `seed`, `seconds` (0: endless), `pace=none`
file:/video.mp4?loop=no      `loop=yes|no`, `pace=none`: every frame, as fast as it is taken, then the end
rtsp://user:password@host/…  also rtsps, http, https
v4l2:/dev/video0?fourcc=MJPG&width=1280&height=720&fps=30   as the driver likes where nothing is said
csi:0                        a Jetson's own camera port, through GStreamer; width, height and fps as the pipeline says
"""

from __future__ import annotations

import math
import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, Literal, Optional
from urllib.parse import parse_qsl

from agent.worker.addresses import FORMS, is_source, redacted
from agent.worker.devices import DeviceError, Format, device_pictures

if TYPE_CHECKING:  # the daemon reads sources too, and has no use for OpenCV
    from models.conveyor import Conveyor
    from models.pictures import Picture

OPEN_TIMEOUT_S = 5.0
DRAIN_S = 2.0
BAD_PACKETS = 100
STREAMS = ("rtsp", "rtsps", "http", "https")
OPTIONS = {"conveyor": ("seed", "fps", "seconds", "pace"), "file": ("loop", "pace"), "v4l2": ("fourcc", "width", "height", "fps")}
FOURCC = re.compile(r"^[A-Za-z0-9]{4}$")

Kind = Literal["conveyor", "file", "stream", "device", "csi"]
Decoder = Literal["ffmpeg", "gstreamer"]
Transport = Literal["tcp", "udp"]
Tap = Callable[[Any], None]


class SourceError(RuntimeError):
    """A source could not be opened, or gave up. The message holds no credentials."""


class Silence(SourceError):
    """Nothing came in time, be it that the source hangs or that it is slow."""


@dataclass(frozen=True)
class Grab:
    """A frame that is not decoded to BGR yet: `load` does that, on the thread that wants it.

    at_s      the source's own time of a file or a rendered belt; None: now, the source is live
    decode_s  what decoding it took so far; 0 where a driver or GStreamer does that
    """

    load: Callable[[], Picture]
    at_s: Optional[float] = None
    decode_s: float = 0.0


@dataclass(frozen=True)
class Source:
    """`address` may hold a password; `label` is what may be shown. `seconds` 0: no end."""

    kind: Kind
    address: str
    label: str
    fps: float = 10.0
    is_paced: bool = True
    is_looped: bool = True
    seconds: float = 0.0
    decoder: Decoder = "ffmpeg"
    transport: Transport = "tcp"
    width: int = 0
    height: int = 0
    format: Format = field(default_factory=Format)
    belt: Belt = field(default_factory=lambda: Belt(0, 640, 360), compare=False)

    @property
    def has_packets(self) -> bool:
        """Whether it comes encoded, so that it can be kept as it is."""
        return self.kind in ("file", "stream")

    def words(self, error: object) -> str:
        """What an error says, without the address in it."""
        if self.kind == "stream":
            return redacted(str(error).replace(self.address, self.label))
        return str(error).replace(self.address, self.label) if self.kind == "file" else str(error)

    def truth(self, at_s: float) -> Optional[Dict[str, int]]:
        """Objects that crossed the middle of a rendered picture until `at_s`; None: nobody knows."""
        return self.belt.crossed(at_s) if self.kind == "conveyor" else None


class Belt:
    """A conveyor that is built when its first picture is wanted. For one thread."""

    def __init__(self, seed: int, width: int, height: int) -> None:
        self._arguments = (seed, width, height)
        self._conveyor: Optional[Conveyor] = None

    def frame(self, at_s: float) -> Picture:
        return self._built().frame(at_s)

    def crossed(self, at_s: float) -> Dict[str, int]:
        return self._built().crossed(at_s)

    def _built(self) -> Conveyor:
        if self._conveyor is None:
            from models.conveyor import Conveyor

            self._conveyor = Conveyor(*self._arguments)
        return self._conveyor


def parse_source(text: str, width: int, height: int, fps: float, decoder: Decoder = "ffmpeg", transport: Transport = "tcp") -> Source:
    """Read a source; `width`, `height` and `fps` are for a rendered one and for csi, `decoder` and `transport` for RTSP. Raises ValueError,
    without credentials in it."""
    scheme, _, rest = text.partition(":")
    if scheme not in ("conveyor", "file") and not is_source(text):
        raise ValueError(f"source {redacted(text)!r} is none of {FORMS}")
    _check_rtsp(scheme, text, decoder, transport)
    if scheme in STREAMS:
        return Source("stream", text, redacted(text), fps, decoder=decoder, transport=transport)
    if scheme == "csi":
        return Source("csi", rest, text, fps, width=width, height=height)
    if scheme == "v4l2":
        address, options = _options(scheme, rest)
        return Source("device", address, text, fps, format=_format(text, options))
    address, options = _options(scheme, rest)
    is_paced = _one_of(options, "pace", {"none": False, "real": True}, True)
    if scheme == "file":
        if not address.startswith("/"):
            raise ValueError(f"source {text!r}: give the absolute path of a file, as in file:/srv/belt.mp4")
        return Source("file", address, text, fps, is_paced, _one_of(options, "loop", {"yes": True, "no": False}, is_paced))
    try:
        seed, fps, seconds = int(options.get("seed", "0")), float(options.get("fps", fps)), float(options.get("seconds", "0"))
    except ValueError as error:
        raise ValueError(f"source {text!r}: seed, fps and seconds are numbers: {error}") from error
    if not (0 < fps <= 120 and 0 <= seconds < 1e9) or not (160 <= width <= 3840 and 90 <= height <= 2160):
        raise ValueError(f"source {text!r}: fps must be in 0..120, seconds in 0..1e9, and {width}x{height} in 160x90..3840x2160")
    return Source("conveyor", address, text, fps, is_paced, False, seconds, belt=Belt(seed, width, height))


def _check_rtsp(scheme: str, text: str, decoder: Decoder, transport: Transport) -> None:
    if decoder == "gstreamer" and scheme not in ("rtsp", "rtsps"):
        raise ValueError(f"decoder: GStreamer decodes RTSP here, not {redacted(text)!r}")
    if transport == "udp" and scheme != "rtsp":
        raise ValueError(f"transport: UDP is for rtsp:// here, not {redacted(text)!r}")


def _options(scheme: str, rest: str) -> Any:
    address, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - set(OPTIONS[scheme]))
    if unknown:
        raise ValueError(f"source {scheme}: has no option {unknown[0]!r}; it has {', '.join(OPTIONS[scheme])}")
    return address, options


def _format(text: str, options: Dict[str, str]) -> Format:
    try:
        found = Format(
            options.get("fourcc", ""), int(options.get("width", "0")), int(options.get("height", "0")), float(options.get("fps", "0"))
        )
    except ValueError as error:
        raise ValueError(f"source {text!r}: width, height and fps are numbers: {error}") from error
    if found.fourcc and not FOURCC.match(found.fourcc):
        raise ValueError(f"source {text!r}: fourcc is four letters such as MJPG or YUYV, not {found.fourcc!r}")
    if not (0 <= found.fps <= 240 and 0 <= found.width <= 7680 and 0 <= found.height <= 4320) or (found.width > 0) != (found.height > 0):
        raise ValueError(f"source {text!r}: fps must be in 0..240, and width and height, both or none, up to 7680x4320")
    return found


def _one_of(options: Dict[str, str], name: str, values: Dict[str, bool], otherwise: bool) -> bool:
    if name not in options:
        return otherwise
    if options[name] not in values:
        raise ValueError(f"source option {name}={options[name]!r} is not one of {', '.join(values)}")
    return values[options[name]]


def open_source(source: Source, stop: threading.Event, stall_s: float, tap: Optional[Tap] = None) -> Iterator[Grab]:
    """Open and yield grabs in real time. Ends when the source has an end or `stop` is set; raises SourceError for all other ends.

    tap  gets each packet of an encoded source (`has_packets`), before it is decoded
    """
    return OPENERS[source.kind](source, stop, stall_s, tap)


def _conveyor(source: Source, stop: threading.Event, stall_s: float, tap: Optional[Tap]) -> Iterator[Grab]:
    began_s, number = time.monotonic(), 0
    while not stop.is_set():
        at_s = number / source.fps
        if source.seconds and at_s > source.seconds:
            return
        if source.is_paced and stop.wait(max(0.0, began_s + at_s - time.monotonic())):
            return
        yield Grab(lambda at_s=at_s: source.belt.frame(at_s), at_s)  # type: ignore[misc]  # mypy has no type for a default in a lambda
        number += 1


def _file(source: Source, stop: threading.Event, stall_s: float, tap: Optional[Tap]) -> Iterator[Grab]:
    began_s, offset_s = time.monotonic(), 0.0
    while True:
        last_s = 0.0
        for frame in _decoded(source, stop, {"protocol_whitelist": "file"}, stall_s, tap):
            last_s = frame.time if frame.time is not None else last_s + 1 / source.fps
            at_s = offset_s + last_s
            if source.is_paced and stop.wait(max(0.0, began_s + at_s - time.monotonic())):
                return
            yield Grab(frame.load, at_s, frame.decode_s)
        if not source.is_looped or stop.is_set():
            return
        if last_s <= 0:
            raise SourceError(f"{source.label} holds no more than one frame; nothing to repeat")
        offset_s += last_s + 1 / source.fps


def _stream(source: Source, stop: threading.Event, stall_s: float, tap: Optional[Tap]) -> Iterator[Grab]:
    if source.decoder == "gstreamer":
        yield from _through_gstreamer(source, stop, stall_s, tap)
        return
    options = {
        "rtsp_transport": source.transport,
        "fflags": "nobuffer",
        "flags": "low_delay",
        # A playlist from the network may not name files of this machine.
        "protocol_whitelist": "rtsp,rtsps,rtp,udp,tcp,tls,http,https,httpproxy,crypto",
    }
    opened_s, asked_s, is_drained = time.monotonic(), math.inf, False
    for frame in _decoded(source, stop, options, stall_s, tap):
        now_s = time.monotonic()
        # What waited in buffers while the stream was probed comes at once; the first frame that lets us wait is the present.
        is_drained = is_drained or now_s - asked_s > 0.5 / (frame.rate or 30.0) or now_s - opened_s > OPEN_TIMEOUT_S + DRAIN_S
        if is_drained:
            yield Grab(frame.load, None, frame.decode_s)
        asked_s = time.monotonic()
    if not stop.is_set():
        raise SourceError(f"{source.label} ended the stream")


def _through_gstreamer(source: Source, stop: threading.Event, stall_s: float, tap: Optional[Tap]) -> Iterator[Grab]:
    from agent.worker.gstreamer import GStreamerError, csi_pictures, rtsp_pictures  # only where such a source is used

    try:
        if source.kind == "csi":
            fps = max(1, math.ceil(source.fps))
            pictures = csi_pictures(int(source.address), source.width, source.height, fps, stop, OPEN_TIMEOUT_S, stall_s)
        else:
            pictures = rtsp_pictures(source.address, source.transport, stop, OPEN_TIMEOUT_S, stall_s, tap)
        for picture in pictures:
            yield Grab(lambda picture=picture: picture)  # type: ignore[misc]  # as above
    except GStreamerError as error:
        raise SourceError(f"{source.label}: {source.words(error)}") from error


def _device(source: Source, stop: threading.Event, stall_s: float, tap: Optional[Tap]) -> Iterator[Grab]:
    try:
        for picture in device_pictures(source.address, source.format, stop, OPEN_TIMEOUT_S, stall_s):
            yield Grab(lambda picture=picture: picture)  # type: ignore[misc]  # as above
    except DeviceError as error:
        raise SourceError(str(error)) from error


@dataclass(frozen=True)
class _Decoded:
    load: Callable[[], Picture]
    time: Optional[float]
    rate: Optional[float]
    decode_s: float


def _decoded(source: Source, stop: threading.Event, options: Dict[str, str], stall_s: float, tap: Optional[Tap]) -> Iterator[_Decoded]:
    """Frames of the first video stream, with the deadlines of FFmpeg's interrupt callback around every read."""
    import av  # only where it is used: a worker with rendered or device cameras alone does without

    open_s = max(OPEN_TIMEOUT_S, stall_s)  # a stream is open only once some frames have come
    try:
        with av.open(source.address, options=options, timeout=(open_s, stall_s)) as container:
            if not container.streams.video:
                raise SourceError(f"{source.label} has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"
            rate = float(stream.average_rate) if stream.average_rate else None
            bad, spent_s = 0, 0.0
            for packet in container.demux(stream):
                if tap is not None:
                    tap(packet)
                began_s = time.perf_counter()
                try:
                    frames = packet.decode()
                    bad = 0
                except av.error.InvalidDataError as error:  # one damaged packet is weather, many are a broken camera
                    bad += 1
                    if bad >= BAD_PACKETS:
                        raise SourceError(f"{source.label} sent {bad} damaged packets in a row") from error
                    continue
                finally:
                    spent_s += time.perf_counter() - began_s
                for frame in frames:
                    if stop.is_set():
                        return
                    decode_s, spent_s = spent_s, 0.0
                    yield _Decoded(lambda frame=frame: frame.to_ndarray(format="bgr24"), frame.time, rate, decode_s)  # type: ignore[misc]  # as above
    except av.error.ExitError as error:
        hint = "; does a firewall keep its UDP packets out?" if source.transport == "udp" else ""
        raise Silence(f"{source.label} gave nothing within {open_s:g} s of opening or {stall_s:g} s of a frame{hint}") from error
    except (av.error.FFmpegError, OSError) as error:
        raise SourceError(f"{source.label}: {source.words(error)}") from error


OPENERS: Dict[str, Callable[[Source, threading.Event, float, Optional[Tap]], Iterator[Grab]]] = {
    "conveyor": _conveyor,
    "file": _file,
    "stream": _stream,
    "device": _device,
    "csi": _through_gstreamer,
}
