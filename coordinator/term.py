"""Who is the acting coordinator, judged by what stands on the fleet's presence topic. Pure."""

from __future__ import annotations

from typing import Literal

from agent.protocol.messages import CoordinatorPresence

Verdict = Literal["ours", "repair", "rise", "yield"]


def judge(name: str, term: int, seen: CoordinatorPresence | None) -> Verdict:
    """What to do about a presence; None for one that is empty or unreadable.

    `repair`: say again that we act, for somebody wrote over it. `rise`: take a higher term first, for our record is older than what the
    fleet has seen. `yield`: another coordinator acts by a higher term; order nothing until it is gone.
    """
    if seen is None:
        return "repair"
    if seen.coordinator == name:
        if seen.term > term:
            return "rise"
        return "ours" if seen.online and seen.term == term else "repair"
    if not seen.online:
        return "rise" if seen.term >= term else "repair"
    return "yield" if (seen.term, seen.coordinator) > (term, name) else "repair"
