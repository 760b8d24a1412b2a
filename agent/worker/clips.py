"""Clip files: MP4, made of a camera's own packets without encoding them again, or encoded from masked pictures.

A clip is written beside its place and takes it when it is whole, so that a file of that name can be played, or is not there.
"""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Optional, Protocol

import av
import numpy as np

from agent.worker.masks import Masks
from models.pictures import decode_picture

MILLISECONDS = Fraction(1, 1000)
RTP_CLOCK = Fraction(1, 90_000)
ENCODERS = (("libx264", {"preset": "veryfast", "crf": "23", "threads": "1"}), ("mpeg4", {"qscale": "5"}))
PART = ".part"


@dataclass(frozen=True)
class Piece:
    """A packet of the camera, or one picture as JPEG. `captured_s` is monotonic; pts and dts count the stream's time base."""

    captured_s: float
    data: bytes
    is_key: bool = True
    pts: int = 0
    dts: int = 0


class Clip(Protocol):
    """A file that is being written. `add` and `finish` raise OSError or FFmpegError; then `abandon` it."""

    def add(self, piece: Piece) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...


class _File:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.stem}.{os.getpid()}{PART}")
        self.container: Any = av.open(str(self._part), "w", format="mp4")

    def place(self) -> None:
        self.container.close()
        # What cannot be opened is no clip: a disk that filled up may have kept the end of it without a word.
        with av.open(str(self._part)) as written:
            if not written.streams.video:
                raise OSError(f"the clip {self._path.name} came out without pictures")
        with self._part.open("rb") as file:
            os.fsync(file.fileno())
        self._part.replace(self._path)

    def drop(self) -> None:
        with contextlib.suppress(av.error.FFmpegError, OSError):
            self.container.close()
        with contextlib.suppress(OSError):
            self._part.unlink()


class Template:
    """What must be known of a stream to write its packets elsewhere; outlives the stream."""

    def __init__(self, stream: Any, time_base: Optional[Fraction] = None) -> None:
        """`time_base`: of the packets that will come, where it is not the stream's."""
        # The codec's parameters are copied into a container that never writes: those of a closed one are gone.
        self._container = av.open(os.devnull, "w", format="mp4")
        self.time_base: Fraction = time_base or stream.time_base
        self._stream = add_stream_like(self._container, stream)

    def stream_in(self, container: Any) -> Any:
        return add_stream_like(container, self._stream)


def template_of_keyframe(codec: str, data: bytes) -> Template:
    """Of a stream that is known by its first keyframe alone, in Annex B form with its parameters, as agent/worker/gstreamer.py gives it.
    Raises FFmpegError or ValueError where that says too little."""
    with av.open(io.BytesIO(data), format=codec) as container:
        if not container.streams.video or not container.streams.video[0].codec_context.width:
            raise ValueError(f"the first keyframe of {len(data)} bytes does not say how large its picture is")
        return Template(container.streams.video[0], RTP_CLOCK)


def add_stream_like(container: Any, stream: Any) -> Any:
    if hasattr(container, "add_stream_from_template"):  # PyAV 14 and later
        return container.add_stream_from_template(stream)
    return container.add_stream(template=stream)


class PacketClip:
    """Copies packets; the first one has to be a keyframe. Raises OSError or FFmpegError."""

    def __init__(self, path: Path, template: Template) -> None:
        self._file = _File(path)
        self._stream = template.stream_in(self._file.container)
        self._time_base = template.time_base
        self._first: Optional[int] = None
        self._last_dts = 0

    def add(self, piece: Piece) -> None:
        if self._first is None:
            self._first, self._last_dts = piece.dts, -1
        packet = av.Packet(piece.data)
        # Cameras repeat and reorder timestamps; a muxer takes only what grows.
        before, self._last_dts = self._last_dts, max(piece.dts - self._first, self._last_dts + 1)
        packet.dts = self._last_dts
        # Of use for the last one alone, whose picture would else be shown for no time, and left out by some players.
        packet.duration = self._last_dts - max(before, 0)
        packet.pts = max(piece.pts - self._first, packet.dts)
        packet.time_base, packet.is_keyframe, packet.stream = self._time_base, piece.is_key, self._stream
        self._file.container.mux(packet)

    def finish(self) -> None:
        self._file.place()

    def abandon(self) -> None:
        self._file.drop()


class PictureClip:
    """Encodes JPEGs, masks painted below black as masks.py has it. Raises OSError or FFmpegError."""

    def __init__(self, path: Path, masks: Masks, fps: float) -> None:
        self._file = _File(path)
        self._masks = masks
        self._fps = fps
        self._stream: Any = None
        self._first_s = 0.0
        self._last_ms = -1

    def add(self, piece: Piece) -> None:
        picture = decode_picture(piece.data)
        height, width = (side - side % 2 for side in picture.shape[:2])
        if self._stream is None:
            self._first_s, self._stream = piece.captured_s, self._opened(width, height)
        if (self._stream.width, self._stream.height) != (width, height):
            return  # a camera that changed its format in mid-event: the clip keeps the one it began with
        even = np.ascontiguousarray(picture[:height, :width])
        planes = av.VideoFrame.from_ndarray(even, format="bgr24").to_ndarray(format="yuv420p")
        frame = av.VideoFrame.from_ndarray(self._masks.apply_yuv420(planes), format="yuv420p")
        self._last_ms = frame.pts = max(round((piece.captured_s - self._first_s) * 1000), self._last_ms + 1)
        frame.time_base = MILLISECONDS
        self._file.container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        if self._stream is not None:
            self._file.container.mux(self._stream.encode(None))
        self._file.place()

    def abandon(self) -> None:
        self._file.drop()

    def _opened(self, width: int, height: int) -> Any:
        name, options = next(each for each in ENCODERS if each[0] in av.codecs_available)
        stream = self._file.container.add_stream(name, rate=max(1, round(self._fps)), options=dict(options))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = MILLISECONDS
        stream.codec_context.gop_size = max(1, round(self._fps)) * 2
        return stream


def remove_halves(folder: Path) -> None:
    """Remove what a worker that was killed left half-written. Raises nothing."""
    with contextlib.suppress(OSError):
        for file in folder.glob(f".*{PART}"):
            if file.suffixes[-2:-1] != [f".{os.getpid()}"]:
                with contextlib.suppress(OSError):
                    file.unlink()
