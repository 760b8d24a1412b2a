"""Events on a real disk: their life, their pictures, what a kill leaves, and a disk that is full."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest

from agent.cameras.keeper import EventKeeper
from agent.cameras.media import Media
from agent.cameras.record import EventRecord
from agent.cameras.retention import Keep
from agent.cameras.store import EventStore, Filter
from agent.protocol.wire import wire_now
from agent.worker_protocol import CameraEvent
from tests.conftest import ROOT

DEADLINE_S = 10.0
KEEP = Keep(min_free_bytes=0)


def seen(identifier: str, kind: str = "new", camera: str = "door", label: str = "person", **data: Any) -> CameraEvent:
    now_s = wire_now().timestamp()
    values = {
        "id": identifier, "type": kind, "label": label, "track": 7, "score": 0.8, "top_score": 0.9, "box": [1.0, 2.0, 30.0, 40.0],
        "width": 640, "height": 360, "started_s": now_s - 4.5, "ended_s": now_s if kind == "end" else None,
        "zones": [], "entered_zones": [],
        "dwell_s": {}, "is_loitering": [], "crossed": [], "has_snapshot": False, "clip": None,
    }  # fmt: skip
    return CameraEvent(camera, "object", {**values, **data})


@dataclass
class Kept:
    keeper: EventKeeper
    media: Media
    store: EventStore
    notes: list[str] = field(default_factory=list)

    async def until(self, condition: Callable[[list[EventRecord]], object], **wanted: Any) -> list[EventRecord]:
        events: list[EventRecord] = []
        with anyio.move_on_after(DEADLINE_S):
            while not condition(events):
                await anyio.sleep(0.01)
                events = await self.keeper.page(Filter(**wanted), None, 100)
            return events
        raise AssertionError(f"not within {DEADLINE_S} s; there is {events}")


@asynccontextmanager
async def keeping(folder: Path, keep: Keep = KEEP) -> AsyncIterator[Kept]:
    notes: list[str] = []
    media = Media(folder / "media")
    with EventStore(folder / "events.sqlite") as store:
        keeper = EventKeeper(store, media, keep, lambda severity, text: notes.append(f"{severity}: {text}"), lambda: True, retry_s=0.05)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keeper.run)
            yield Kept(keeper, media, store, notes)
            tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_an_object_comes_goes_through_zones_and_leaves_with_a_picture(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        kept.keeper.offer(seen("a1", has_snapshot=True, snapshot_box=[1, 1, 2, 2]), b"first picture")
        (begun,) = await kept.until(lambda events: events)
        assert (begun.label, begun.ended_at, begun.has_snapshot, begun.has_clip) == ("person", None, True, False)
        kept.keeper.offer(seen("a1", "update", entered_zones=["gate"], has_snapshot=True, snapshot_box=[5, 5, 9, 9]), b"better picture")
        await kept.until(lambda events: events and events[0].snapshot_box == (5.0, 5.0, 9.0, 9.0))
        crossed = [{"line": "kerb", "direction": "forward"}]
        end = seen("a1", "end", entered_zones=["gate"], dwell_s={"gate": 3.2}, crossed=crossed, is_loitering=["gate"], clip="a1.mp4")
        kept.keeper.offer(end)
        (ended,) = await kept.until(lambda events: events and events[0].ended_at is not None)
        assert (ended.ended_by, ended.seen_for_s, ended.zones, ended.dwell_s) == ("object", 4.5, ("gate",), {"gate": 3.2})
        assert ended.snapshot_box == (5.0, 5.0, 9.0, 9.0)
        assert (ended.crossed, ended.loitering, ended.has_clip, ended.began_at) == (
            ((("kerb", "forward"),)),
            ("gate",),
            True,
            begun.began_at,
        )
        assert kept.media.snapshot("door", "a1").read_bytes() == b"better picture"
        assert kept.keeper.kept == {("door", "person"): 1}
        kept.keeper.offer(seen("a1", "update"))  # what has ended stays so
        kept.keeper.offer(seen("a2"))
        await kept.until(lambda events: len(events) == 2)
        again = await kept.keeper.event("a1")
        assert again == ended
        assert kept.notes == []


@pytest.mark.anyio
async def test_pages_are_cut_and_filtered(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        for number in range(20):
            camera, label = ("door", "yard")[number % 2], ("person", "cat", "dog")[number % 3]
            kept.keeper.offer(seen(f"e{number}", "end", camera, label, entered_zones=["gate"] if number % 5 == 0 else ["gate 2"]))
        everything = await kept.until(lambda events: len(events) == 20)
        assert [event.id for event in everything] == [f"e{number}" for number in reversed(range(20))]
        first = await kept.keeper.page(Filter(camera="door"), None, 4)
        second = await kept.keeper.page(Filter(camera="door"), first[-1].number, 4)
        assert [event.id for event in (*first, *second)] == ["e18", "e16", "e14", "e12", "e10", "e8", "e6", "e4"]
        assert [event.id for event in await kept.keeper.page(Filter(zone="gate"), None, 9)] == ["e15", "e10", "e5", "e0"]
        assert [event.id for event in await kept.keeper.page(Filter(label="cat", camera="yard"), None, 9)] == ["e19", "e13", "e7", "e1"]
        began_at = everything[5].began_at
        later = await kept.keeper.page(Filter(since=began_at), None, 100)
        earlier = await kept.keeper.page(Filter(until=began_at), None, 100)
        assert {event.id for event in (*later, *earlier)} == {event.id for event in everything}
        assert len(later) + len(earlier) == 20


@pytest.mark.anyio
async def test_a_worker_that_is_lost_leaves_no_event_open_and_the_next_one_begins_anew(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        kept.keeper.offer(seen("a1"))
        kept.keeper.offer(seen("b1", "end", camera="yard"))
        kept.keeper.offer(seen("b2", camera="yard"))
        kept.keeper.end_open("worker_lost")
        kept.keeper.offer(seen("a2"))  # of the worker after that
        events = await kept.until(lambda events: len(events) == 4 and events[0].id == "a2")
        assert {event.id: event.ended_by for event in events} == {"a1": "worker_lost", "b1": "object", "b2": "worker_lost", "a2": None}


@pytest.mark.anyio
async def test_nonsense_of_the_worker_is_dropped_and_counted(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        for identifier in ("../../etc/passwd", "", ".hidden", "a/b", "x" * 200, None):
            kept.keeper.offer(seen("ok", id=identifier))
        kept.keeper.offer(seen("half", "end", label="person \ud800", box=[float("nan"), "x"], dwell_s=[], crossed=["what"], score=None))
        (event,) = await kept.until(lambda events: events)
        assert (event.id, event.label, event.box) == ("half", "person ?", (0.0, 0.0))
        assert kept.keeper.dropped == 6


@pytest.mark.anyio
async def test_a_flood_is_bounded_but_loses_no_end(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        kept.keeper.offer(seen("first"))
        await kept.until(lambda events: events)
        for number in range(3000):
            kept.keeper.offer(seen(f"n{number}", has_snapshot=True), b"x" * 100_000)
        kept.keeper.offer(seen("first", "end"))
        assert kept.keeper.dropped == 3000 - 1024
        await until_true(lambda: is_over(kept, "first"))
        assert sum(1 for _ in kept.media.of_camera("door").iterdir()) <= (32 << 20) // 100_000


async def until_true(condition: Callable[[], Awaitable[object]]) -> None:
    with anyio.fail_after(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110  # what is waited for lies on the disk
            await anyio.sleep(0.01)


async def is_over(kept: Kept, identifier: str) -> bool:
    event = await kept.keeper.event(identifier)
    return event is not None and event.ended_by is not None


async def is_noted(kept: Kept) -> bool:
    return bool(kept.notes)


@pytest.mark.anyio
async def test_the_start_clears_what_a_kill_left(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        kept.keeper.offer(seen("open", has_snapshot=True), b"picture")
        kept.keeper.offer(seen("gone", "end", has_snapshot=True, clip="gone.mp4"), b"picture")
        await kept.until(lambda events: len(events) == 2)
        folder = kept.media.of_camera("door")
    (folder / "gone.jpg").unlink()
    (folder / "stray.mp4").write_bytes(b"clip of an event that was never kept")
    (folder / ".gone.jpg.x7f").write_bytes(b"half a pic")
    async with keeping(tmp_path) as kept:
        events = await kept.until(lambda events: len(events) == 2 and not events[0].has_snapshot)
        assert {event.id: (event.ended_by, event.has_snapshot, event.has_clip) for event in events} == {
            "open": ("node_restarted", True, False), "gone": ("object", False, False),
        }  # fmt: skip
        assert [file.name for file in folder.iterdir()] == ["open.jpg"]


@pytest.mark.anyio
async def test_room_is_made_of_rows_and_files_together(tmp_path: Path) -> None:
    keep = Keep(total_bytes=2500, min_free_bytes=0)
    async with keeping(tmp_path) as kept:
        for number in range(5):
            kept.keeper.offer(seen(f"e{number}", "end", has_snapshot=True), b"x" * 1000)
            await kept.until(lambda events, count=number + 1: len(events) == count)  # type: ignore[misc]
        kept.media.clip("door", "e4").write_bytes(b"y" * 400)
    async with keeping(tmp_path, keep) as kept:
        events = await kept.until(lambda events: len(events) == 2)
        assert [event.id for event in events] == ["e4", "e3"]
        assert sorted(file.name for file in kept.media.of_camera("door").iterdir()) == ["e3.jpg", "e4.jpg", "e4.mp4"]


@pytest.mark.anyio
async def test_a_disk_that_takes_nothing_is_said_once_and_resumes(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        kept.media.folder.mkdir(exist_ok=True)
        (kept.media.folder / "door").write_bytes(b"a file where the folder should be: no write can succeed")
        for number in range(5):
            kept.keeper.offer(seen(f"e{number}", "end", has_snapshot=True), b"picture")
            await anyio.sleep(0.03)
        assert len(kept.notes) == 1
        assert kept.notes[0].startswith("error: events are not kept")
        (kept.media.folder / "door").unlink()
        events = await kept.until(lambda events: len(events) == 5)
        assert all(event.has_snapshot for event in events)
        assert kept.notes[1:] == ["info: events are kept again"]


@pytest.mark.anyio
async def test_a_full_database_loses_nothing_that_was_kept(tmp_path: Path) -> None:
    async with keeping(tmp_path) as kept:
        kept.keeper.offer(seen("before", "end"))
        await kept.until(lambda events: events)
        pages = kept.store._connection.execute("PRAGMA page_count").fetchone()[0]
        kept.store._connection.execute(f"PRAGMA max_page_count={pages}")  # SQLite then says what it says on a full disk
        for number in range(200):
            kept.keeper.offer(seen(f"e{number}", "end", entered_zones=["z" * 60] * 30))
        await until_true(lambda: is_noted(kept))
        assert "disk is full" in kept.notes[0]
        assert [event.id for event in await kept.keeper.page(Filter(), None, 9)] == ["before"]
        kept.store._connection.execute("PRAGMA max_page_count=100000")
        await until_true(lambda: is_over(kept, "e199"))
        assert len(kept.notes) == 2


CHILD = """
import sys, anyio
from pathlib import Path
from tests.agent.cameras.test_keeper import keeping, seen

