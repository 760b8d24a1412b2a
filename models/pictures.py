"""Pictures as arrays: decoding within bounds, scaling into a model's input, drawing what was found, encoding.

A picture is uint8 [H,W,3] in OpenCV's channel order BGR, here and everywhere above.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, Iterable, Optional, Protocol, Tuple

import cv2
import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 20 << 20
MAX_PIXELS = 50_000_000
MAX_SIDE = 16384

Picture = NDArray[np.uint8]

# Start-of-frame markers; the others in this range are DHT (C4), JPG (C8) and DAC (CC). ITU-T T.81, table B.1.
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_BARE = frozenset((0x01, *range(0xD0, 0xD9)))

# BGR, all of them light enough for black letters.
COLOURS = (
    (96, 211, 66), (66, 190, 255), (255, 188, 82), (122, 122, 255), (240, 150, 240), (90, 235, 235),
    (220, 220, 90), (110, 165, 255), (190, 240, 160), (255, 160, 170), (160, 200, 215), (80, 225, 170),
)  # fmt: skip
INK = (20, 20, 20)
FONT = cv2.FONT_HERSHEY_DUPLEX


class PictureError(ValueError):
    """These bytes are no picture that is taken here; the message says which limit or form they miss."""


class Boxed(Protocol):
    """Something with a name and a place: pixels from the upper left corner."""

    @property
    def label(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def x0(self) -> float: ...
    @property
    def y0(self) -> float: ...
    @property
    def x1(self) -> float: ...
    @property
    def y1(self) -> float: ...


def decode_picture(data: bytes) -> Picture:
    """Decode a JPEG, PNG or WebP, turned upright as its EXIF orientation says.

    Size and pixel count are held against the limits from the header, before a decoder sees the bytes. Raises PictureError.
    """
    if len(data) > MAX_BYTES:
        raise PictureError(f"the picture has {len(data)} bytes, more than the {MAX_BYTES} taken here; send a smaller one")
    form, width, height = picture_header(data)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise PictureError(f"the {form} is {width}x{height}; at most {MAX_PIXELS} pixels and {MAX_SIDE} a side are taken here")
    try:
        picture: Optional[Any] = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise PictureError(f"the {form} cannot be decoded: {error.err}") from error
    if picture is None:
        raise PictureError(f"the {form} of {len(data)} bytes is damaged: its header says {width}x{height}, but nothing could be decoded")
    return np.asarray(picture, np.uint8)


def picture_header(data: bytes) -> Tuple[str, int, int]:
    """(form, width, height) as the header says, before any turning. Raises PictureError."""
    try:
        if data[:2] == b"\xff\xd8":
            return ("JPEG", *_jpeg_size(data))
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            return ("PNG", *struct.unpack(">II", data[16:24]))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return ("WebP", *_webp_size(data))
    except (IndexError, struct.error) as error:
        raise PictureError(f"the picture ends within its header, after {len(data)} bytes") from error
    raise PictureError(f"{data[:8]!r} begins neither a JPEG nor a PNG nor a WebP; send one of these")


def _jpeg_size(data: bytes) -> Tuple[int, int]:
    position = 2
    while True:
        if data[position] != 0xFF:
            raise PictureError(f"the JPEG is damaged: byte {position} should begin a segment")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in JPEG_BARE:
            position += 2
        elif marker in JPEG_FRAMES:
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return width, height
        elif marker in (0xD9, 0xDA):
            raise PictureError("the JPEG is damaged: its pixels begin before its size is said")
        else:
            position += 2 + struct.unpack(">H", data[position + 2 : position + 4])[0]


def _webp_size(data: bytes) -> Tuple[int, int]:
    # RFC 9649, sections 2.5 to 2.7.
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise PictureError(f"the WebP begins with an unknown chunk {kind!r}")


def encode_jpeg(picture: Picture, quality: int = 80) -> bytes:
    """The picture as a baseline JPEG. Raises PictureError."""
    try:
        done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    except cv2.error as error:
        raise PictureError(f"a picture of shape {picture.shape} cannot be encoded: {error.err}") from error
    if not done:
        raise PictureError(f"a picture of shape {picture.shape} cannot be encoded as JPEG")
    return bytes(data)


def colour_of(label: str) -> Tuple[int, int, int]:
    """The same BGR colour for the same label, always."""
    return COLOURS[zlib.crc32(label.encode()) % len(COLOURS)]


def draw_detections(picture: Picture, detections: Iterable[Boxed]) -> Picture:
    """A copy with a box and `label score` for each detection; lines and letters grow with the picture."""
    drawn: Picture = np.array(picture)
    unit = max(1.0, min(picture.shape[:2]) / 360)
    ranked = sorted(detections, key=lambda each: each.score)
    for found in ranked:
        corner, opposite = (round(found.x0), round(found.y0)), (round(found.x1), round(found.y1))
        # The dark line underneath keeps the box visible on a ground of its own colour.
        cv2.rectangle(drawn, corner, opposite, INK, round(2 * unit) + 2, cv2.LINE_AA)
        cv2.rectangle(drawn, corner, opposite, colour_of(found.label), round(2 * unit), cv2.LINE_AA)
    for found in ranked:
        _caption(drawn, f"{found.label} {found.score:.0%}", round(found.x0), round(found.y0), unit, colour_of(found.label))
    return drawn


def draw_line(
    picture: Picture, start: Tuple[float, float], end: Tuple[float, float], caption: str, colour: Tuple[int, int, int] = (255, 255, 255)
) -> None:
    """Draw a line between two points given in shares of the picture, into the picture, with a caption in the upper left corner."""
    height, width = picture.shape[:2]
    unit = max(1.0, min(height, width) / 360)
    points = [(round(x * (width - 1)), round(y * (height - 1))) for x, y in (start, end)]
    cv2.line(picture, points[0], points[1], INK, round(2 * unit) + 2, cv2.LINE_AA)
    cv2.line(picture, points[0], points[1], colour, round(2 * unit), cv2.LINE_AA)
    if caption:
        _caption(picture, caption, round(4 * unit), 0, unit, colour)


def _caption(picture: Picture, text: str, x: int, bottom: int, unit: float, colour: Tuple[int, int, int]) -> None:
    scale, pad = 0.4 * unit, round(2 * unit)
    (width, height), below = cv2.getTextSize(text, FONT, scale, max(1, round(unit)))
    tall = height + below + 2 * pad
    x = max(0, min(x - round(unit), picture.shape[1] - width - 2 * pad))
    top = bottom - tall if bottom >= tall else max(0, bottom)
    cv2.rectangle(picture, (x, top), (x + width + 2 * pad, top + tall), colour, cv2.FILLED)
    cv2.putText(picture, text, (x + pad, top + pad + height), FONT, scale, INK, max(1, round(unit)), cv2.LINE_AA)
