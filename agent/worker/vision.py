"""The vision service of a worker: detectors, pictures that are asked about, and cameras that run by themselves."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from agent.worker.batching import Candidate, is_worth_waiting, oldest_alike, window_s
from agent.worker.camera import Camera
from agent.worker.events import Event
from agent.worker.loop import Emit, Refusal
from agent.worker.pipeline import Look, Pipeline, PipelineSettings, Taken
from agent.worker_protocol import (
    CameraEvent,
    CameraFrame,
    CloseModel,
    Detect,
    Done,
    OpenModel,
    Pace,
    StartPipeline,
    StopPipeline,
    Watch,
)
from models.engines import Engine, EngineError, EngineOptions, open_engine
from models.manifest import DetectionManifest, ManifestError, manifest_from_mapping
from models.pictures import PictureError, decode_picture, draw_detections, encode_jpeg
from models.record import RecordError, from_mapping
from models.tasks.detection import Detector

WATCH_LIMIT_S = 60.0
NEWS = 0.2  # weight of the last run in the time that one is reckoned to take


@dataclass
class _Opened:
    engine: Engine
    detector: Detector
    detected: int = 0
    latency_ms: float = 0.0
    execution_s: float = 0.0

    def ran(self, seconds: float) -> None:
        self.execution_s += (seconds - self.execution_s) * (NEWS if self.execution_s else 1.0)


class VisionService:
    """One detector per model, shared by all pipelines that name it. Frames are served longest overdue first, one run in each step."""

    handles = (OpenModel, CloseModel, Detect, StartPipeline, StopPipeline, Watch, Pace)

    def __init__(self, emit: Emit, wake: Callable[[], None]) -> None:
        self._emit = emit
        self._wake = wake
        self._arrival = threading.Event()
        self._models: Dict[str, _Opened] = {}
        self._pipelines: Dict[str, Pipeline] = {}
        self._paused: Dict[str, PipelineSettings] = {}
        self._pace_fps: Optional[float] = None
        self._leaving: List[Camera] = []
        self._ended: List[Pipeline] = []

    def handle(self, message: Any, payload: bytes) -> None:
        if isinstance(message, OpenModel):
            self._open(message)
        elif isinstance(message, CloseModel):
            self._close_model(message)
        elif isinstance(message, Detect):
            self._detect(message, payload)
        elif isinstance(message, StartPipeline):
            self._start(message)
        elif isinstance(message, StopPipeline):
            if self._paused.pop(message.pipeline, None) is None:
                self._pipeline(message.pipeline)
                self._end(message.pipeline)
            self._emit(Done(message.request))
        elif isinstance(message, Pace):
            self._pace(message)
        else:
            self._watch(message)

    def step(self) -> bool:
        """One run of a detector: of the frame that has waited longest since its pipeline was due, with others of its kind where the model
        takes several at once. For one that is about to come a run that has room waits a little."""
        until_s: Optional[float] = None
        while True:
            self._arrival.clear()
            now_s = time.monotonic()
            candidates = [self._candidate(name, pipeline, now_s) for name, pipeline in self._pipelines.items()]
            batch = oldest_alike(candidates)
            if not batch:
                return False
            opened = self._models[batch[0].kind[0]]
            most = opened.detector.batch_max
            until_s = until_s if until_s is not None else now_s + window_s(opened.execution_s)
            if now_s >= until_s or not is_worth_waiting(batch, candidates, most, until_s):
                self._look([each.name for each in batch[:most]], opened)
                return True
            self._arrival.wait(until_s - now_s)

    def _candidate(self, name: str, pipeline: Pipeline, now_s: float) -> Candidate:
        self._tell(name, pipeline.camera_events())
        height, width = pipeline.input_size
        return Candidate(name, (pipeline.settings.model, height, width), pipeline.due_s(now_s), pipeline.next_s(now_s))

    def _look(self, names: Sequence[str], opened: _Opened) -> None:
        alike: Dict[Tuple[int, int], List[Tuple[str, Taken]]] = {}
        for name in names:
            taken = self._pipelines[name].take()
            if taken is not None and taken.is_still:
                self._show(name, self._pipelines[name].follow(taken, ()))
            elif taken is not None:
                alike.setdefault(opened.detector.input_size(*taken.picture.shape[:2]), []).append((name, taken))
        # One kind, but for a camera that has just changed its size.
        for batch in alike.values():
            self._run([(name, taken) for name, taken in batch if self._pipelines[name].is_fresh(taken)], opened)

    def _run(self, batch: Sequence[Tuple[str, Taken]], opened: _Opened) -> None:
        if not batch:
            return
        began_s = time.monotonic()
        least = min(self._pipelines[name].unsure for name, _ in batch)
        try:
            found = opened.detector.detect_many([taken.picture for _, taken in batch], least)
        except EngineError as error:
            for name, _ in batch:
                self._pipelines[name].fail(error)
            return
        opened.ran(time.monotonic() - began_s)
        for (name, taken), each in zip(batch, found):
            self._show(name, self._pipelines[name].follow(taken, each))

    def _show(self, name: str, look: Look) -> None:
        self._tell(name, look.events)
        for view, jpeg in look.pictures:
            found = tuple(mapping_of(track, track.track) for track in look.tracks)
            self._emit(CameraFrame(name, look.sequence, round(look.age_ms, 1), found, view), jpeg)

    def _tell(self, name: str, events: Sequence[Event]) -> None:
        for event in events:
            self._emit(CameraEvent(name, event.kind, dict(event.data)), event.payload)

    def status(self) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, Dict[str, Any]]]:
        models = {
            name: {
                "task": "detection",
                "provider": opened.engine.provider,
                "pipelines": sorted(key for key, each in self._pipelines.items() if each.settings.model == name),
                "detected": opened.detected,
                "latency_ms": round(opened.latency_ms, 2),
            }
            for name, opened in self._models.items()
        }
        paused = {
            name: {"source": each.parsed_source().label, "model": each.model, "state": "paused", "message": ""}
            for name, each in self._paused.items()
        }
        return models, {**{name: pipeline.status() for name, pipeline in self._pipelines.items()}, **paused}

    def close(self) -> None:
        for name in list(self._pipelines):
            self._end(name)
        for pipeline in self._ended:
            pipeline.join()
        for camera in self._leaving:  # last: a slow one may be in a read for longer than there is time
            camera.join()
        for opened in self._models.values():
            opened.engine.close()
        self._models.clear()

    def _open(self, message: OpenModel) -> None:
        manifest = manifest_from_mapping(message.manifest)
        if not isinstance(manifest, DetectionManifest):
            raise ManifestError(f"{manifest.name} is a model for {manifest.task}, not for detection")
        options = from_mapping(EngineOptions, message.options)
        engine = open_engine(Path(message.folder), options)
        before = self._models.pop(message.model, None)
        opened = self._models[message.model] = _Opened(engine, Detector(engine, manifest))
        for pipeline in self._pipelines.values():
            if pipeline.settings.model == message.model:
                pipeline.detector = opened.detector
        if before is not None:
            before.engine.close()
        self._emit(Done(message.request, {"provider": engine.provider}))

    def _close_model(self, message: CloseModel) -> None:
        opened = self._model(message.model)
        users = sorted(name for name, pipeline in self._pipelines.items() if pipeline.settings.model == message.model)
        if users:
            raise Refusal("busy", f"model {message.model} cannot be closed while pipelines use it: {', '.join(users)}; stop them first")
        del self._models[message.model]
        opened.engine.close()
        self._emit(Done(message.request))

    def _detect(self, message: Detect, payload: bytes) -> None:
        opened = self._model(message.model)
        if message.threshold is not None and not 0 <= message.threshold <= 1:
            raise RecordError(f"threshold {message.threshold} is not in 0..1")
        began_s = time.monotonic()
        try:
            picture = decode_picture(payload)
        except PictureError as error:
            raise RecordError(str(error)) from error
        found = opened.detector.detect(picture, message.threshold)
        jpeg = encode_jpeg(draw_detections(picture, found), 88) if message.annotate else b""
        opened.latency_ms, opened.detected = (time.monotonic() - began_s) * 1000, opened.detected + 1
        result = {
            "detections": [mapping_of(each) for each in found],
            "width": picture.shape[1],
            "height": picture.shape[0],
            "latency_ms": round(opened.latency_ms, 2),
        }
        self._emit(Done(message.request, result), jpeg)

    def _start(self, message: StartPipeline) -> None:
        settings = from_mapping(PipelineSettings, dict(message.settings, id=message.pipeline))
        settings.check()
        opened = self._model(settings.model)
        running = self._pipelines.get(message.pipeline)
        if not settings.enabled:
            self._pause(settings)
            self._emit(Done(message.request, {"source": settings.parsed_source().label, "is_reopened": False}))
            return
        self._paused.pop(message.pipeline, None)
        if running is not None and settings.has_source_of(running.settings):
            running.change(settings, opened.detector)
            self._emit(Done(message.request, {"source": running.camera.source.label, "is_reopened": False}))
            return
        source = settings.parsed_source()
        if running is not None:
            self._end(message.pipeline)
        camera = Camera(source, self._arrived, is_patient=settings.is_patient)
        pipeline = self._pipelines[message.pipeline] = Pipeline(settings, opened.detector, camera)
        pipeline.slow_to(self._pace_fps)
        pipeline.camera.start()
        self._emit(Done(message.request, {"source": source.label, "is_reopened": True}))

    def _arrived(self) -> None:
        self._arrival.set()
        self._wake()

    def _pause(self, settings: PipelineSettings) -> None:
        """Close the camera, and remember that it is wanted, but not now."""
        before = self._pipelines[settings.id].status()["state"] if settings.id in self._pipelines else ""
        if before:
            self._end(settings.id)
        if settings.id not in self._paused:
            self._tell(settings.id, [Event("camera", {"state": "paused", "before": before, "message": ""})])
        self._paused[settings.id] = settings

    def _pace(self, message: Pace) -> None:
        if message.fps is not None and not 0 <= message.fps <= 120:
            raise RecordError(f"fps {message.fps} is not in 0..120")
        self._pace_fps = message.fps
        for pipeline in self._pipelines.values():
            pipeline.slow_to(message.fps)
        self._emit(Done(message.request))

    def _watch(self, message: Watch) -> None:
        watchers = self._pipeline(message.pipeline).watchers[message.view]
        if not 0 < message.fps <= 60:
            raise RecordError(f"fps {message.fps} is not in 0..60")
        watchers.until_s = time.monotonic() + min(message.seconds, WATCH_LIMIT_S)
        watchers.period_s = 1 / message.fps
        self._emit(Done(message.request))

    def _end(self, name: str) -> None:
        pipeline = self._pipelines.pop(name)
        self._tell(name, pipeline.close())
        self._ended = [each for each in self._ended + [pipeline] if each.is_writing]
        camera = pipeline.camera
        camera.stop()
        # Its thread may be in a read with seconds to go, which the other cameras should not have to wait for.
        self._leaving = [each for each in self._leaving + [camera] if each.is_alive]

    def _model(self, name: str) -> _Opened:
        if name not in self._models:
            raise Refusal("unknown_model", f"model {name} is not open in this worker; open are {', '.join(self._models) or 'none'}")
        return self._models[name]

    def _pipeline(self, name: str) -> Pipeline:
        if name not in self._pipelines:
            raise Refusal("invalid", f"there is no pipeline {name}; running are {', '.join(self._pipelines) or 'none'}")
        return self._pipelines[name]


def mapping_of(found: Any, track: Optional[int] = None) -> Dict[str, Any]:
    """A detection as plain JSON: label, score, box as [x0, y0, x1, y1] in pixels, and the number of its track if it has one."""
    box: Sequence[float] = (found.x0, found.y0, found.x1, found.y1)
    values = {"label": found.label, "score": round(found.score, 4), "box": [round(value, 1) for value in box]}
    return values if track is None else dict(values, track=track)
