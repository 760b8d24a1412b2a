"""Pictures as arrays: decoding within bounds, scaling into a model's input, drawing what was found, encoding.

A picture is uint8 [H,W,3] in OpenCV's channel order BGR, here and everywhere above.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any, Iterable, List, Optional, Protocol, Sequence, Tuple

import cv2
import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 20 << 20
MAX_PIXELS = 50_000_000
MAX_SIDE = 16384
MAX_SCANS = 100  # encoders make some ten; each costs a pass over the whole picture, however few bytes it has

Picture = NDArray[np.uint8]
Rectangle = Tuple[int, int, int, int]  # left, top, width, height

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


# What is damaged is said once, by us.
if hasattr(cv2, "setLogLevel"):
    cv2.setLogLevel(2)


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
    """Decode a JPEG, PNG or WebP, turned upright as its EXIF orientation says; grey, CMYK and 16 bits become BGR, what is transparent is
    as opaque as the rest, of an animation the first picture counts.

    Size and pixel count are held against the limits from the header, before a decoder sees the bytes. Raises PictureError.
    """
    if len(data) > MAX_BYTES:
        raise PictureError(f"the picture has {len(data)} bytes, more than the {MAX_BYTES} taken here; send a smaller one")
    form, width, height = picture_header(data)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise PictureError(f"the {form} is {width}x{height}; at most {MAX_PIXELS} pixels and {MAX_SIDE} a side are taken here")
    if form == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise PictureError(
            f"the JPEG has {data.count(bytes((0xFF, 0xDA)))} scans, more than the {MAX_SCANS} taken here; save it as baseline"
        )
    try:
        picture: Optional[Any] = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise PictureError(f"the {form} cannot be decoded: {error.err}") from error
    if picture is None:
        raise PictureError(f"the {form} of {len(data)} bytes is damaged: its header says {width}x{height}, but nothing could be decoded")
    if picture.shape[0] * picture.shape[1] != width * height:
        raise PictureError(f"the {form} says {width}x{height} and holds {picture.shape[1]}x{picture.shape[0]}; it contradicts itself")
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
    """A copy with a box and `label score` for each detection, and the number of its `track` if it has one; lines and letters grow with
    the picture. Captions keep out of each other's way where there is room, the best detections' first."""
    drawn: Picture = np.array(picture)
    unit = _unit(picture)
    ranked = sorted(detections, key=lambda each: -each.score)
    for found in reversed(ranked):
        corner, opposite = (round(found.x0), round(found.y0)), (round(found.x1), round(found.y1))
        # The dark line underneath keeps the box visible on a ground of its own colour.
        cv2.rectangle(drawn, corner, opposite, INK, round(2 * unit) + 2, cv2.LINE_AA)
        cv2.rectangle(drawn, corner, opposite, colour_of(found.label), round(2 * unit), cv2.LINE_AA)
    taken: List[Rectangle] = []
    captions = []
    for found in ranked:
        track = getattr(found, "track", None)
        text = f"{found.label} {found.score:.0%}" if track is None else f"{found.label} {track} {found.score:.0%}"
        place = _caption_place(drawn, _caption_size(text, unit), found, unit, taken)
        taken.append(place)
        captions.append((text, place, colour_of(found.label)))
    for text, place, colour in reversed(captions):
        _caption(drawn, text, place, unit, colour)
    return drawn


def draw_line(
    picture: Picture, start: Tuple[float, float], end: Tuple[float, float], caption: str, colour: Tuple[int, int, int] = (255, 255, 255)
) -> None:
    """Draw a line between two points given in shares of the picture, into the picture, with a caption in the upper left corner."""
    height, width = picture.shape[:2]
    unit = _unit(picture)
    points = [(round(x * (width - 1)), round(y * (height - 1))) for x, y in (start, end)]
    cv2.line(picture, points[0], points[1], INK, round(2 * unit) + 2, cv2.LINE_AA)
    cv2.line(picture, points[0], points[1], colour, round(2 * unit), cv2.LINE_AA)
    if caption:
        _caption(picture, caption, (round(3 * unit), 0, *_caption_size(caption, unit)), unit, colour)


def _unit(picture: Picture) -> float:
    """What lines and letters are measured in: larger in larger pictures, though not by as much."""
    return max(1.0, math.pow(min(picture.shape[:2]) / 360, 0.8))


def _caption_size(text: str, unit: float) -> Tuple[int, int]:
    (width, height), below = cv2.getTextSize(text, FONT, 0.4 * unit, max(1, round(unit)))
    return width + 2 * round(2 * unit), height + below + 2 * round(2 * unit)


def _caption_place(picture: Picture, size: Tuple[int, int], found: Boxed, unit: float, taken: Sequence[Rectangle]) -> Rectangle:
    """Above the box; else within it, below it, at its right end, whichever is in the picture and free; else where it would be first."""
    (width, height), edge = size, round(unit)
    left, right = round(found.x0) - edge, round(found.x1) + edge - width
    rows = (round(found.y0) - height, round(found.y0) + edge, round(found.y1) + edge, round(found.y1) - height - edge)
    within = [top for top in rows if 0 <= top <= picture.shape[0] - height] or [max(0, min(rows[0], picture.shape[0] - height))]
    places = [(max(0, min(x, picture.shape[1] - width)), top, width, height) for x in (left, right) for top in within]
    return next((place for place in places if not any(_overlap(place, other) for other in taken)), places[0])


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


def _caption(picture: Picture, text: str, place: Rectangle, unit: float, colour: Tuple[int, int, int]) -> None:
    (x, top, width, height), pad = place, round(2 * unit)
    _, below = cv2.getTextSize(text, FONT, 0.4 * unit, max(1, round(unit)))
    cv2.rectangle(picture, (x, top), (x + width, top + height), colour, cv2.FILLED)
    cv2.putText(picture, text, (x + pad, top + height - pad - below), FONT, 0.4 * unit, INK, max(1, round(unit)), cv2.LINE_AA)
