"""Feeds systemd's watchdog, but only while the parts move; whether they reach anybody does not matter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import anyio

from agent.sdnotify import notify, watchdog_interval_s

logger = logging.getLogger(__name__)

# Name of a part → when it last gave a sign of life (the event loop's clock), and how long it may be silent.
SignsOfLife = Mapping[str, tuple[Callable[[], float], float]]


def silent_parts(signs: SignsOfLife, now_s: float) -> list[str]:
    return [name for name, (ticked_s, limit_s) in signs.items() if now_s - ticked_s() > limit_s]


async def feed_watchdog(signs: SignsOfLife) -> None:
    """Returns at once where no watchdog is asked for."""
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        silent = silent_parts(signs, anyio.current_time())
        if silent:
            logger.critical("the watchdog is not fed, for there is no sign of life of: %s", ", ".join(silent))
        else:
            notify("WATCHDOG=1")
        await anyio.sleep(interval_s)
