"""The daemon's side of the vision worker: questions about pictures, the cameras' reports, live frames for those who watch."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

import anyio

from agent.http.collaborators import Frame, Picture, ServiceFailure
from agent.worker_protocol import CameraEvent, CameraFrame, Detect, Done, Report, Request, Status, View, Watch

LOG = logging.getLogger(__name__)

DETECT_S = 60.0
WATCH_CALL_S = 5.0
WATCH_S = 5.0
RENEW_S = 2.0
GLANCE_FPS, GLANCE_S = 1.0, 2.5  # of one who wants a single picture, so that many cameras can be shown small at little cost
SILENT_S = 5.0


class Worker(Protocol):
    """What is needed of a supervised worker: `call` numbers the request, sends it, waits for its end; see agent/supervision/worker.py."""

    async def call(self, message: Request, payload: bytes = b"", deadline_s: float = ...) -> tuple[Done, bytes]: ...


class _Viewer:
    """One client's latest frame: a client that is slow to read misses frames, and holds up nobody."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.frame: Frame | None = None
        self.has_frame = anyio.Event()

    def show(self, frame: Frame) -> None:
        self.frame = frame
        self.has_frame.set()

    async def next(self, timeout_s: float) -> Frame | None:
        with anyio.move_on_after(timeout_s):
            await self.has_frame.wait()
        frame, self.frame = self.frame, None
        if frame is not None:
            self.has_frame = anyio.Event()
        return frame


class VisionService:
    """Serves what `agent.http.collaborators.VisionService` asks for. `on_report` takes the worker's reports, on the event loop's thread."""

    def __init__(self, worker: Worker, on_event: Callable[[CameraEvent, bytes], None], watch_fps: float = 10.0) -> None:
        self._worker = worker
        self._on_event = on_event
        self._watch_fps = watch_fps
        self._pipelines: Mapping[str, Mapping[str, Any]] = {}
        self._reported_s = 0.0
        self._viewers: dict[tuple[str, View], set[_Viewer]] = {}
        self._renewed: dict[tuple[str, View], tuple[float, float]] = {}  # when, at how many frames a second

    async def detect(self, model: str, image: bytes, threshold: float | None, annotate: bool) -> Picture:
        """Objects in a JPEG, PNG or WebP. Raises what the worker's `call` raises: a refused picture, an unknown model, a lost worker."""
        done, jpeg = await self._worker.call(Detect(0, model, threshold, annotate, DETECT_S), image, DETECT_S)
        result = done.result
        return Picture(result["width"], result["height"], result["latency_ms"], result["detections"], jpeg if annotate else None)

    def cameras(self) -> list[dict[str, Any]]:
        """Every pipeline's last report with its `id`, by name; `state` is `unknown` where the worker has been silent for 5 s."""
        is_silent = time.monotonic() - self._reported_s > SILENT_S
        overlay = {"state": "unknown", "message": "the vision worker does not report"} if is_silent else {}
        return [{"id": name, **self._pipelines[name], **overlay} for name in sorted(self._pipelines)]

    async def snapshot(self, camera: str, view: View = "drawn") -> bytes:
        """The next frame as JPEG; waits for it without a limit of its own."""
        async with aclosing(self._frames(camera, view, GLANCE_FPS)) as frames:
            async for frame in frames:
                return frame.jpeg
        raise ServiceFailure("internal", f"camera {camera!r} ended")

    def frames(self, camera: str, view: View = "drawn") -> AsyncGenerator[Frame, None]:
        """Frames, the newest at each turn, until the caller stops. The worker encodes only while somebody iterates here.

        Raises what `call` raises when the camera is not there, or the worker is lost.
        """
        return self._frames(camera, view, self._watch_fps)

    async def _frames(self, camera: str, view: View, fps: float) -> AsyncGenerator[Frame, None]:
        viewer = _Viewer(fps)
        viewers = self._viewers.setdefault((camera, view), set())
        viewers.add(viewer)
        try:
            while True:
                await self._renew(camera, view)
                frame = await viewer.next(RENEW_S)
                if frame is not None:
                    yield frame
        finally:
            viewers.discard(viewer)
            if not viewers and self._viewers.get((camera, view)) is viewers:
                del self._viewers[camera, view]
                self._renewed.pop((camera, view), None)

    async def _renew(self, camera: str, view: View) -> None:
        now_s, fps = time.monotonic(), max(viewer.fps for viewer in self._viewers[camera, view])
        renewed_s, renewed_fps = self._renewed.get((camera, view), (-WATCH_S, 0.0))
        if now_s - renewed_s < RENEW_S and fps <= renewed_fps:
            return
        self._renewed[camera, view] = (now_s, fps)
        watch = Watch(0, camera, fps, WATCH_S if fps > GLANCE_FPS else GLANCE_S, view)
        try:
            await self._worker.call(watch, b"", WATCH_CALL_S)
        except BaseException:
            self._renewed.pop((camera, view), None)  # the next viewer asks again, instead of waiting for nothing
            raise

    def on_report(self, report: Report, payload: bytes) -> None:
        """Take what the worker says unasked; never blocks."""
        if isinstance(report, CameraFrame):
            frame = Frame(payload, report.detections, report.sequence)
            for viewer in self._viewers.get((report.pipeline, report.view), ()):
                viewer.show(frame)
        elif isinstance(report, CameraEvent):
            self._on_event(report, payload)
        elif isinstance(report, Status):
            self._pipelines, self._reported_s = report.pipelines, time.monotonic()
