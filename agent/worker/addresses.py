"""Addresses of cameras: which forms there are, and what of one may be shown. For the daemon and the worker alike."""

from __future__ import annotations

import re

FORMS = "conveyor:, file:/…, rtsp(s)://…, http(s)://…, v4l2:/dev/videoN, csi:N; a blank in a password is written %20"
SOURCE = re.compile(r"conveyor:.*|file:/.*|(rtsps?|https?)://\S+|v4l2:/dev/video\d{1,3}(\?\S*)?|csi:\d")
# These hold no password, whatever is in their names.
LOCAL = re.compile(r"(conveyor|file|v4l2|csi):(?!//)")
URL = re.compile(r"(?:^|(?<=[\s'\"(<]))[A-Za-z][A-Za-z0-9+.-]*://")
HIDDEN = "…"


def is_source(text: str) -> bool:
    """Whether it has the form of a source; what a file's or the belt's options may be, agent/worker/sources.py knows."""
    return SOURCE.fullmatch(text) is not None


def redacted(text: str) -> str:
    """An address, or words that end with one, without user, password and query: fit to be shown. Doing it twice changes nothing.

    People write passwords with any character in them, unescaped, and cameras take them in the path as well (`/user=a_password=b`). So all
    up to the last @ is a password's, and the rest ends where values begin; where it cannot be told which, nothing of it is shown.
    """
    if LOCAL.match(text):
        return text
    url = URL.search(text)
    if url is None:
        return _after_the_last_at(text)
    return _after_the_last_at(text[: url.start()]) + url[0] + _place(text[url.end() :])


def _after_the_last_at(text: str) -> str:
    _, at, rest = text.rpartition("@")
    return HIDDEN + at + rest if at else text


def _place(rest: str) -> str:
    """Host, port and path of what follows `scheme://`."""
    before, at, after = rest.rpartition("@")
    if "?" in before or "=" in before.partition("/")[2]:
        return HIDDEN  # a password with a question mark, or a value with an at sign: whose is the rest?
    place = re.split(r"[?;&#]", after, maxsplit=1)[0]
    if "=" in place:
        place = place[: place.rfind("/", 0, place.index("=")) + 1]
    return (HIDDEN + at if at else "") + place + (HIDDEN if place != after else "")
