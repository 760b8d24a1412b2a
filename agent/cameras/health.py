"""How a camera is, in one sentence for people. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

ERRNO = re.compile(r"\[Errno -?\d+\] ?")


def words(camera: str, report: Mapping[str, Any]) -> str:
    """Such as "cam2: no frames for 12 s, next try in 8 s"; `report` is the worker's of agent/worker/pipeline.py."""
    state, message = str(report.get("state", "starting")), _cause(report)
    silent_s, retry_s = _number(report.get("silent_s")), _number(report.get("retry_in_s"))
    since = "no frames yet" if silent_s is None else f"no frames for {_span(silent_s)}"
    match state:
        case "streaming":
            text = _running(report)
        case "connecting":
            text = "connecting" if silent_s is None else f"{since}, connecting"
        case "stalled":
            text = since if silent_s is not None else message or "no frames for a while"
        case "backing_off":
            text = since + (f", next try in {_span(retry_s)}" if retry_s is not None else ", tries again soon")
            text += f" ({message})" if message else ""
        case "paused":
            text = "paused; nothing is seen until it is resumed"
        case "ended":
            text = "the source has come to its end"
        case "starting":
            text = f"starting{f': {message}' if message else ''}"
        case _:
            text = f"{state}{f': {message}' if message else ''}"
    return f"{camera}: {text}"


def _running(report: Mapping[str, Any]) -> str:
    parts = [f"{_number(report.get('fps')) or 0.0:.1f} frames/s"]
    age_ms = _number(report.get("age_ms_p50"))
    if age_ms is not None:
        parts.append(f"seen {age_ms / 1000:.1f} s after the fact" if age_ms >= 1000 else f"seen {age_ms:.0f} ms after the fact")
    if report.get("is_slowed"):
        parts.append("slowed down while requests for text run")
    recording = report.get("recording")
    if isinstance(recording, Mapping) and recording.get("state") == "stopped":
        parts.append(f"not recording: {recording.get('message') or 'no reason given'}")
    return ", ".join(parts)


def _cause(report: Mapping[str, Any]) -> str:
    """What went wrong, without the source, which stands beside it anyway."""
    message = str(report.get("message") or "")
    if source := str(report.get("source") or ""):
        message = message.replace(source, "")
    message = ERRNO.sub("", message).strip(" :'\"")
    return message[:1].lower() + message[1:]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
