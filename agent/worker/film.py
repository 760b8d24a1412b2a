"""Films in files: frames in, upright and with their times, and annotated ones out."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Iterator, NamedTuple, Optional, Type

import av
import numpy as np

from models.pictures import MAX_PIXELS, MAX_SIDE, Picture

# H.264 plays everywhere; where FFmpeg was built without an encoder of it, its own MPEG-4.
ENCODERS = ("libx264", "libopenh264", "mpeg4")
CLOCK = 90_000
DAMAGED = 100
WHOLE = 0.9  # of the frames that a film says it has: edit lists leave some out


class FilmError(ValueError):
    """A file is no film that is taken here, or cannot be written; the message says what it misses."""


class FilmFrame(NamedTuple):
    """`number` from 0 among all frames of the film, `at_s` from its beginning."""

    number: int
    at_s: float
    picture: Picture


class Film:
    """A film that is open for reading; iterate once. Of `every` frames the first is given, and at most `fps` in a second of the film."""

    def __init__(self, path: Path, every: int = 1, fps: Optional[float] = None) -> None:
        """Raises FilmError."""
        self._path = path
        self._every = every
        self._period_s = 1 / fps if fps else 0.0
        try:
            # Playlists could name addresses to fetch from.
            self._container = av.open(str(path), options={"protocol_whitelist": "file", "format_whitelist": "mov,matroska,webm,avi,mpegts"})
        except (av.error.FFmpegError, ValueError, IndexError) as error:
            raise FilmError(f"it is neither MP4, MOV, Matroska, WebM, AVI nor MPEG-TS, or damaged: {_words(error)}") from error
        if not self._container.streams.video:
            self._container.close()
            raise FilmError("it has no pictures in it, only sound or text")
        self._stream = self._container.streams.video[0]
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
            self._container.close()
            raise FilmError(f"its frames are {width}x{height}; at most {MAX_PIXELS} pixels and {MAX_SIDE} a side are taken here")
        self._stream.thread_type = "AUTO"
        self.fps = float(self._stream.average_rate or 0)
        seconds = float((self._container.duration or 0) / av.time_base)
        self.frames = int(self._stream.frames or round(seconds * self.fps))

    def __enter__(self) -> Film:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[FilmFrame]:
        """Raises FilmError when the file breaks off or most of it is damaged."""
        due_s, first_s = 0.0, None
        for number, frame in enumerate(self._decoded()):
            at_s = frame.time if frame.time is not None else number / (self.fps or 25.0)
            first_s = at_s if first_s is None else first_s
            at_s -= first_s
            # Half a millisecond: times are rounded in the file.
            if number % self._every or at_s < due_s - 0.0005:
                continue
            due_s = max(due_s, at_s - self._period_s) + self._period_s
            yield FilmFrame(number, at_s, _upright(frame))

    def _decoded(self) -> Iterator[Any]:
        damaged, seen = 0, 0
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
                frames = packet.decode()
            except StopIteration:
                break
            except av.error.EOFError:
                break
            except av.error.InvalidDataError as error:
                damaged += 1
                if damaged >= DAMAGED:
                    raise FilmError(f"{damaged} pieces of it are damaged: {_words(error)}") from error
                continue
            except av.error.FFmpegError as error:
                raise FilmError(f"it broke off after {seen} frames: {_words(error)}") from error
            for frame in frames:
                seen += 1
                yield frame
        if seen == 0:
            raise FilmError("not one frame of it could be decoded")
        if seen < WHOLE * self.frames:
            raise FilmError(f"it breaks off after {seen} of {self.frames} frames")


class FilmWriter:
    """A film in the making, of frames that come with their times; under its own name only once it is closed.

    Interrupted, or of a film that breaks off, it is whole as far as it goes; any other error removes it.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial{path.suffix}")
        self._rate = Fraction(fps if 0 < fps <= 240 else 25).limit_denominator(1001)
        self._container: Any = None
        self._stream: Any = None
        self._last = -1

    def __enter__(self) -> FilmWriter:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]) -> None:
        if self._container is None:
            return
        try:
            if kind is None or issubclass(kind, (KeyboardInterrupt, FilmError)):
                self._container.mux(self._stream.encode(None))
                self._container.close()
                self._partial.replace(self.path)
        finally:
            self._container.close()
            self._partial.unlink() if self._partial.exists() else None

    def write(self, picture: Picture, at_s: float) -> None:
        """Raises FilmError."""
        # Encoders halve the colours' resolution: sides are even.
        height, width = (side - side % 2 for side in picture.shape[:2])
        try:
            if self._container is None:
                self._open(width, height)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="bgr24")
            self._last = frame.pts = max(self._last + 1, round(at_s * CLOCK))
            frame.time_base = Fraction(1, CLOCK)
            self._container.mux(self._stream.encode(frame))
        except (av.error.FFmpegError, ValueError) as error:
            raise FilmError(f"{self.path} cannot be written: {_words(error)}") from error

    def _open(self, width: int, height: int) -> None:
        if width < 2 or height < 2:
            raise FilmError(f"a film of {width}x{height} cannot be written")
        encoder = next((name for name in ENCODERS if name in av.codecs_available), None)
        if encoder is None:
            raise FilmError(f"this FFmpeg has none of the encoders {', '.join(ENCODERS)}; install PyAV's own wheel")
        self._container = av.open(str(self._partial), "w")
        self._stream = self._container.add_stream(encoder, rate=self._rate)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, CLOCK)
        if encoder == "libx264":
            self._stream.options = {"preset": "veryfast", "crf": "23"}
        else:
            self._stream.bit_rate = 4_000_000


def _upright(frame: Any) -> Picture:
    picture = frame.to_ndarray(format="bgr24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else np.asarray(picture, np.uint8)


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
