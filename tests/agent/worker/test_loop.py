from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from agent.worker.inbox import Inbox
from agent.worker.loop import Emit, Loop
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
    Ready,
    Shutdown,
    Status,
    decode_message,
    encode_frame,
    frame_lengths,
)
from models.engines import EngineError
from models.manifest import ManifestError

BUILT: list[PingService] = []


class PingService:
    """Answers after as many steps as `max_tokens` says."""

    handles = (OpenModel, CloseModel, Generate, Cancel)

    def __init__(self, emit: Emit, wake: Any) -> None:
        self.emit, self.wake = emit, wake
        self.waiting: dict[int, int] = {}
        self.steps = 0
        self.is_closed = False
        BUILT.append(self)

    def handle(self, message: Any, payload: bytes) -> None:
        if isinstance(message, Generate):
            self.waiting[message.request] = message.max_tokens
            return
        if isinstance(message, Cancel):
            if self.waiting.pop(message.target, None) is not None:
                self.emit(Failed(message.target, "cancelled", "cancelled"))
            return
        error = {"engine": EngineError("broken"), "invalid": ManifestError("wrong"), "internal": KeyError("a bug")}.get(message.model)
        if error is not None:
            raise error
        self.emit(Done(message.request, {"threads": threading.active_count()}), payload)

    def step(self) -> bool:
        self.steps += 1
        for number in list(self.waiting):
            self.waiting[number] -= 1
            if self.waiting[number] <= 0:
                del self.waiting[number]
                self.emit(Done(number))
        return bool(self.waiting)

    def status(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        return {"ping": {"steps": self.steps}}, {}

    def close(self) -> None:
        self.is_closed = True


class Daemon:
    """Our end: sends requests, reads answers, keeps Status apart."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.statuses: list[Status] = []

    def send(self, message: Any, payload: bytes = b"") -> None:
        self.connection.sendall(encode_frame(message, payload))

    def receive(self) -> tuple[Any, bytes]:
        while True:
            json_bytes, payload_bytes = frame_lengths(self._exactly(HEADER.size))
            message = decode_message(self._exactly(json_bytes))
            payload = self._exactly(payload_bytes)
            if not isinstance(message, Status):
                return message, payload
            self.statuses.append(message)

    def ask(self, message: Any, payload: bytes = b"") -> Any:
        self.send(message, payload)
        return self.receive()[0]

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.connection.recv(size - len(data))
            assert piece, "the loop has closed its end"
            data += piece
        return data


@contextmanager
def serving() -> Iterator[Daemon]:
    """The loop in a thread of this process; it ends with Shutdown, for at the end of its socket it would end the process."""
    BUILT.clear()
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    loop = Loop(theirs, {"text": (__name__, "PingService")})
    thread = threading.Thread(target=loop.run)
    thread.start()
    daemon = Daemon(ours)
    try:
        ready, _ = daemon.receive()
        assert isinstance(ready, Ready)
        assert ready.pid == os.getpid()
        yield daemon
    finally:
        daemon.send(Shutdown(999))
        thread.join(10)
        ours.detach()  # stays open until the process ends: the reader thread takes the end of its socket for the end of the daemon
    assert not thread.is_alive()
    assert all(service.is_closed for service in BUILT)


OPEN = OpenModel(1, "ping", {"task": "generation"}, "/")


def test_every_request_gets_one_answer_and_carries_its_payload() -> None:
    with serving() as daemon:
        daemon.send(OPEN, b"payload")
        assert daemon.receive() == (Done(1, {"threads": threading.active_count()}), b"payload")
        daemon.send(Generate(2, "ping", 10**9))
        assert daemon.ask(Generate(3, "ping", 1)) == Done(3)
        assert daemon.ask(Cancel(4, 2)) == Failed(2, "cancelled", "cancelled")
        assert daemon.receive()[0] == Done(4)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (OpenModel(7, "engine", {"task": "generation"}, "/"), "engine"),
        (OpenModel(7, "invalid", {"task": "generation"}, "/"), "invalid"),
        (OpenModel(7, "internal", {"task": "generation"}, "/"), "internal"),
        (OpenModel(7, "model", {"task": "juggling"}, "/"), "invalid"),
        (OpenModel(7, "ping", {"task": "embedding"}, "/"), "invalid"),
        (OpenModel(7, "other", {"task": "detection"}, "/"), "invalid"),
        (CloseModel(7, "nobody"), "unknown_model"),
        (Encode(7, "ping", (1,)), "unknown_model"),
        (Detect(7, "ping"), "unknown_model"),
        (Done(7), "invalid"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_loop_goes_on(message: Any, code: str) -> None:
    with serving() as daemon:
        assert isinstance(daemon.ask(OPEN), Done)
        refusal = daemon.ask(message)
        assert isinstance(refusal, Failed)
        assert (refusal.request, refusal.code) == (7, code)
        assert daemon.ask(Generate(8, "ping", 1)) == Done(8)


def test_no_service_is_loaded_before_its_first_model() -> None:
    with serving() as daemon:
        assert daemon.ask(Generate(1, "ping", 1)).code == "unknown_model"
        assert BUILT == []


def test_a_cancel_ends_its_target_and_is_answered_itself() -> None:
    with serving() as daemon:
        daemon.ask(OPEN)
        daemon.send(Generate(2, "ping", 10**9))
        daemon.send(Cancel(3, 2))
        assert daemon.receive()[0] == Failed(2, "cancelled", "cancelled")
        assert daemon.receive()[0] == Done(3)
        assert daemon.ask(Cancel(4, 2)) == Done(4)
        assert daemon.ask(Cancel(5, 12345)) == Done(5)


def test_an_idle_loop_sleeps_but_reports_and_can_be_woken() -> None:
    with serving() as daemon:
        daemon.ask(OPEN)
        before, used_before = BUILT[0].steps, time.process_time()
        time.sleep(1.2)  # a second of doing nothing is what is measured
        assert BUILT[0].steps - before <= 3
        assert time.process_time() - used_before < 0.3
        steps = BUILT[0].steps
        BUILT[0].wake()
        ends_at_s = time.monotonic() + 0.5
        while BUILT[0].steps == steps and time.monotonic() < ends_at_s:
            time.sleep(0.001)
        assert BUILT[0].steps > steps
        daemon.ask(Generate(2, "ping", 1))
        assert daemon.statuses
        assert daemon.statuses[-1].memory_bytes > 1 << 20
        assert daemon.statuses[-1].busy_s < 1.0


def test_a_full_inbox_blocks_the_reader_until_there_is_room() -> None:
    inbox = Inbox(capacity=2)
    frames = [(number, b"") for number in range(5)]

    def fill() -> None:
        for frame in frames:
            inbox.put(frame)

    thread = threading.Thread(target=fill)
    thread.start()
    taken: list[Any] = []
    while len(taken) < 5:
        batch = inbox.take(5.0)
        assert 0 < len(batch) <= 2
        taken.extend(batch)
    thread.join(5)
    assert taken == frames


def test_a_closed_inbox_lets_everybody_go() -> None:
    inbox = Inbox(capacity=1)
    inbox.put((1, b""))
    thread = threading.Thread(target=inbox.put, args=((2, b""),))
    thread.start()
    inbox.close()
    thread.join(5)
    assert not thread.is_alive()
    assert inbox.take(60.0) == []
    assert inbox.is_closed
