"""Lists in pages, as OpenAI's clients turn them: `after` is the last object of the page before. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from agent.batches.record import Kept
from agent.http.errors import invalid

Item = TypeVar("Item", bound=Kept)
Order = Literal["asc", "desc"]


def page(
    items: Iterable[Item], shown: Callable[[Item], dict[str, Any]], after: str | None, limit: int, order: Order = "desc"
) -> dict[str, Any]:
    """At most `limit` objects by the time of their making. Raises ApiError for an `after` that is not among them."""
    ordered: Sequence[Item] = sorted(items, key=lambda item: (item.created_at, item.id), reverse=order == "desc")
    if after is not None:
        place = next((index for index, item in enumerate(ordered) if item.id == after), None)
        if place is None:
            raise invalid("after", f"after: there is no {after[:80]!r} in this list; begin it anew")
        ordered = ordered[place + 1 :]
    data = [shown(item) for item in ordered[:limit]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": len(ordered) > limit}
