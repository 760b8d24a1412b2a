"""Frames through GStreamer: CSI cameras, and RTSP decoded by the hardware of a Jetson.

Pipelines are built of elements and values; no text that somebody gave becomes part of a description. Needs the system's `python3-gi` and
GStreamer, as JetPack brings them; nothing of either is imported before such a source is opened.
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

import threading
import time
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import numpy as np

from models.pictures import Picture

SLICE_NS = 200_000_000
TCP = 4
# Where a decoder is, and what turns its frames into BGRx: NVIDIA's first (Accelerated GStreamer guide), then what a PC has.
DECODERS: Dict[str, Tuple[Tuple[str, str], ...]] = {
    "H264": (("nvv4l2decoder", "nvvidconv"), ("avdec_h264", "videoconvert"), ("openh264dec", "videoconvert")),
    "H265": (("nvv4l2decoder", "nvvidconv"), ("avdec_h265", "videoconvert")),
}
PARSERS = {"H264": ("rtph264depay", "h264parse"), "H265": ("rtph265depay", "h265parse")}

Chain = List[Tuple[str, Mapping[str, Any]]]


class GStreamerError(RuntimeError):
    """GStreamer, or a plugin of it, is not there, or gave up; the message may hold an address with a password."""


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


def rtsp_pictures(address: str, stop: threading.Event, open_s: float, stall_s: float) -> Iterator[Picture]:
    """Pictures of an RTSP stream in H.264 or H.265, over TCP, decoded by the first decoder that is there. Raises GStreamerError."""
    gst = _gst()
    pipeline = gst.Pipeline.new(None)
    source = _made(gst, "rtspsrc", {"location": address, "protocols": TCP, "latency": 0, "drop-on-latency": True})
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
            _join(gst, pipeline, pad, str(name), head)
        except GStreamerError as error:
            problems.append(str(error))

    source.connect("pad-added", join)
    return _pulled(gst, pipeline, sink, stop, open_s, stall_s, problems)


def _join(gst: Any, pipeline: Any, pad: Any, name: str, head: Any) -> None:
    if name not in DECODERS:
        raise GStreamerError(f"the stream is {name}; through GStreamer {' and '.join(DECODERS)} are taken")
    found = [each for each in DECODERS[name] if all(gst.ElementFactory.find(factory) for factory in each)]
    if not found:
        raise GStreamerError(f"GStreamer has no decoder for {name}; one of {', '.join(each[0] for each in DECODERS[name])} is needed")
    elements = [_made(gst, factory, {}) for factory in (*PARSERS[name], *found[0])]
    for element in elements:
        pipeline.add(element)
    for before, after in zip(elements, elements[1:] + [head]):
        if not before.link(after):
            raise GStreamerError(f"GStreamer cannot join {before.get_name()} to {after.get_name()}")
    for element in reversed(elements):
        element.sync_state_with_parent()
    pad.link(elements[0].get_static_pad("sink"))


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
    for before, after in zip(elements, elements[1:]):
        if not before.link(after):
            raise GStreamerError(f"GStreamer cannot join {before.get_name()} to {after.get_name()}")
    return elements[-1]


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
