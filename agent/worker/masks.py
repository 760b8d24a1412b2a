"""Privacy masks: areas that are black before anything detects, keeps, streams or sends a picture.

What is painted is more than the polygon: whole blocks of 16x16 pixels, as JPEG and H.264 code them, around the polygon and a margin. A
block that is all black is coded without a remainder, and the margin keeps out what decoders carry over the borders of blocks (the
interpolation of chroma in JPEG, ITU-T T.81 and libjpeg-turbo's "fancy upsampling": 2 pixels; the deblocking filter of H.264, ITU-T H.264
8.7: 3 of luma, 2 of chroma). So no decoded pixel within the polygon of a JPEG differs from black.

H.264 predicts blocks from each other and drops small remainders, so black would come out as up to 10 of 255 where the neighbourhood
moves. What goes into a video encoder is therefore painted below black (luma 0, where black is 16): what is off by less is clamped to
black by every decoder. Measured on moving noise at crf 28 and 38: up to 6 and 10 with black, 0 with less.
"""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple, TypeVar

import cv2
import numpy as np

from agent.worker.areas import Mask

BLOCK = 16
MARGIN = 6
SIZES = 8

Rectangle = Tuple[int, int, int, int]
Array = TypeVar("Array", bound="np.ndarray[Any, Any]")


class Masks:
    """Masks of one camera, rasterised once for each size of picture. For any thread."""

    def __init__(self, masks: Sequence[Mask] = ()) -> None:
        self._masks = tuple(masks)
        self._rectangles: Dict[Tuple[int, int], Tuple[Rectangle, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._masks)

    def apply(self, picture: Array) -> Array:
        """The picture [H,W] or [H,W,C] with the masked area at 0; painted in place where that can be done.

        To be called again on a picture that was scaled or drawn on after the masks were applied.
        """
        if not self._masks:
            return picture
        if not picture.flags.writeable:
            picture = picture.copy()
        for x0, y0, x1, y1 in self.rectangles(picture.shape[1], picture.shape[0]):
            picture[y0:y1, x0:x1] = 0
        return picture

    def apply_yuv420(self, planes: Array) -> Array:
        """The same for [H * 3/2, W] as PyAV lays out limited-range yuv420p (H and W even), on its way into a video encoder."""
        if not self._masks:
            return planes
        if not (planes.flags.writeable and planes.flags.c_contiguous):
            planes = planes.copy()
        height, width = planes.shape[0] * 2 // 3, planes.shape[1]
        chroma = planes[height:].reshape(2, height // 2, width // 2)
        for x0, y0, x1, y1 in self.rectangles(width, height):
            planes[y0:y1, x0:x1] = 0
            chroma[:, y0 // 2 : (y1 + 1) // 2, x0 // 2 : (x1 + 1) // 2] = 128
        return planes

    def rectangles(self, width: int, height: int) -> Tuple[Rectangle, ...]:
        """What is painted in pictures of this size: x0, y0, x1, y1 in pixels, the upper bounds excluded."""
        made = self._rectangles.get((width, height))
        if made is None:
            made = rectangles_of(self._masks, width, height)
            # Replaced, not changed: another thread may be reading. A camera has one or two sizes.
            kept = list(self._rectangles.items())[-(SIZES - 1) :]
            self._rectangles = dict(kept + [((width, height), made)])
        return made


def rectangles_of(masks: Sequence[Mask], width: int, height: int) -> Tuple[Rectangle, ...]:
    """Few rectangles on the grid of blocks that cover every mask and its margin, cut off at the picture's edges."""
    covered = np.zeros((height, width), np.uint8)
    for mask in masks:
        points = np.array([(x * width, y * height) for x, y in mask.points])
        # Corners are rounded, by half a pixel at most, which the margin covers; the outline belongs to what is filled.
        cv2.fillPoly(covered, [np.round(points).astype(np.int32)], 1)
        _outline(covered, points)
    grown: Any = cv2.dilate(covered, np.ones((2 * MARGIN + 1, 2 * MARGIN + 1), np.uint8))
    down, right = -height % BLOCK, -width % BLOCK
    blocks = np.pad(grown, ((0, down), (0, right)))
    grid = blocks.reshape(blocks.shape[0] // BLOCK, BLOCK, blocks.shape[1] // BLOCK, BLOCK).any(axis=(1, 3))
    return tuple(
        (left * BLOCK, top * BLOCK, min(end * BLOCK, width), min(bottom * BLOCK, height)) for left, top, end, bottom in _merged(grid)
    )


def _outline(covered: Any, points: Any) -> None:
    # A bow tie is filled by the even-odd rule, and what is thinner than a pixel by chance: its edges are masked in any case.
    cv2.polylines(covered, [np.round(points).astype(np.int32)], True, 1, 1)


def _merged(grid: Any) -> List[Rectangle]:
    """Runs of each row, joined with those of the row above that are as wide."""
    done: List[Rectangle] = []
    growing: Dict[Tuple[int, int], int] = {}
    for row in range(len(grid) + 1):
        edges = np.flatnonzero(
            np.diff(np.concatenate([[0], grid[row] if row < len(grid) else np.zeros(grid.shape[1]), [0]]).astype(np.int8))
        )
        runs = {(int(left), int(end)) for left, end in zip(edges[::2], edges[1::2])}
        done.extend((left, top, end, row) for (left, end), top in growing.items() if (left, end) not in runs)
        growing = {run: growing.get(run, row) for run in sorted(runs)}
    return done
