"""Clips of events with what came before and after them: a ring of the last seconds, a thread that writes, a disk that may be full."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

import av

from agent.worker.clips import Clip, PacketClip, PictureClip, Piece, Template, remove_halves, template_of_keyframe
from agent.worker.events import Event
from agent.worker.gstreamer import EncodedStream
from agent.worker.masks import Masks
from agent.worker.settings import Recording
from models.pictures import Picture, PictureError, encode_jpeg

LOG = logging.getLogger(__name__)

COPIED = ("h264", "hevc", "av1", "vp9")
WAITING_BYTES = 48 << 20
RING_BYTES = 48 << 20
MAX_CLIPS = 8
# An event is told half a second after it began, or later: that much more is held than is wanted before it.
LATE_S = 1.5
WAIT_S = 0.5
GRACE_S = 1.0  # for frames that are on their way when a clip's time is over
RETRY_S = 5.0
LEAST_FREE_BYTES = 64 << 20
LAST_FREE_BYTES = 16 << 20
JOIN_S = 5.0
QUALITY = 90

FAILURES = (OSError, av.error.FFmpegError, PictureError)


@dataclass
class _Open:
    clip: Clip
    began_s: float
    until_s: float


@dataclass(frozen=True)
class _Begin:
    id: str
    from_s: float


@dataclass(frozen=True)
class _End:
    id: str
    until_s: float


@dataclass(frozen=True)
class _Raw:
    picture: Picture
    captured_s: float


@dataclass(frozen=True)
class _Stream:
    """What comes now belongs to another stream, with a template of its own, or to none."""

    template: Optional[Template]


class Recorder:
    """Clips of one camera, written by a thread of its own that lives from `start` to `close`.

    `packet` is for the camera's thread; everything else for the loop's. Where there are no packets, or masks, it lives on `picture`s.
    What waits for the disk is bounded: beyond 48 MB pieces are dropped up to the next keyframe, and counted.
    """

    def __init__(self, wishes: Recording, folder: Path, masks: Masks, fps: float, has_packets: bool) -> None:
        self.copies = has_packets and not masks
        self._wishes = wishes
        self._folder = folder
        self._masks = masks
        self._fps = fps
        self._changed = threading.Condition()
        self._waiting: Deque[Any] = deque()
        self._waiting_bytes = 0
        self._is_cut = self._is_closing = False
        self._stream: Any = None
        self._template: Optional[Template] = None
        self._ring: Deque[Piece] = deque()
        self._ring_bytes = 0
        self._clips: Dict[str, _Open] = {}
        self._asked: Tuple[str, ...] = ()
        self._retry_s = self._looked_s = 0.0
        self._problem = ""
        self._news: List[Event] = []
        self.dropped = self.written = 0
        self._thread = threading.Thread(target=self._run, name="recorder")

    def start(self) -> None:
        self._thread.start()

    def packet(self, packet: Any) -> None:
        """One packet of the camera's video stream, as FFmpeg demuxed it or as GStreamer's EncodedPicture."""
        if not self.copies or packet.size == 0:
            return
        if packet.stream is not self._stream and not self._enters(packet):
            return
        dts = packet.dts if packet.dts is not None else packet.pts
        if dts is None:
            return
        pts = packet.pts if packet.pts is not None else dts
        piece = Piece(time.monotonic(), bytes(packet), bool(packet.is_keyframe), pts, dts)
        self._put_bounded(piece, len(piece.data), piece.is_key)

    def _enters(self, packet: Any) -> bool:
        """Whether the packets of a stream that begins now can be kept as they are; else pictures are."""
        stream = packet.stream
        if isinstance(stream, EncodedStream) and not packet.is_keyframe:
            return False  # what its packets mean stands in the first keyframe
        self._stream = stream
        try:
            if isinstance(stream, EncodedStream):
                self._put(_Stream(template_of_keyframe(stream.codec, packet.data)))
                return True
            if stream.codec_context.name not in COPIED:
                raise ValueError(f"{stream.codec_context.name} in MP4 is played by few")
            self._put(_Stream(Template(stream)))
        except (ValueError, *FAILURES) as error:
            LOG.info("clips are encoded anew: %s", error)
            self._put(_Stream(None))
            self.copies = False
        return self.copies

    def picture(self, picture: Picture, captured_s: float) -> None:
        """One picture with its masks applied, which nobody changes any more; nothing happens where packets are copied."""
        if not self.copies and not self._problem:
            self._put_bounded(_Raw(picture, captured_s), picture.nbytes, is_key=True)

    def begin(self, event_id: str, label: str, ago_s: float) -> bool:
        """Whether a clip is made of an event that began `ago_s` ago; it goes on until `end`."""
        wanted = not self._wishes.labels or label in self._wishes.labels
        has_stream = not self.copies or self._stream is not None
        if not wanted or not has_stream or self._problem or len(self._asked) >= MAX_CLIPS:
            return False
        self._asked += (event_id,)
        self._put(_Begin(event_id, time.monotonic() - ago_s - self._wishes.pre_s))
        return True

    def end(self, event_id: str, ago_s: float) -> None:
        self._asked = tuple(each for each in self._asked if each != event_id)
        self._put(_End(event_id, time.monotonic() - ago_s + self._wishes.post_s))

    def news(self) -> List[Event]:
        """Events of the kind `recording` since the last call."""
        with self._changed:
            news, self._news = self._news, []
        return news

    def status(self) -> Dict[str, Any]:
        state = "stopped" if self._problem else "recording" if self._clips else "ready"
        return {"state": state, "message": self._problem, "clips": len(self._clips), "written": self.written, "dropped": self.dropped}

    def close(self) -> None:
        """Clips end here and are finished by the thread, which is not waited for."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def _put_bounded(self, piece: Any, size: int, is_key: bool) -> None:
        with self._changed:
            self._is_cut = (self._is_cut and not is_key) or self._waiting_bytes + size > WAITING_BYTES
            if self._is_cut:
                self.dropped += 1
                return
            self._waiting_bytes += size
            self._waiting.append(piece)
            self._changed.notify()

    def _put(self, order: Any) -> None:
        with self._changed:
            self._waiting.append(order)
            self._changed.notify()

    def _run(self) -> None:
        self._guarded(self._prepare)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing, WAIT_S)
                work, self._waiting, self._waiting_bytes = list(self._waiting), deque(), 0
                is_last = self._is_closing
            for each in work:
                self._guarded(partial(self._take, each))
            now_s = time.monotonic()
            for name in [name for name, each in self._clips.items() if is_last or now_s >= each.until_s + GRACE_S]:
                self._finish(name)
            if is_last:
                return
            if self._problem and now_s >= self._retry_s:
                self._try_again(now_s)
            elif self._clips and now_s >= self._looked_s + WAIT_S:
                self._looked_s = now_s
                self._guarded(self._save_what_fits)

    def _take(self, work: Any) -> None:
        if isinstance(work, _Raw):
            work = Piece(work.captured_s, encode_jpeg(work.picture, QUALITY))
        if isinstance(work, Piece):
            self._keep(work)
            self._add(work)
        elif isinstance(work, _Begin):
            self._begin(work)
        elif isinstance(work, _End):
            if work.id in self._clips:
                each = self._clips[work.id]
                each.until_s = min(each.until_s, work.until_s)
        else:
            for name in list(self._clips):
                self._finish(name)
            self._template, self._ring, self._ring_bytes = work.template, deque(), 0

    def _add(self, piece: Piece) -> None:
        for name, each in list(self._clips.items()):
            if piece.captured_s > each.until_s:
                self._finish(name)
            else:
                each.clip.add(piece)

    def _keep(self, piece: Piece) -> None:
        self._ring.append(piece)
        self._ring_bytes += len(piece.data)
        since_s = piece.captured_s - self._wishes.pre_s - LATE_S
        while self._ring_bytes > RING_BYTES or self._has_spare(since_s):
            self._ring_bytes -= len(self._ring.popleft().data)
            while self._ring and not self._ring[0].is_key:
                self._ring_bytes -= len(self._ring.popleft().data)

    def _has_spare(self, since_s: float) -> bool:
        """Whether what is wanted begins behind the second keyframe."""
        if not self._ring or self._ring[0].captured_s >= since_s:
            return False
        second = next((piece for index, piece in enumerate(self._ring) if index and piece.is_key), None)
        return second is not None and second.captured_s <= since_s

    def _begin(self, work: _Begin) -> None:
        if self._problem or (self.copies and self._template is None):
            return
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < LEAST_FREE_BYTES:
            raise OSError(f"{free_bytes >> 20} MB are free in {self._folder}, less than {LEAST_FREE_BYTES >> 20}")
        path = self._folder / f"{work.id}.mp4"
        clip: Clip = PacketClip(path, self._template) if self._template is not None else PictureClip(path, self._masks, self._fps)
        before = list(self._ring)
        keys = [index for index, piece in enumerate(before) if piece.is_key]
        early = [index for index in keys if before[index].captured_s <= work.from_s]
        first = (early or keys or [len(before)])[-1 if early else 0]
        now_s = before[first].captured_s if first < len(before) else time.monotonic()
        self._clips[work.id] = _Open(clip, now_s, now_s + self._wishes.max_s)
        for piece in before[first:]:
            clip.add(piece)

    def _finish(self, name: str) -> None:
        opened = self._clips.pop(name)

        def place() -> None:
            try:
                opened.clip.finish()
                self.written += 1
            except BaseException:
                opened.clip.abandon()
                raise

        self._guarded(place)

    def _save_what_fits(self) -> None:
        """Finish the clips while there is room for their ends, and stop."""
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < LAST_FREE_BYTES:
            for name in list(self._clips):
                self._finish(name)
            raise OSError(f"{free_bytes >> 20} MB are free")

    def _prepare(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_halves(self._folder)

    def _try_again(self, now_s: float) -> None:
        self._retry_s = now_s + RETRY_S
        probe = self._folder / f".probe.{os.getpid()}.part"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < LEAST_FREE_BYTES:
                return
            probe.write_bytes(bytes(1 << 16))
            probe.unlink()
        except OSError:
            return
        self._problem = ""
        self._tell("resumed", f"clips are written to {self._folder} again")

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Do it; where the disk does not, all clips are given up, once said, and everything else goes on."""
        try:
            action()
        except Exception as error:  # what FFmpeg may still come up with must not end the thread in silence
            if not isinstance(error, FAILURES):
                LOG.exception("recording to %s failed in an unforeseen way", self._folder)
            for each in self._clips.values():
                each.clip.abandon()
            self._clips.clear()
            self._retry_s = time.monotonic() + RETRY_S
            if not self._problem:
                self._problem = f"clips cannot be written to {self._folder}: {error}"
                self._tell("stopped", self._problem)

    def _tell(self, state: str, message: str) -> None:
        LOG.log(logging.WARNING if state == "stopped" else logging.INFO, "recording is %s: %s", state, message)
        with self._changed:
            self._news.append(Event("recording", {"state": state, "message": message}))
