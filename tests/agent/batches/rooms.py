"""A store on a disk of its own, a clock that a test sets, and requests to fill files with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.batches.record import Batch, Endpoint, FileRecord
from agent.batches.retention import Keep
from agent.batches.store import BatchStore, StoreLimits, new_id

DAY_S = 24 * 3600
MONTH_S = 30 * DAY_S


@dataclass
class Clock:
    now: float = 1_800_000_000.0
    is_set: bool = True

    def __call__(self) -> float:
        return self.now


def opened(
    root: Path, clock: Clock | None = None, total_bytes: int = 1 << 30, file_bytes: int = 8 << 20, free_bytes: Sequence[int] = (1 << 40,)
) -> BatchStore:
    """`free_bytes`: what the disk says of itself; the last entry of a list counts, so that a test may change it."""
    limits = StoreLimits(file_bytes, Keep(total_bytes, MONTH_S), 1 << 20)
    clock = clock or Clock()
    store = BatchStore(root, limits, clock, lambda: clock.is_set, lambda _: free_bytes[-1])
    store.open()
    return store


def request(custom_id: str, words: str = "hello there", **changes: Any) -> dict[str, Any]:
    body = {"model": "parrot", "messages": [{"role": "user", "content": words}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": {**body, **changes}}


def jsonl(requests: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in requests)


async def added(store: BatchStore, content: bytes, owner: str = "") -> FileRecord:
    upload = await store.begin_upload()
    upload.write_bytes(content)
    return await store.add(upload, len(content), owner, "in.jsonl", MONTH_S)


async def ordered(store: BatchStore, content: bytes, owner: str = "", endpoint: Endpoint = "/v1/chat/completions") -> Batch:
    """A batch over a file with this content, validated by nobody yet."""
    file = await added(store, content, owner)
    now = int(store.clock())
    batch = Batch(
        id=new_id("batch_"), owner=owner, endpoint=endpoint, input_file_id=file.id, output_id=new_id("file-"), error_id=new_id("file-"),
        created_at=now, expires_at=now + DAY_S, output_expires_s=MONTH_S, is_clock_sure=store.clock_is_sure(),
    )  # fmt: skip
    await store.add_batch(batch)
    return batch


def read(store: BatchStore, identifier: str) -> list[dict[str, Any]]:
    """The lines of a file, whole ones only."""
    content = store.content(identifier)
    return [json.loads(line) for line in content.read_bytes().splitlines()] if content.exists() else []


def answers(store: BatchStore, batch: Batch) -> list[str]:
    """custom_id of every answer, in both files."""
    return [line["custom_id"] for name in (batch.output_id, batch.error_id) for line in read(store, name)]
