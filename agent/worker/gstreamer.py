"""Frames through GStreamer: CSI cameras, and RTSP decoded by the hardware of a Jetson.

Pipelines are built of elements and values; no text that somebody gave becomes part of a description. Needs the system's `python3-gi` and
GStreamer, as JetPack brings them; nothing of either is imported before such a source is opened.
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from models.pictures import Picture

SLICE_NS = 200_000_000
PROTOCOLS = {"udp": 1, "tcp": 4}
# Where a decoder is, and what turns its frames into BGRx: NVIDIA's first (Accelerated GStreamer guide), then what a PC has.
DECODERS: Dict[str, Tuple[Tuple[str, str], ...]] = {
    "H264": (("nvv4l2decoder", "nvvidconv"), ("avdec_h264", "videoconvert"), ("openh264dec", "videoconvert")),
    "H265": (("nvv4l2decoder", "nvvidconv"), ("avdec_h265", "videoconvert")),
}
PARSERS = {"H264": ("rtph264depay", "h264parse"), "H265": ("rtph265depay", "h265parse")}
# What is kept of a stream, by the names of FFmpeg: whole pictures, start codes between their parts, parameters before each keyframe.
ENCODED = {"H264": ("h264", "video/x-h264"), "H265": ("hevc", "video/x-h265")}
KEPT = "stream-format=byte-stream,alignment=au"
PARAMETERS_WITH_EACH_KEY = -1

Chain = List[Tuple[str, Mapping[str, Any]]]


class GStreamerError(RuntimeError):
    """GStreamer, or a plugin of it, is not there, or gave up; the message may hold an address with a password."""


@dataclass(frozen=True)
class EncodedStream:
    """One connection's video stream, `codec` by FFmpeg's name. Streams are told apart by identity."""

    codec: str


@dataclass(frozen=True)
class EncodedPicture:
    """One picture of a stream as it came, in Annex B form; a keyframe begins with the stream's parameters. pts and dts count 1/90000 s."""

    stream: EncodedStream
    data: bytes
    is_keyframe: bool
    pts: Optional[int]
    dts: Optional[int]

    @property
    def size(self) -> int:
        return len(self.data)

    def __bytes__(self) -> bytes:
        return self.data


Tap = Callable[[EncodedPicture], None]


def csi_pictures(sensor: int, width: int, height: int, fps: int, stop: threading.Event, open_s: float, stall_s: float) -> Iterator[Picture]:
    """Pictures of a camera on the board's own port. Raises GStreamerError."""
    gst = _gst()
    chain: Chain = [
        ("nvarguscamerasrc", {"sensor-id": sensor}),
        ("capsfilter", {"caps": f"video/x-raw(memory:NVMM),format=NV12,width={width:d},height={height:d},framerate={fps:d}/1"}),
        ("nvvidconv", {}),
    ]
    pipeline = gst.Pipeline.new(None)
    sink = _linked(gst, pipeline, chain + _sink_chain())
    return _pulled(gst, pipeline, sink, stop, open_s, stall_s)


def rtsp_pictures(
    address: str, transport: str, stop: threading.Event, open_s: float, stall_s: float, tap: Optional[Tap] = None
) -> Iterator[Picture]:
    """Pictures of an RTSP stream in H.264 or H.265, over `tcp` or `udp`, decoded by the first decoder that is there. `tap` gets each
    before it is decoded, on a thread of GStreamer's. Raises GStreamerError."""
    gst = _gst()
    pipeline = gst.Pipeline.new(None)
    source = _made(gst, "rtspsrc", {"location": address, "protocols": PROTOCOLS[transport], "latency": 0, "drop-on-latency": True})
    pipeline.add(source)
    # The sink has to be there before it is known what the stream holds; what lies between follows when it is.
    sink = _linked(gst, pipeline, _sink_chain())
    head = pipeline.get_by_name("head")
    problems: List[str] = []

    def join(_: Any, pad: Any) -> None:
        caps = pad.get_current_caps() or pad.query_caps(None)
        facts = caps.get_structure(0)
        name = facts.get_string("encoding-name")
        if facts.get_string("media") != "video" or head.get_static_pad("sink").is_linked():
            return
        try:
            _join(gst, pipeline, pad, str(name), head, tap)
        except GStreamerError as error:
            problems.append(str(error))

    source.connect("pad-added", join)
    return _pulled(gst, pipeline, sink, stop, open_s, stall_s, problems)


def _join(gst: Any, pipeline: Any, pad: Any, name: str, head: Any, tap: Optional[Tap]) -> None:
    if name not in DECODERS:
        raise GStreamerError(f"the stream is {name}; through GStreamer {' and '.join(DECODERS)} are taken")
    found = [each for each in DECODERS[name] if all(gst.ElementFactory.find(factory) for factory in each)]
    if not found:
        raise GStreamerError(f"GStreamer has no decoder for {name}; one of {', '.join(each[0] for each in DECODERS[name])} is needed")
    elements = [_made(gst, factory, {}) for factory in (*PARSERS[name], "tee", *found[0])]
    tee = elements[2]
    for element in elements:
        pipeline.add(element)
    _link(elements + [head])
    if tap is not None:
        elements += _kept(gst, pipeline, tee, name, tap)
    for element in reversed(elements):
        element.sync_state_with_parent()
    pad.link(elements[0].get_static_pad("sink"))


