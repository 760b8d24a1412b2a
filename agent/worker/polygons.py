"""Points and polygons in shares of a picture: (0, 0) is its upper left corner, (1, 1) its lower right one."""

from __future__ import annotations

import math
import re
from typing import Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

Point = Tuple[float, float]

MIN_POINTS, MAX_POINTS = 3, 32
MIN_AREA = 1e-4  # of the picture: a hundredth of its width by a hundredth of its height
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}")


def check_name(name: str, where: str) -> None:
    """Raises ValueError, beginning with `where`, unless the name can stand in a topic, a file and a page."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{where}: {name!r} is no name; take up to 63 letters, digits, blanks, dots, - and _, a letter or digit first")


def check_point(point: Point, where: str) -> None:
    """Raises ValueError, beginning with `where`, unless the point is in the picture."""
    if not all(math.isfinite(value) and 0 <= value <= 1 for value in point):
        raise ValueError(f"{where}: {list(point)} is not within 0..1; points are shares of the picture's width and height")


def check_polygon(points: Sequence[Point], where: str) -> None:
    """Raises ValueError, beginning with `where` and naming the point, for what is no polygon within the picture."""
    if not MIN_POINTS <= len(points) <= MAX_POINTS:
        raise ValueError(f"{where}: {len(points)} points; a polygon has {MIN_POINTS} to {MAX_POINTS}")
    for index, point in enumerate(points):
        check_point(point, f"{where}[{index}]")
    if covered(points) < MIN_AREA:
        raise ValueError(f"{where}: the polygon covers less than {MIN_AREA:.2%} of the picture; give points that span an area")


def covered(points: Sequence[Point]) -> float:
    """The share of the picture within the bounds of the points, if these have any breadth off a common line; else 0."""
    array = np.array(points, np.float64)
    centred = array - array.mean(axis=0)
    # Not the signed area: that of a bow tie is zero, and people do draw them.
    singular = np.linalg.svd(centred, compute_uv=False)
    return 0.0 if singular[-1] < 1e-3 else float(np.prod(np.ptp(array, axis=0)))


def inside(polygon: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the points [N,2] lie in the polygon [M,2], by the even-odd rule: bool [N]."""
    x, y = points[:, :1], points[:, 1:]
    before, after = polygon, np.roll(polygon, -1, axis=0)
    spans = (before[:, 1] > y) != (after[:, 1] > y)
    run, rise = (after - before).T
    turn = (x - before[:, 0]) * rise - (y - before[:, 1]) * run
    is_left = np.where(rise > 0, turn < 0, turn > 0)
    return np.asarray(np.count_nonzero(spans & is_left, axis=1) % 2 == 1)
