"""The worker's loop: one thread works, a second one reads the socket, and services answer what arrives.

    drain the inbox → let every service step once → report → block on the inbox if nobody had work

The loop guarantees one Done or Failed for a request that raises; everything else a service answers itself, at once or steps later.
"""

from __future__ import annotations

import importlib
import os
import platform
import socket
import threading
import time
import traceback
from importlib import metadata
from typing import Any, Callable, Dict, Mapping, Optional, Protocol, Tuple, Type

from agent.worker.inbox import Inbox
from agent.worker_protocol import (
    HEADER,
    Cancel,
    CloseModel,
    Detect,
    Done,
    Encode,
    Failed,
    Generate,
    OpenModel,
    Pace,
    ProtocolError,
    Ready,
    Report,
    Shutdown,
    StartPipeline,
    Status,
    StopPipeline,
    Watch,
    decode_message,
    encode_frame,
    frame_lengths,
)
from models.engines import EngineError, TooLittleMemory
from models.manifest import ManifestError
from models.record import RecordError

STATUS_EVERY_S = 1.0
EXIT_GRACE_S = 5.0
REPORTED_VERSIONS = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "opencv-python", "opencv-python-headless", "av")


class Refusal(RuntimeError):
    """A service does not do what it is asked; the loop answers Failed with the same fields. Codes: see worker_protocol.Failed."""

    def __init__(self, code: str, message: str, retry_after_s: Optional[float] = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class Emit(Protocol):
    """Write one report; callable from any thread, blocks while the daemon does not read, drops when it is gone."""

    def __call__(self, report: Report, payload: bytes = b"") -> None: ...


class Service(Protocol):
    """One kind of work. Constructed as `Service(emit, wake)`; only `emit` and `wake` may be called from other threads than the loop's.

    handles  the message types it takes. Cancel among them: the service ends the target with Failed("cancelled") if it still has it; the
             Cancel itself is answered by the loop
    wake     lets an idle loop call `step` now, for instance when a camera thread has a new frame
    """

    handles: Tuple[Type[Any], ...]

    def handle(self, message: Any, payload: bytes) -> None:
        """Take a request and answer it with `emit`, now or in a later `step`.

        Raises Refusal, EngineError, ManifestError or RecordError, which become the Failed of this request; anything else becomes
        Failed("internal"). Must not have answered the request if it raises.
        """
        ...

    def step(self) -> bool:
        """Do one short piece of work; True if there may be more at once. An error that leaves it ends the worker."""
        ...

    def status(self) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, Dict[str, Any]]]:
        """(models, pipelines): plain JSON values by name."""
        ...

    def close(self) -> None: ...


# Modules are imported when the first model of their task is opened: the text worker never loads OpenCV, nor the vision worker the sampler.
SERVICES: Dict[str, Tuple[str, str]] = {
    "text": ("agent.worker.text", "TextService"),
    "encoder": ("agent.worker.encoder", "EncoderService"),
    "vision": ("agent.worker.vision", "VisionService"),
}
TASKS: Dict[str, str] = {"generation": "text", "embedding": "encoder", "classification": "encoder", "detection": "vision"}
ROUTES: Dict[Type[Any], str] = {
    Generate: "text",
    Encode: "encoder",
    Detect: "vision",
    StartPipeline: "vision",
    StopPipeline: "vision",
    Watch: "vision",
    Pace: "vision",
}


