"""How one parcel, bottle or ball on the rendered belt looks: shape, extent and picture."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, List, Tuple

import numpy as np
from numpy.typing import NDArray

LABELS = ("parcel", "bottle", "ball")
SHADOW_PX = 16

Plane = NDArray[Any]
Colour = Tuple[int, int, int]

# Colours are BGR. They stay within 20..215, so that light and sensor noise never wrap around in uint8.
CARDBOARD = ((96, 142, 182), (84, 128, 168), (110, 156, 196), (74, 112, 150), (188, 194, 198), (150, 160, 172))
TAPE = ((126, 170, 204), (70, 108, 146), (190, 200, 206), (60, 70, 190))
GLASS = ((66, 120, 48), (36, 64, 108), (150, 116, 58), (186, 190, 182), (176, 172, 120), (70, 90, 40))
STICKER = ((200, 204, 208), (48, 50, 196), (60, 170, 208), (176, 90, 40), (90, 160, 60))
CAP = ((46, 46, 190), (180, 92, 36), (206, 208, 210), (60, 150, 60), (40, 168, 210), (40, 40, 44))
BALL = ((44, 48, 200), (186, 92, 36), (50, 180, 210), (70, 160, 60), (36, 120, 212), (150, 70, 160), (206, 208, 210))

# Half width of a bottle along its axis, from the base (0) to the end of the cap (1), as a share of the body's half width.
BOTTLE_AT = (0.0, 0.02, 0.06, 0.58, 0.64, 0.70, 0.78, 0.84, 0.86, 0.99, 1.0)
BOTTLE_HALF_WIDTH = (0.80, 0.94, 1.0, 1.0, 0.95, 0.80, 0.50, 0.40, 0.46, 0.46, 0.40)
CAP_FROM = 0.85


@dataclass(frozen=True)
class Shape:
    """Geometry of one object in pixels. `half_length` runs along its axis, `height` is the visible front side of a parcel."""

    label: str
    half_length: float
    half_width: float
    height: float
    angle: float
    look: int

    def half_box(self) -> Tuple[float, float]:
        """Half width and half height in pixels of the upright box around the object, its shadow left out."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        if self.label == "parcel":
            a, b = self.half_length, self.half_width
            return abs(a * cos) + abs(b * sin), abs(a * sin) + abs(b * cos) + self.height / 2
        if self.label == "ball":
            return self.half_length, self.half_length
        (left, top), (right, bottom) = self._bottle_extent()
        return (right - left) / 2, (bottom - top) / 2

    def offset(self) -> Tuple[float, float]:
        """Where the object's own origin lies, seen from the middle of its box."""
        if self.label == "parcel":
            return 0.0, -self.height / 2
        if self.label == "ball":
            return 0.0, 0.0
        (left, top), (right, bottom) = self._bottle_extent()
        return -(left + right) / 2, -(top + bottom) / 2

    def _bottle_extent(self) -> Tuple[Tuple[float, float], Tuple[float, float]]:
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        xs: List[float] = []
        ys: List[float] = []
        for at, width in zip(BOTTLE_AT, BOTTLE_HALF_WIDTH):
            u = (2 * at - 1) * self.half_length
            for v in (-width * self.half_width, width * self.half_width):
                xs.append(u * cos - v * sin)
                ys.append(u * sin + v * cos)
        return (min(xs), min(ys)), (max(xs), max(ys))


@dataclass(frozen=True)
class Sprite:
    """A picture to lay over the scene: `out = (scene * keep + add) >> 8`, shadow included.

    keep [h,w,1] and add [h,w,3] are uint16 in 1/256; left and top lead from the middle of the box to the first pixel.
    """

    keep: NDArray[np.uint16]
    add: NDArray[np.uint16]
    left: int
    top: int


def random_shape(rng: random.Random, label: str, scale: float) -> Shape:
    """Draw size and orientation. At scale 1 (360 lines) boxes measure 32 to about 120 pixels."""
    look = rng.getrandbits(31)
    if label == "ball":
        radius = rng.uniform(16, 29) * scale
        return Shape(label, radius, radius, 0.0, rng.uniform(0, 2 * math.pi), look)
    if label == "bottle":
        half_length = rng.uniform(36, 54)
        half_width = half_length * rng.uniform(0.26, 0.34)
        return Shape(label, half_length * scale, half_width * scale, 0.0, rng.uniform(0, 2 * math.pi), look)
    half_length = rng.uniform(25, 42)
    half_width = half_length * rng.uniform(0.62, 0.95)
    angle = rng.gauss(0, 0.3) if rng.random() < 0.7 else rng.uniform(-1.5, 1.5)
    return Shape(label, half_length * scale, half_width * scale, rng.uniform(5, 13) * scale, angle, look)


