"""Pictures that say when they were taken, as rtsp_server.py draws them."""

from __future__ import annotations

import time

from models.pictures import Picture


def age_s(picture: Picture) -> float:
    """How long ago the picture was taken, by the clock that it shows."""
    ticks = sum(int(picture[30:70, bit * 20 + 5 : bit * 20 + 15].mean() > 127) << bit for bit in range(16))
    return ((int(time.monotonic() * 100) - ticks) & 0xFFFF) / 100
