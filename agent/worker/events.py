"""What a camera tells: the kinds of events, and the plain JSON in each. This is the contract with the daemon.

camera     {state, before, message}
           state: connecting, streaming, stalled, backing_off, ended, paused
unreachable  {failures, message}: that many connections in a row have failed; once in a row, see PipelineSettings.alert_failures
object     {id, type, label, track, score, top_score, box, width, height, started_s, ended_s, zones, entered_zones, dwell_s, is_loitering,
           crossed, has_snapshot, snapshot_box, clip}
           id             `{milliseconds since 1970 of its beginning}-{6 hex digits}`, unique also across restarts of the worker
           type           `new` once it has been seen for half a second; `update` at most once a second, and only when a zone was entered or
                          left, it began or ceased to loiter, crossed a line, changed its label, or gave a better picture; `end` exactly
                          once for each `new` (a worker that dies says none: its parent ends what it left open)
           track          number of the track, never used twice within one run of a pipeline
           score          of the last detection; `top_score` the best one
           box            [x0, y0, x1, y1] in pixels of a picture of `width` x `height`
           started_s, ended_s  Unix seconds when it was first and last seen; `ended_s` is null until the end
           zones, entered_zones  names: where it is; where it has ever been, in that order
           dwell_s        {zone: seconds in it, all visits together}
           is_loitering   zones in which it has stayed too long
           crossed        [{line, direction}], in order
           has_snapshot   the payload is a JPEG of the whole picture, masked, without drawings: the best one so far, on which the object
                          is at `snapshot_box`; else that is null and the payload empty
           clip           name of the file in the pipeline's media folder, `{id}.mp4`, complete some time after the end; null: none
crossed    {line, track, label, direction, at_s, count}
           direction: `forward`, `backward`; at_s: Unix seconds; count: crossings of that line by that label so far, both ways
zone       {zone, label, count}: how many of a label are in the zone now, told at most twice a second for each; the last value always
recording  {state, message}: `stopped` (disk full, folder gone) or `resumed`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

BURST = 30
PER_S = 10.0


@dataclass(frozen=True)
class Event:
    """`data` is plain JSON, `payload` a JPEG where the kind has one."""

    kind: str
    data: Mapping[str, Any]
    payload: bytes = b""


class Allowance:
    """How much may be told: a burst of 30, then 10 a second. What is refused waits; what never could be told is counted as dropped."""

    def __init__(self) -> None:
        self._left = float(BURST)
        self._at_s = 0.0
        self.dropped = 0

    def pass_to(self, at_s: float) -> None:
        self._left = min(float(BURST), self._left + max(0.0, at_s - self._at_s) * PER_S)
        self._at_s = max(at_s, self._at_s)

    def take(self) -> bool:
        if self._left < 1:
            return False
        self._left -= 1
        return True
