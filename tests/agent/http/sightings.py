"""A desk that takes orders about cameras, and a house that keeps 25 events on a real disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.cameras.keeper import EventKeeper
from agent.cameras.media import Media
from agent.cameras.orders import CameraRefused
from agent.cameras.record import EventRecord
from agent.cameras.retention import Keep
from agent.cameras.settings import SettingsRefused, checked, merged
from agent.cameras.store import EventStore
from tests.agent.http.conftest import House
from tests.agent.http.fakes import JPEG

NOON = 1_795_500_000.0  # 2026-11-24T06:00:00Z
CLIP = bytes(range(256)) * 40


@dataclass
class Desk:
    """Takes orders about cameras; `slow` is one whose model takes long, `full` one that the disk does not take."""

    wanted: dict[str, Mapping[str, Any]] = field(default_factory=lambda: {"belt": {"source": "rtsp://me:pass@host/x", "model": "boxes"}})
    was_reset: list[str] = field(default_factory=list)

    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        return self.wanted

    def origin(self, camera: str) -> str:
        return "order"

    def is_configured(self, camera: str) -> bool:
        return camera == "belt"

    async def replace(self, camera: str, settings: Mapping[str, Any]) -> bool:
        if camera == "full":
            raise CameraRefused("no_space", "the order cannot be kept: no space left on device")
        try:
            self.wanted[camera] = checked(camera, settings)
        except SettingsRefused as error:
            raise CameraRefused("invalid", str(error), error.field) from error
        return camera != "slow"

    async def change(self, camera: str, patch: Mapping[str, Any]) -> bool:
        return await self.replace(camera, merged(self.wanted.get(camera, {}), patch))

    async def remove(self, camera: str) -> None:
        if self.wanted.pop(camera, None) is None:
            raise CameraRefused("unknown_camera", f"there is no camera {camera}")

    async def reset(self, camera: str) -> bool:
        self.was_reset.append(camera)
        return camera == "belt"


@contextmanager
def seeing_house(folder: Path) -> Iterator[House]:
    media = Media(folder / "media")
    with EventStore(folder / "cameras.sqlite") as store:
        for number in range(25):
            store.save([
                EventRecord(f"e{number}", "yard" if number % 5 == 0 else "belt", "ball" if number % 2 else "parcel", NOON + 60 * number,
                            0.9, (1, 2, 3, 4), (5, 6, 7, 8), (64, 48), ("gate",) if number % 3 == 0 else (), {"gate": 2.5}, (),
                            (("kerb", "forward"),), NOON + 60 * number + 5, "object", 5.0, number != 7, number == 24)
            ])  # fmt: skip
        for number in set(range(25)) - {7}:
            media.keep_snapshot("yard" if number % 5 == 0 else "belt", f"e{number}", JPEG)
        media.clip("belt", "e24").write_bytes(CLIP)
        keeper = EventKeeper(store, media, Keep(), lambda severity, text: None, lambda: True)
        yield House(cameras=Desk(), sightings=keeper)