def draw(shape: Shape) -> Sprite:
    """Paint one object. Takes a millisecond or two: keep the result."""
    half_w, half_h = shape.half_box()
    right, bottom = int(half_w) + SHADOW_PX + 2, int(half_h) + SHADOW_PX + 2
    x = np.arange(-right, right + 1, dtype=np.float32)[None, :]
    y = np.arange(-bottom, bottom + 1, dtype=np.float32)[:, None]
    colour, distance = _PAINTERS[shape.label](shape, x - np.float32(shape.offset()[0]), y - np.float32(shape.offset()[1]))
    # A ramp of 1.6 pixels instead of one is the lens: edges are slightly soft.
    cover = np.clip(0.5 - distance / 1.6, 0, 1)[..., None]
    thrown = np.float32(5 + 0.5 * shape.height)
    shade = np.roll(np.clip((7 - distance) / 14, 0, 1), (int(thrown), int(0.6 * thrown)), axis=(0, 1))
    keep = (1 - 0.62 * shade[..., None] ** 1.5) * (1 - cover)
    add = np.clip(colour, 20, 215) * cover
    return Sprite((keep * 256).astype(np.uint16), (add * 256).astype(np.uint16), -right, -bottom)


def _parcel(shape: Shape, x: Plane, y: Plane) -> Tuple[Plane, Plane]:
    rng = random.Random(shape.look)
    a, b, h = shape.half_length, shape.half_width, shape.height
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    u, v = x * cos + y * sin, y * cos - x * sin
    top = np.maximum(np.abs(u) - a, np.abs(v) - b)
    # The seen outline is the top face swept down by h: its edges, and the two upright ones at the sides.
    edges = [(cos, sin, a), (-cos, -sin, a), (-sin, cos, b), (sin, -cos, b)]
    outline = np.abs(x) - np.float32(abs(a * cos) + abs(b * sin)) + 0 * y
    for nx, ny, reach in edges:
        outline = np.maximum(outline, nx * x + ny * y - np.float32(reach + max(0.0, ny * h)))
    corner = max(((su * a * cos - sv * b * sin, su * a * sin + sv * b * cos) for su in (-1, 1) for sv in (-1, 1)), key=lambda p: p[1])
    base = np.array(rng.choice(CARDBOARD), np.float32)
    grain = np.random.RandomState(shape.look).normal(0, 1, outline.shape).astype(np.float32)
    grain = (grain + np.roll(grain, 1, 1) + np.roll(grain, 2, 1))[..., None]
    side = np.where(x < corner[0], np.float32(0.66), np.float32(0.52))[..., None]
    colour = base * side * (1 - np.clip(top, 0, h) / h * 0.25)[..., None]
    face = base * (1.04 - 0.10 * (u / a * 0.6 + v / b * 0.4))[..., None] + grain * 2.2
    if rng.random() < 0.85:
        tape = np.array(rng.choice(TAPE), np.float32)
        width = b * rng.uniform(0.13, 0.22)
        face = _over(face, tape * (1 + 0.10 * np.cos(u * 0.35))[..., None], 0.8 * _inside(np.abs(v) - np.float32(width)))
    face = _over(face, base * 0.55, 0.6 * _inside(np.abs(v) - np.float32(0.5)))
    if rng.random() < 0.7:
        at_u, at_v = rng.choice((-1, 1)) * a * 0.46, rng.choice((-1, 1)) * b * 0.52
        slip = np.maximum(np.abs(u - at_u) - np.float32(a * 0.36), np.abs(v - at_v) - np.float32(b * 0.30))
        face = _over(face, np.array((205, 208, 210), np.float32), _inside(slip))
        bars = (np.sin(u * 2.1) + np.sin(u * 1.3 + rng.random() * 6) > 0.3) & (np.abs(v - at_v) < b * 0.16) & (slip < -2)
        face = _over(face, np.array((50, 50, 50), np.float32), 0.85 * bars.astype(np.float32))
    rim = np.clip(1 - np.abs(top + 1) / 1.5, 0, 1)
    face = _over(face, base * 1.18, 0.5 * rim)
    return _over(colour, face, _inside(top)), outline


