"""Orders about cameras: kept, carried out, rolled back, given back to the file; the other cameras are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from agent.cameras.orders import CameraOrders, CameraRefused
from agent.errors import WorkerRefused
from agent.preparation import PreparationFailed
from agent.state import Desired
from agent.worker_protocol import Done, Request, StartPipeline, StopPipeline
from tests.agent.workshop import Hand, Workshop, built, find

pytestmark = pytest.mark.anyio
DOOR = {"source": "rtsp://admin:s3cret@10.0.0.20/stream", "model": "eyes"}
ZONE = {"name": "gate", "points": [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]]}


class Eye(Hand):
    """A vision worker that refuses what is painted, and notes what it started and stopped."""

    async def call(self, message: Request, payload: bytes = b"", deadline_s: float = 30.0) -> tuple[Done, bytes]:
        if isinstance(message, StartPipeline):
            if "painted" in message.settings.get("labels", ()):
                raise WorkerRefused("invalid", f"pipeline {message.pipeline}: zones[3].points: the worker knows better")
            self.asked.append(f"start {message.pipeline}")
        elif isinstance(message, StopPipeline):
            self.asked.append(f"stop {message.pipeline}")
        return await super().call(message, payload, deadline_s)


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    made = Workshop(tmp_path, eye=Eye())
    made.maker.ready = [built("eyes")]
    return made


def orders(shop: Workshop) -> CameraOrders:
    return CameraOrders(shop.desired, shop.reconciler, find, settle_s=5.0)


async def test_a_camera_is_added_changed_and_taken_away_beside_another(shop: Workshop) -> None:
    async with shop.working():
        given = orders(shop)
        assert await given.replace("yard", {**DOOR, "fps": 5.0})
        assert await given.replace("door", DOOR)
        assert await given.change("door", {"zones": [ZONE]})
        assert given.settings()["door"] == {**DOOR, "id": "door", "zones": [ZONE]}
        assert await given.change("door", {"source": "rtsp://…@10.0.0.20/stream", "fps": 3.0})  # as it was shown
        assert given.settings()["door"]["source"] == DOOR["source"]
        await given.remove("door")
        await shop.until(lambda: "stop door" in shop.eye.asked, "stopped")
        assert [step for step in shop.eye.asked if "yard" in step] == ["start yard"]
        with pytest.raises(CameraRefused, match="there is no camera door") as refusal:
            await given.remove("door")
        assert refusal.value.reason == "unknown_camera"


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"zones": [{**ZONE, "points": [[2, 0], [0, 0], [1, 1]]}]}, "zones[0].points[0][0]"),
        ({"model": "nobody"}, "model"),
        ({"model": "chat"}, "model"),
        ({"colour": "red"}, "colour"),
        ({"labels": ["painted"]}, "zones[3].points"),
    ],
)
async def test_an_order_that_is_refused_changes_nothing(shop: Workshop, tmp_path: Path, patch: dict[str, Any], field: str) -> None:
    async with shop.working():
        given = orders(shop)
        assert await given.replace("door", DOOR)
        before = (tmp_path / "desired.json").read_bytes()
        with pytest.raises(CameraRefused) as refusal:
            await given.change("door", {"fps": 2.0, **patch})
        assert refusal.value.field == field
        assert (tmp_path / "desired.json").read_bytes() == before
        await shop.until(lambda: shop.eye.asked[-1] == "start door", "it runs as before")


async def test_a_camera_whose_model_cannot_be_made_is_refused_and_one_whose_model_takes_long_is_on_its_way(shop: Workshop) -> None:
    shop.maker.gate = anyio.Event()
    shop.maker.ready = [PreparationFailed("no such operator", "unsupported")]
    async with shop.working():
        given = CameraOrders(shop.desired, shop.reconciler, find, settle_s=0.05)
        assert await given.replace("door", DOOR) is False
        assert "door" in given.settings()
        shop.maker.gate.set()
        with pytest.raises(CameraRefused, match="no such operator"):
            await given.replace("yard", DOOR, settle_s=5.0)
        assert "yard" not in given.settings()


async def test_a_reset_brings_back_what_the_file_says_and_an_edited_file_counts(tmp_path: Path) -> None:
    configured: dict[str, dict[str, Any]] = {"door": {**DOOR, "id": "door"}}
    shop = Workshop(tmp_path, eye=Eye(), pipelines=configured)
    shop.maker.ready = [built("eyes")]
    given = orders(shop)
    async with shop.working():
        assert given.origin("door") == "configuration"
        assert await given.change("door", {"fps": 2.0})
        assert given.origin("door") == "order"
        edited: dict[str, dict[str, Any]] = {"door": {**DOOR, "id": "door", "fps": 7.0}, "yard": {**DOOR, "id": "yard"}}
        assert shop.desired.reconfigure(Desired((), edited))
        assert given.settings()["door"]["fps"] == 2.0  # the order wins until it is taken back
        assert "yard" in given.settings()
        assert await given.reset("door")
        assert (given.settings()["door"]["fps"], given.origin("door")) == (7.0, "configuration")
        await given.remove("door")
        assert "door" not in given.settings()
        assert await given.reset("door")
        assert given.settings()["door"]["fps"] == 7.0
        assert not shop.desired.reconfigure(Desired((), edited))
        with pytest.raises(CameraRefused):
            await given.reset("nobody")


async def test_there_are_so_many_cameras_and_no_more(shop: Workshop) -> None:
    for number in range(64):
        shop.desired.want_pipeline(f"c{number}", DOOR)
    with pytest.raises(CameraRefused) as refusal:
        await orders(shop).replace("one-more", DOOR)
    assert refusal.value.reason == "busy"
