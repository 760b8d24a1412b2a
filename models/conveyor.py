"""A rendered camera over a moving conveyor belt with known truth: something to see where there is no camera."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
from numpy.typing import NDArray

from models.conveyor_sprites import LABELS, Shape, Sprite, draw, random_shape

BLOCK_S = 64.0
LANES = 4
VISIBLE_SHARE = 0.25
SPRITES_KEPT = 64
BELTS = ((58, 54, 50), (72, 66, 44), (54, 70, 50), (84, 80, 78), (44, 52, 62))


class Box(NamedTuple):
    """One object in one picture: pixels, clipped to the picture, and an identity that lasts over the whole run."""

    label: str
    x0: float
    y0: float
    x1: float
    y1: float
    object_id: int


@dataclass(frozen=True)
class _Item:
    object_id: int
    shape: Shape
    behind_px: int  # the centre enters at x = 0 when the belt has moved this far
    y: float
    half_w: float
    half_h: float


class Conveyor:
    """Belt moving left to right. Every method is a pure function of the arguments given here and of t_s, at any frame rate.

    t_s counts from 0; a negative or infinite one raises ValueError. Not for two threads at once: sprites are cached.
    """

    def __init__(self, seed: int = 0, width: int = 640, height: int = 360, speed_px_s: float = 110.0, objects_per_s: float = 0.85):
        if width < 160 or height < 90 or not speed_px_s > 0 or not 0 < objects_per_s <= 2:
            raise ValueError(
                "conveyor needs width >= 160, height >= 90, speed_px_s > 0 and objects_per_s in 0..2, "
                f"not {width}x{height}, {speed_px_s}, {objects_per_s}"
            )
        self.seed = seed
        self.width = width
        self.height = height
        self.speed_px_s = speed_px_s
        self.objects_per_s = objects_per_s
        self._scale = height / 360
        self._belt_top, self._belt_bottom = round(48 * self._scale), round(314 * self._scale)
        # Objects that enter before 0 are on the belt when the camera opens.
        self._first_block = math.floor(-(width + 80 * self._scale) / speed_px_s / BLOCK_S)
        self._blocks: OrderedDict[int, Tuple[_Item, ...]] = OrderedDict()
        self._totals: List[Dict[str, int]] = [dict.fromkeys(LABELS, 0)]
        self._sprites: OrderedDict[int, Sprite] = OrderedDict()
        self._surroundings, self._belt = _scenery(seed, width, height, self._belt_top, self._belt_bottom)
        noise = np.random.RandomState(seed & 0x7FFFFFFF).normal(0, 3, height * width * 3 + 65536)
        self._noise = np.clip(noise, -12, 12).astype(np.int8).view(np.uint8)

    def frame(self, t_s: float) -> NDArray[np.uint8]:
        """The camera's picture at t_s: uint8 [H,W,3] BGR, the caller's own."""
        moved = self._moved(t_s)
        picture: NDArray[np.uint8] = self._surroundings.copy()
        period = self._belt.shape[1] - self.width
        start = -round(moved) % period
        picture[self._belt_top : self._belt_bottom] = self._belt[:, start : start + self.width]
        for item in sorted(self._on_belt(moved), key=lambda each: each.y + each.half_h):
            self._lay(picture, self._sprite(item), round(moved) - item.behind_px, round(item.y))
        lit = np.multiply(picture.reshape(self.height, -1), self._light(t_s), dtype=np.uint16)
        lit >>= 7
        picture = lit.astype(np.uint8).reshape(picture.shape)
        shift = round(t_s * 1000) * 40503 % 65536
        # Pixels stay 15 and more away from 0 and 255 up to here: noise as two's complement cannot wrap.
        picture += self._noise[shift : shift + picture.size].reshape(picture.shape)
        return picture

    def truth(self, t_s: float) -> Tuple[Box, ...]:
        """What the picture at t_s shows: objects of which at least a quarter is in the picture."""
        moved = self._moved(t_s)
        boxes = []
        for item in self._on_belt(moved):
            x = moved - item.behind_px
            x0, x1 = max(0.0, x - item.half_w), min(float(self.width), x + item.half_w)
            if x1 - x0 >= VISIBLE_SHARE * 2 * item.half_w:
                boxes.append(Box(item.shape.label, x0, item.y - item.half_h, x1, item.y + item.half_h, item.object_id))
        return tuple(boxes)

    def crossed(self, t_s: float) -> Dict[str, int]:
        """Objects by label whose centre passed the vertical line x = width / 2 from 0 to t_s."""
        line = self.width / 2
        until, before = self._entered(self._moved(t_s) - line), self._entered(-line)
        return {label: until[label] - before[label] for label in LABELS}

    def _moved(self, t_s: float) -> float:
        if not 0 <= t_s < math.inf:
            raise ValueError(f"t_s must be a finite time from 0 on, not {t_s}")
        return t_s * self.speed_px_s

    def _entered(self, moved: float) -> Dict[str, int]:
        block = self._block_at(moved)
        while len(self._totals) <= block - self._first_block:
            done = dict(self._totals[-1])
            for item in self._block(self._first_block + len(self._totals) - 1):
                done[item.shape.label] += 1
            self._totals.append(done)
        count = dict(self._totals[block - self._first_block])
        for item in self._block(block):
            count[item.shape.label] += item.behind_px <= moved
        return count

    def _on_belt(self, moved: float) -> List[_Item]:
        margin = 80 * self._scale
        first, last = self._block_at(moved - self.width - margin), self._block_at(moved + margin)
        items = (item for block in range(first, last + 1) for item in self._block(block))
        return [item for item in items if -margin < moved - item.behind_px < self.width + margin]

    def _block_at(self, moved: float) -> int:
        return max(self._first_block, math.floor(moved / self.speed_px_s / BLOCK_S))

    def _block(self, block: int) -> Tuple[_Item, ...]:
        if block not in self._blocks:
            self._blocks[block] = self._schedule(block)
            if len(self._blocks) > 8:
                self._blocks.popitem(last=False)
        return self._blocks[block]

    def _schedule(self, block: int) -> Tuple[_Item, ...]:
        """The objects of one stretch of belt. Stretches know nothing of each other, so any moment can be drawn without its past."""
        rng = random.Random(f"{self.seed}/{block}")
        guard = 60 * self._scale
        start, end = block * BLOCK_S * self.speed_px_s + guard, (block + 1) * BLOCK_S * self.speed_px_s - guard
        pitch = self.speed_px_s / self.objects_per_s
        items: List[_Item] = []
        at = start + rng.uniform(0, 0.5) * pitch
        while at < end:
            shape = random_shape(rng, rng.choice(LABELS), self._scale)
            item = self._placed(rng, shape, at, items[-8:], (block - self._first_block) * 1000 + len(items))
            if item.behind_px < end:
                items.append(item)
            # Some come side by side, most with a gap.
            at += pitch * (rng.uniform(0.0, 0.3) if rng.random() < 0.15 else rng.uniform(0.35, 1.95))
        return tuple(items)

    def _placed(self, rng: random.Random, shape: Shape, at: float, others: List[_Item], object_id: int) -> _Item:
        half_w, half_h = shape.half_box()
        top, bottom = self._belt_top + half_h, self._belt_bottom - half_h - 4 * self._scale
        while True:
            for lane in rng.sample(range(LANES), LANES):
                middle = self._belt_top + (lane + 0.5 + rng.uniform(-0.25, 0.25)) / LANES * (self._belt_bottom - self._belt_top)
                item = _Item(object_id, shape, round(at), min(max(middle, top), bottom), half_w, half_h)
                if not any(_touch(item, other) for other in others):
                    return item
            at += 10 * self._scale

    def _sprite(self, item: _Item) -> Sprite:
        sprite = self._sprites.get(item.object_id)
        if sprite is None:
            sprite = self._sprites[item.object_id] = draw(item.shape)
            if len(self._sprites) > SPRITES_KEPT:
                self._sprites.popitem(last=False)
        return sprite

    def _lay(self, picture: NDArray[np.uint8], sprite: Sprite, x: int, y: int) -> None:
        left, top = x + sprite.left, y + sprite.top
        x0, y0 = max(0, left), max(0, top)
        x1, y1 = min(self.width, left + sprite.keep.shape[1]), min(self.height, top + sprite.keep.shape[0])
        if x0 >= x1 or y0 >= y1:
            return
        part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        mixed = picture[y0:y1, x0:x1] * sprite.keep[part]
        mixed += sprite.add[part]
        mixed >>= 8
        picture[y0:y1, x0:x1] = mixed

    def _light(self, t_s: float) -> NDArray[np.uint16]:
        """Gain per column and channel [W*3] in 1/128: slow drift of the whole and a pool of light that wanders."""
        phase = (self.seed % 97) / 97 * 2 * math.pi
        gain = 1 + 0.045 * math.sin(2 * math.pi * t_s / 47 + phase) + 0.02 * math.sin(2 * math.pi * t_s / 13)
        x = np.arange(self.width) / self.width
        column = gain * (1 + 0.045 * np.cos(2 * math.pi * (x - 0.5 - t_s / 90)))
        warm = 0.015 * math.sin(2 * math.pi * t_s / 71 + phase)
        return np.asarray(np.outer(column * 128, (1 - warm, 1, 1 + warm)).ravel(), np.uint16)


def _touch(one: _Item, other: _Item) -> bool:
    # Boxes may share two pixels: neighbours that touch are part of the task, hidden ones are not.
    return abs(one.behind_px - other.behind_px) < one.half_w + other.half_w - 2 and abs(one.y - other.y) < one.half_h + other.half_h - 2


def _scenery(seed: int, width: int, height: int, top: int, bottom: int) -> Tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Floor, rails and rollers [H,W,3], and the belt [bottom-top, period+W,3] whose first and last W columns are the same."""
    rng = np.random.RandomState((seed + 7919) & 0x7FFFFFFF)
    scale = height / 360
    y = np.arange(height, dtype=np.float32)[:, None, None]
    x = np.arange(width, dtype=np.float32)[None, :, None]
    grain = rng.normal(0, 3.0, (height, width, 1))
    blotch = np.kron(rng.normal(0, 3.5, (height // 24 + 1, width // 40 + 1)), np.ones((24, 40)))[:height, :width, None]
    floor = np.array((112, 114, 116)) + grain + _smooth(blotch, 12)
    picture = np.broadcast_to(floor, (height, width, 3)).copy()
    for rail, outwards in ((top, -1), (bottom - 1, 1)):
        away = (y - rail) * outwards / scale
        roller = 60 + 90 * np.sin(np.pi * ((x / scale) % 22) / 22) ** 1.5
        picture = np.where((away >= 0) & (away < 8), roller * np.array((1.0, 1.0, 0.98)) * (0.75 + 0.04 * away), picture)
        bar = np.interp(away, (8, 9, 12, 14, 16, 22, 26, 27), (60, 180, 200, 150, 176, 168, 120, 50)) + grain * 0.7
        picture = np.where((away >= 8) & (away < 27), bar * np.array((1.0, 0.99, 0.97)), picture)
        bolt = np.hypot(((x / scale) % 96) - 48, away - 18.5)
        picture = np.where(bolt < 4, 96 + 18 * (bolt < 2.6) - 30 * (bolt > 3.2), picture)
        picture = np.where((away >= 27) & (away < 36), picture * np.clip(0.55 + 0.05 * (away - 27), 0, 1), picture)
        stripe = (((x + y) / scale) % 28 < 14) & (away >= 37) & (away < 43)
        picture = np.where(stripe, np.array((40, 170, 200)) + grain, picture)
    period, depth = round(1200 * scale), bottom - top
    weave = rng.normal(0, 2.6, (depth, period, 1))
    weave = weave + 2.2 * np.sin(np.arange(period) * 2 * np.pi / 6)[None, :, None] * np.sin(np.arange(depth) * 1.3)[:, None, None]
    wear = np.interp(np.arange(depth), np.linspace(0, depth, 24), rng.normal(0, 3.0, 24))[:, None, None]
    across = np.linspace(-1, 1, depth)[:, None, None]
    belt = np.array(BELTS[seed % len(BELTS)]) * (1.12 - 0.28 * across**2) + weave + wear
    # The splice is what shows that the belt moves when nothing lies on it.
    for splice in range(3):
        from_splice = (np.arange(period)[None, :, None] - splice * period / 3 - 0.22 * np.arange(depth)[:, None, None]) % period
        belt = belt + np.where(from_splice < 3 * scale, 22, 0) - np.where((from_splice >= 3 * scale) & (from_splice < 5 * scale), 14, 0)
    for _ in range(14):
        scuff_x, scuff_y, length = rng.randint(period), rng.randint(10, depth - 10), rng.randint(20, 120)
        columns = np.arange(scuff_x, scuff_x + length) % period
        belt[scuff_y : scuff_y + 2, columns] += rng.uniform(-10, 14)
    belt = belt * np.clip(0.55 + 0.09 * np.minimum(np.arange(depth), np.arange(depth)[::-1]) / scale, 0, 1)[:, None, None]
    belt = np.concatenate([belt, belt[:, :width]], axis=1)
    return np.clip(_smooth(picture, 1), 20, 215).astype(np.uint8), np.clip(belt, 20, 215).astype(np.uint8)


def _smooth(plane: NDArray[Any], reach: int) -> NDArray[Any]:
    for axis in (0, 1):
        total = plane.copy()
        for step in range(1, reach + 1):
            total += np.roll(plane, step, axis) + np.roll(plane, -step, axis)
        plane = total / (2 * reach + 1)
    return plane