def _bottle(shape: Shape, x: Plane, y: Plane) -> Tuple[Plane, Plane]:
    rng = random.Random(shape.look)
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    u, v = x * cos + y * sin, y * cos - x * sin
    at = (u / shape.half_length + 1) / 2
    radius = np.interp(at, BOTTLE_AT, BOTTLE_HALF_WIDTH).astype(np.float32) * np.float32(shape.half_width)
    distance = np.maximum(np.abs(v) - radius, np.abs(u) - np.float32(shape.half_length))
    across = np.clip(v / radius, -1, 1)
    # The lamp hangs above the upper edge of the picture, whichever way the bottle lies.
    lit = across if math.cos(shape.angle) < 0 else -across
    body = np.sqrt(1 - 0.92 * across**2)
    glass = np.array(rng.choice(GLASS), np.float32)
    colour = glass * (0.50 + 0.55 * body + 0.16 * lit)[..., None]
    # Glass is brightest where light leaves it, at the far inner wall.
    colour = colour + np.float32(34) * np.exp(-(((lit + 0.62) / 0.16) ** 2))[..., None]
    if rng.random() < 0.75:
        start, length = rng.uniform(0.16, 0.24), rng.uniform(0.20, 0.32)
        sticker = np.array(rng.choice(STICKER), np.float32)
        band = np.abs(at - (start + length / 2)) - np.float32(length / 2)
        mask = _inside(band * np.float32(2 * shape.half_length))
        colour = _over(colour, sticker * (0.45 + 0.55 * body + 0.1 * lit)[..., None], mask)
        stripe = _inside((np.abs(band + np.float32(length / 2)) - np.float32(length * 0.16)) * np.float32(2 * shape.half_length))
        colour = _over(colour, np.array(rng.choice(STICKER), np.float32) * (0.45 + 0.55 * body)[..., None], 0.9 * stripe)
    cap = np.array(rng.choice(CAP), np.float32) * (0.45 + 0.6 * body + 0.1 * lit + 0.06 * np.sin(v * 2.4))[..., None]
    colour = _over(colour, cap, _inside((np.float32(CAP_FROM) - at) * np.float32(2 * shape.half_length)))
    shine = np.exp(-(((lit - 0.48) / 0.11) ** 2)) * ((at > 0.05) & (at < 0.95))
    return _over(colour, np.array((214, 214, 212), np.float32), 0.75 * shine), distance


def _ball(shape: Shape, x: Plane, y: Plane) -> Tuple[Plane, Plane]:
    rng = random.Random(shape.look)
    radius = np.float32(shape.half_length)
    distance = np.sqrt(x**2 + y**2) - radius
    nx, ny = x / radius + 0 * y, y / radius + 0 * x
    nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0, 1))
    tilt, turn = rng.uniform(0.3, 1.3), shape.angle
    px = nx * math.cos(turn) + ny * math.sin(turn)
    py = (ny * math.cos(turn) - nx * math.sin(turn)) * math.cos(tilt) - nz * math.sin(tilt)
    pz = (ny * math.cos(turn) - nx * math.sin(turn)) * math.sin(tilt) + nz * math.cos(tilt)
    first, second = (np.array(c, np.float32) for c in rng.sample(BALL, 2))
    kind = rng.choice(("beach", "stripe", "seam", "plain"))
    if kind == "beach":
        pattern = np.sin(3 * np.arctan2(px, pz)) * radius / 3
    elif kind == "stripe":
        pattern = (np.float32(0.24) - np.abs(py)) * radius
    elif kind == "seam":
        pattern = (np.float32(0.07) - np.abs(py - 0.45 * np.sin(2 * np.arctan2(px, pz)))) * radius
    else:
        pattern = np.full(distance.shape, -1, np.float32)
    colour = _over(first + np.zeros(distance.shape + (1,), np.float32), second, _inside(-pattern))
    facing = np.clip(-0.42 * nx - 0.55 * ny + 0.72 * nz, 0, 1)
    shine = np.clip(-0.30 * nx - 0.42 * ny + 0.86 * nz, 0, 1) ** 26
    bounce = 0.10 * np.clip(ny, 0, 1)
    return _over(colour * (0.34 + 0.72 * facing + bounce)[..., None], np.array((215, 215, 215), np.float32), 0.8 * shine), distance


def _inside(distance: Plane) -> Plane:
    covered: Plane = np.clip(0.5 - distance, 0, 1)
    return covered


def _over(under: Plane, colour: Plane, mask: Plane) -> Plane:
    mixed: Plane = under + (colour - under) * mask[..., None]
    return mixed


_PAINTERS = dict(zip(LABELS, (_parcel, _bottle, _ball)))
