"""Which frames go into one run of a detector: the one that waited longest, and others that the same run can take. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

WINDOW_S = 0.03
WINDOW_SHARE = 0.2


@dataclass(frozen=True)
class Candidate:
    """One camera's next frame.

    kind    the model, and height and width of its input: one run takes frames of one kind
    due_s   since when it waits; None: it is not there yet
    next_s  when it is expected if it is not there; None: nobody knows
    """

    name: str
    kind: Tuple[str, int, int]
    due_s: Optional[float]
    next_s: Optional[float] = None


def oldest_alike(candidates: Sequence[Candidate]) -> List[Candidate]:
    """Those that wait and are of one kind with the one that has waited longest, longest first; none waits: empty."""
    waiting = sorted((each.due_s, each.name, each) for each in candidates if each.due_s is not None)
    return [each for _, _, each in waiting if each.kind == waiting[0][2].kind]


def window_s(execution_s: float) -> float:
    """How long a batch that could be fuller is waited for, where one run takes `execution_s`."""
    return min(WINDOW_S, WINDOW_SHARE * execution_s)


def is_worth_waiting(batch: Sequence[Candidate], candidates: Sequence[Candidate], most: int, until_s: float) -> bool:
    """Whether a batch has room, of `most`, for a frame that is expected by `until_s`."""
    expected = (each.next_s for each in candidates if each.due_s is None and each.kind == batch[0].kind)
    return len(batch) < most and any(next_s is not None and next_s <= until_s for next_s in expected)
