"""Whether something moved: so that the detector rests while nothing does."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from agent.worker.settings import Motion
from models.pictures import Picture

HEIGHT = 100
STEP = 20  # of 255: what a pixel must change by; noise of a small, blurred picture stays below


class MotionGate:
    """Compares small grey pictures with the one that was looked at last, so that what creeps is seen too, later."""

    def __init__(self, wishes: Motion) -> None:
        self._wishes = wishes
        self._before: Any = None
        self._looked_s = 0.0

    def lets_through(self, picture: Picture, at_s: float, is_open: bool = False) -> bool:
        """Whether to look at a picture, its masks applied: something changed, or the last look was long ago, or the gate is held open.
        0.1 ms for 1080p."""
        width = max(1, picture.shape[1] * HEIGHT // picture.shape[0])
        # Every n-th pixel is enough here; averaging them all would cost more than the rest.
        small = cv2.resize(picture, (width, HEIGHT), interpolation=cv2.INTER_NEAREST)
        grey: Any = cv2.blur(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY), (3, 3))
        is_alike = self._before is not None and self._before.shape == grey.shape
        changed = float(np.count_nonzero(cv2.absdiff(grey, self._before) > STEP)) / grey.size if is_alike else 1.0
        if not is_open and changed < self._wishes.min_share and at_s - self._looked_s < self._wishes.forced_s:
            return False
        self._before, self._looked_s = grey, at_s
        return True