async def main(folder, life):
    async with keeping(Path(folder)) as kept:
        print("up", flush=True)
        number = 0
        while True:
            number += 1
            for kind in ("new", "update", "end"):
                kept.keeper.offer(seen(f"l{life}-{number}", kind, has_snapshot=True), b"p" * 5000)
                await anyio.sleep(0.001)

anyio.run(main, *sys.argv[1:])
"""


def test_a_kill_at_any_moment_leaves_rows_and_files_that_agree(tmp_path: Path) -> None:
    chance = random.Random(5)
    for life in range(4):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), str(life)], cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        with child.stdout as out:
            assert out.readline() == b"up\n"
            try:
                child.wait(chance.uniform(0.05, 0.4))
            except subprocess.TimeoutExpired:
                os.kill(child.pid, signal.SIGKILL)
            child.wait(10)

    async def look() -> None:
        async with keeping(tmp_path) as kept:
            events = await kept.until(lambda events: len(events) > 10 and all(event.ended_by for event in events))
            files = {file.stem for file in kept.media.of_camera("door").iterdir()}
            everything = {row.id: row for row in kept.store.outline()}
            assert files == {row.id for row in everything.values() if row.has_snapshot}
            assert not any(row.is_open for row in everything.values())
            assert len(events) > 10

    anyio.run(look)
