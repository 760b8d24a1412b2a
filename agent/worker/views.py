"""What those who look at a camera are sent, and how often: pictures with what was seen drawn in, plain ones, and small ones."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from agent.worker.masks import Masks
from agent.worker_protocol import SMALL_BYTES
from models.pictures import Picture, encode_jpeg

SIDES = (1280, 960, 640, 480, 320, 160)
QUALITIES = (80, 60, 40)


@dataclass
class Watchers:
    """Until when and how often somebody looks."""

    until_s: float = 0.0
    period_s: float = 0.1
    due_s: float = 0.0

    def takes(self, now_s: float) -> bool:
        """Whether a picture of now is wanted; the next one is due a period later."""
        if now_s >= self.until_s or now_s < self.due_s:
            return False
        self.due_s = max(self.due_s + self.period_s, now_s - self.period_s)
        return True


def small_jpeg(picture: Picture, masks: Masks) -> bytes:
    """A JPEG of at most SMALL_BYTES, and 1280 pixels at its longer side; what is masked is masked anew at its size, to the pixel."""
    jpeg, (height, width) = b"", picture.shape[:2]
    longer = max(height, width)
    for side in dict.fromkeys(min(side, longer) for side in SIDES):
        size = max(1, width * side // longer), max(1, height * side // longer)
        scaled = picture if side == longer else np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
        masked = masks.apply(scaled)
        for quality in QUALITIES:
            jpeg = encode_jpeg(masked, quality)
            if len(jpeg) <= SMALL_BYTES:
                return jpeg
    return jpeg  # 160 pixels at the longer side take less, whatever they show