class Loop:
    """Serves one daemon over `connection` until it asks to end, or is gone."""

    def __init__(self, connection: socket.socket, services: Optional[Mapping[str, Tuple[str, str]]] = None) -> None:
        self._connection = connection
        self._table = SERVICES if services is None else services
        self._inbox = Inbox()
        self._services: Dict[str, Service] = {}
        self._homes: Dict[str, str] = {}
        self._open: Dict[int, str] = {}
        self._sending = threading.Lock()
        self._busy_s = 0.0

    def run(self) -> None:
        """Block until the end; returns after Shutdown, `end`, or the end of the connection."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        self.emit(Ready(os.getpid(), platform.python_version(), _versions()))
        try:
            self._serve()
        finally:
            for service in self._services.values():
                service.close()

    def end(self) -> None:
        """Let `run` return after the step it is in; may be called from a signal handler."""
        self._inbox.close()

    def _serve(self) -> None:
        has_work = False
        status_at = time.monotonic()
        while not self._inbox.is_closed:
            frames = self._inbox.take(0.0 if has_work else max(0.0, status_at - time.monotonic()))
            began = time.monotonic()
            for message, payload in frames:
                self._dispatch(message, payload)
            has_work = any([service.step() for service in self._services.values()])  # noqa: C419  # every service steps, none is skipped
            now = time.monotonic()
            self._busy_s += now - began
            if now >= status_at:
                status_at = now + STATUS_EVERY_S
                self._report_status()

    def emit(self, report: Report, payload: bytes = b"") -> None:
        frame = encode_frame(report, payload)
        with self._sending:
            if isinstance(report, (Done, Failed)):
                self._open.pop(report.request, None)
            try:
                self._connection.sendall(frame)
            except OSError:  # the daemon is gone, and with it everybody who could want this
                self._inbox.close()

    def _read(self) -> None:
        try:
            while True:
                json_bytes, payload_bytes = frame_lengths(self._receive(HEADER.size))
                message = decode_message(self._receive(json_bytes))
                self._inbox.put((message, self._receive(payload_bytes)))
        except (EOFError, OSError):
            pass
        except ProtocolError:
            traceback.print_exc()
        self._inbox.close()
        time.sleep(EXIT_GRACE_S)
        os._exit(70)  # the daemon is gone and the loop is stuck in a step: nobody else will end this process

    def _receive(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        got = 0
        while got < size:
            count = self._connection.recv_into(view[got:])
            if count == 0:
                raise EOFError
            got += count
        return bytes(data)

    def _dispatch(self, message: Any, payload: bytes) -> None:
        try:
            self._route(message, payload)
        except Refusal as refusal:
            self.emit(Failed(message.request, refusal.code, str(refusal), refusal.retry_after_s))
        except EngineError as error:
            self.emit(Failed(message.request, "memory" if isinstance(error, TooLittleMemory) else "engine", str(error)))
        except (ManifestError, RecordError) as error:
            self.emit(Failed(message.request, "invalid", str(error)))
        except Exception as error:  # noqa: BLE001  # a bug in one request must not take the others with it
            traceback.print_exc()
            self.emit(Failed(message.request, "internal", f"{type(error).__name__}: {error}"))

    def _route(self, message: Any, payload: bytes) -> None:
        if isinstance(message, Shutdown):
            self.emit(Done(message.request))
            self._inbox.close()
            return
        if isinstance(message, Cancel):
            self._cancel(message)
            return
        name = self._home(message)
        service = self._service(name) if isinstance(message, (OpenModel, StartPipeline)) else self._services.get(name)
        if service is None:
            raise Refusal("unknown_model", f"{type(message).__name__}: nothing is open in this worker that could answer it")
        if not isinstance(message, service.handles):
            raise Refusal("invalid", f"{type(message).__name__} is not a request of the {name} service")
        with self._sending:
            self._open[message.request] = name
        service.handle(message, payload)
        if isinstance(message, OpenModel):
            self._homes[message.model] = name
        elif isinstance(message, CloseModel):
            self._homes.pop(message.model, None)

    def _home(self, message: Any) -> str:
        if isinstance(message, OpenModel):
            task = message.manifest.get("task")
            if task not in TASKS:
                raise Refusal("invalid", f"task {task!r} of model {message.model} is not one of {', '.join(TASKS)}")
            if self._homes.get(message.model, TASKS[task]) != TASKS[task]:
                raise Refusal("invalid", f"model {message.model} is open with another task; close it first")
            return TASKS[task]
        if isinstance(message, CloseModel):
            if message.model not in self._homes:
                raise Refusal("unknown_model", f"model {message.model} is not open")
            return self._homes[message.model]
        if type(message) not in ROUTES:
            raise Refusal("invalid", f"{type(message).__name__} is not a request")
        return ROUTES[type(message)]

    def _cancel(self, message: Cancel) -> None:
        service = self._services.get(self._open.get(message.target, ""))
        if service is not None and Cancel in service.handles:
            service.handle(message, b"")
        self.emit(Done(message.request))

    def _service(self, name: str) -> Service:
        if name not in self._services:
            if name not in self._table:
                raise Refusal("invalid", f"this worker has no {name} service")
            module, factory = self._table[name]
            build: Callable[[Emit, Callable[[], None]], Service] = getattr(importlib.import_module(module), factory)
            self._services[name] = build(self.emit, self._inbox.wake)
        return self._services[name]

    def _report_status(self) -> None:
        models: Dict[str, Dict[str, Any]] = {}
        pipelines: Dict[str, Dict[str, Any]] = {}
        for service in self._services.values():
            held, running = service.status()
            models.update(held)
            pipelines.update(running)
        self.emit(Status(models, pipelines, self._busy_s, _resident_bytes()))


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:  # noqa: PTH123  # read once a second; Path.read_text costs three times as much
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _versions() -> Dict[str, str]:
    versions = ((name, _version(name)) for name in REPORTED_VERSIONS)
    return {name: version for name, version in versions if version is not None}


def _version(name: str) -> Optional[str]:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
