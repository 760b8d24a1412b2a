"""Snapshots and clips as files, `<folder>/<camera>/<event>.jpg` and `.mp4`. The worker writes clips, the daemon everything else."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from agent.cameras.record import EVENT_ID
from models.durable import write_atomically

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".mp4")


@dataclass(frozen=True, slots=True)
class Stored:
    """What lies on the disk for one event."""

    snapshot_bytes: int = 0
    clip_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.snapshot_bytes + self.clip_bytes


class Media:
    """Synchronous; for a thread. `id` and `camera` were checked before: neither can hold a separator or begin with a dot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of_camera(self, camera: str) -> Path:
        """Where the worker puts the clips of a camera."""
        return self.folder / camera

    def snapshot(self, camera: str, event: str) -> Path:
        return self.folder / camera / f"{event}.jpg"

    def clip(self, camera: str, event: str) -> Path:
        return self.folder / camera / f"{event}.mp4"

    def keep_snapshot(self, camera: str, event: str, jpeg: bytes) -> None:
        """Raises OSError; an earlier snapshot stays then."""
        write_atomically(self.snapshot(camera, event), jpeg)

    def free_bytes(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.folder).free

    def scan(self) -> dict[tuple[str, str], Stored]:
        """What lies there by (camera, event); files that are no event's are left out."""
        found: dict[tuple[str, str], Stored] = {}
        for file, facts in self._files():
            if file.suffix in SUFFIXES and EVENT_ID.match(file.stem):
                key = (file.parent.name, file.stem)
                before = found.get(key, Stored())
                is_clip = file.suffix == ".mp4"
                found[key] = Stored(before.snapshot_bytes + facts.st_size * (not is_clip), before.clip_bytes + facts.st_size * is_clip)
        return found

    def remove(self, camera: str, event: str) -> None:
        for file in (self.snapshot(camera, event), self.clip(camera, event)):
            file.unlink(missing_ok=True)

    def remove_others(self, known: Collection[tuple[str, str]], before: float) -> int:
        """Remove what belongs to no known event, half-written files included, and was not written to since `before` (seconds since 1970):
        a worker may be writing the clip of an event that is not known yet. Returns how many."""
        removed = 0
        for file, facts in self._files():
            is_known = file.suffix in SUFFIXES and (file.parent.name, file.stem) in known
            if not is_known and facts.st_mtime < before:
                file.unlink(missing_ok=True)
                removed += 1
        if removed:
            logger.info("%d files of events that are not known were removed from %s", removed, self.folder)
        return removed

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        files = []
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            for file in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
                try:
                    if file.is_file() and not file.is_symlink():
                        files.append((file, file.stat()))
                except FileNotFoundError:  # the worker renamed it meanwhile
                    continue
        return files