def _kept(gst: Any, pipeline: Any, tee: Any, name: str, tap: Tap) -> List[Any]:
    """The branch that hands on what comes encoded. It never waits: what it is given is taken within the call."""
    codec, kind = ENCODED[name]
    stream = EncodedStream(codec)
    branch = [_made(gst, factory, values) for factory, values in _kept_chain(kind)]
    for element in branch:
        pipeline.add(element)
    _link([tee, *branch])

    def take(sink: Any) -> Any:
        sample = sink.emit("pull-sample")
        if sample is not None:
            buffer = sample.get_buffer()
            is_key = not buffer.has_flags(gst.BufferFlags.DELTA_UNIT)
            data = bytes(buffer.extract_dup(0, buffer.get_size()))
            tap(EncodedPicture(stream, data, is_key, _ticks(gst, buffer.pts), _ticks(gst, buffer.dts)))
        return gst.FlowReturn.OK

    branch[-1].connect("new-sample", take)
    return branch


def _kept_chain(kind: str) -> Chain:
    return [
        # The decoder may want the other form: this parser makes ours of what it gets.
        ("h264parse" if kind == ENCODED["H264"][1] else "h265parse", {"config-interval": PARAMETERS_WITH_EACH_KEY}),
        ("capsfilter", {"caps": f"{kind},{KEPT}"}),
        ("appsink", {"emit-signals": True, "sync": False, "async": False}),
    ]


def _ticks(gst: Any, time_ns: int) -> Optional[int]:
    return None if time_ns == gst.CLOCK_TIME_NONE else time_ns * 9 // 100_000


def _sink_chain() -> Chain:
    return [
        ("capsfilter", {"name": "head", "caps": "video/x-raw,format=BGRx"}),
        # One frame waits at most, and the newest replaces it: the camera's thread is there to take it.
        ("appsink", {"max-buffers": 1, "drop": True, "sync": False}),
    ]


def _pulled(
    gst: Any, pipeline: Any, sink: Any, stop: threading.Event, open_s: float, stall_s: float, problems: Optional[List[str]] = None
) -> Iterator[Picture]:
    bus = pipeline.get_bus()
    try:
        pipeline.set_state(gst.State.PLAYING)
        last_s, patience_s = time.monotonic(), open_s
        while not stop.is_set():
            sample = sink.emit("try-pull-sample", SLICE_NS)
            if sample is not None:
                yield _picture(gst, sample)
                last_s, patience_s = time.monotonic(), stall_s
                continue
            _check(gst, bus, problems or [])
            if time.monotonic() - last_s > patience_s:
                raise GStreamerError(f"no frame within {patience_s:g} s")
    finally:
        pipeline.set_state(gst.State.NULL)


def _check(gst: Any, bus: Any, problems: List[str]) -> None:
    if problems:
        raise GStreamerError(problems[0])
    message = bus.pop_filtered(gst.MessageType.ERROR | gst.MessageType.EOS)
    if message is None:
        return
    if message.type == gst.MessageType.EOS:
        raise GStreamerError("the stream ended")
    error, _ = message.parse_error()
    raise GStreamerError(str(error.message))


def _picture(gst: Any, sample: Any) -> Picture:
    facts = sample.get_caps().get_structure(0)
    width, height = facts.get_value("width"), facts.get_value("height")
    buffer = sample.get_buffer()
    done, mapped = buffer.map(gst.MapFlags.READ)
    if not done:
        raise GStreamerError("a frame could not be read")
    try:
        rows = np.frombuffer(mapped.data, np.uint8).reshape(height, -1)
        return np.ascontiguousarray(rows[:, : width * 4].reshape(height, width, 4)[:, :, :3])
    finally:
        buffer.unmap(mapped)


def _linked(gst: Any, pipeline: Any, chain: Chain) -> Any:
    """The last element of a chain that was made, added and linked."""
    elements = [_made(gst, factory, values) for factory, values in chain]
    for element in elements:
        pipeline.add(element)
    _link(elements)
    return elements[-1]


def _link(elements: Sequence[Any]) -> None:
    for before, after in zip(elements, elements[1:]):
        if not before.link(after):
            raise GStreamerError(f"GStreamer cannot join {before.get_name()} to {after.get_name()}")


def _made(gst: Any, factory: str, values: Mapping[str, Any]) -> Any:
    element = gst.ElementFactory.make(factory, values.get("name"))
    if element is None:
        raise GStreamerError(f"GStreamer has no element {factory}; on a Jetson it comes with JetPack (gst-inspect-1.0 {factory})")
    for name, value in values.items():
        if name != "name":
            element.set_property(name, gst.Caps.from_string(value) if name == "caps" else value)
    return element


def _gst() -> Any:
    try:
        import gi

        gi.require_version("Gst", "1.0")
        from gi.repository import Gst
    except (ImportError, ValueError) as error:
        raise GStreamerError(f"GStreamer cannot be used from this Python: {error}; install python3-gi and gir1.2-gstreamer-1.0") from error
    Gst.init(None)
    return Gst
