"""Small services behind the HTTP side: they answer by rule, so that a test can say what must come out."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import numpy as np
from numpy.typing import NDArray

from agent.http.collaborators import (
    EventView,
    Frame,
    ModelView,
    NodeSnapshot,
    Picture,
    PipelineView,
    Sampling,
    ServiceFailure,
    TextDelta,
    TokenLogprob,
    Usage,
    WorkerView,
)
from agent.mode import Allowed, Reason, Refused
from agent.protocol.wire import Mode
from agent.telemetry.generic import Reading
from agent.worker_protocol import View

# A real JPEG of 64 × 48, for a browser to show.
JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABQODxIPDRQSEBIXFRQYHjIhHhwcHj0sLiQySUBMS0dARkVQWnNiUFVtVkVGZIhlbXd7gYKBTmCNl4x9lnN+gXz/"
    "2wBDARUXFx4aHjshITt8U0ZTfHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHz/wAARCAAwAEADASIAAhEBAxEB/8QA"
    "FwABAQEBAAAAAAAAAAAAAAAAAAQCA//EACgQAAEEAAMIAgMAAAAAAAAAAAABAgMEEXOTEhQzNVNUsdIisjFRUv/EABcBAQEBAQAAAAAAAAAAAAAAAAABAgT/"
    "xAAWEQEBAQAAAAAAAAAAAAAAAAAAIUH/2gAMAwEAAhEDEQA/AIwC2SzPDXqtimkjasSrg16omO24y5UQKN+t91PqKN+t91PqKCJwUb9b7qfUUX+YWc13lQJw"
    "AECizwKmUv3cTlFngVMpfu4KnAAQKL/MLOa7ypOUX+YWc13lQuJwAECpX15YYWySSsdGxWqjY0ci/JV/pP2SgKo2KnXn0U9hsVOvPop7E4Ao2KnXn0U9jFqR"
    "JrU0rUVGve5yY/nBVOQAAAI//9k="
)

MODELS = (
    ModelView("parrot", "generation", "serving", ("deepseek-chat",), "onnx int4", "verified, mean KL 0.004", "apache-2.0"),
    ModelView("letters", "embedding", "serving", (), "onnx", "verified, cosine 0.9999"),
    ModelView("moods", "classification", "serving"),
    ModelView(
        "boxes",
        "detection",
        "serving",
        (),
        "onnx",
        "verified",
        figures={"latency_ms": 31.5, "matched_boxes": 0.975, "max_score_delta": 1.529e-6},
    ),
)


@dataclass
class Parrot:
    """Says the prompt back, one word a token. Words of the prompt move it: `boom` loses the worker at once, `fall` after one word,
    `wait` never ends."""

    started: anyio.Event = field(default_factory=anyio.Event)
    cancelled: anyio.Event = field(default_factory=anyio.Event)
    last: Sampling | None = None
    failure: Exception | None = None
    running: int = 0
    most_running: int = 0
    pace_s: float = 0.0
    before_s: float = 0.0
    late_failure: Exception | None = None
    thinks: bool = False
    told: Mapping[str, Any] = field(default_factory=dict)

    def check_room(self, model: str, tenant: str, priority: int) -> None:
        """There is always room."""

    def chat_prompt(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
    ) -> list[int]:
        self.told = {"messages": messages, "tools": tools, "thinking": thinking}
        return self.encode(model, messages[-1]["content"])

    def continued_prompt(self, model: str, messages: Sequence[Mapping[str, Any]], said: str) -> tuple[list[int], int]:
        return self.encode(model, said), len(said)

    def begins_in_thoughts(self, model: str, thinking: bool | None = None) -> bool:
        return self.thinks

    def encode(self, model: str, text: str) -> list[int]:
        if model not in ("parrot", "deepseek-chat"):
            raise ServiceFailure("unknown_model", f"there is no model {model!r}")
        return list(text.encode())

    async def generate(
        self, model: str, prompt_tokens: Sequence[int], sampling: Sampling, continues: bool = False
    ) -> AsyncIterator[TextDelta]:
        self.last = sampling
        if self.failure:
            raise self.failure
        await anyio.sleep(self.before_s)
        if self.late_failure:
            raise self.late_failure
        words = bytes(prompt_tokens).decode().split()
        if "boom" in words:
            raise ServiceFailure("worker_lost", "worker text died: SIGSEGV")
        written = 0
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for word in words[: sampling.max_tokens]:
                piece = word if written == 0 else f" {word}"
                written += 1
                yield TextDelta(piece, _logprobs(piece) if sampling.top_logprobs >= 0 else ())
                self.started.set()
                await anyio.sleep(self.pace_s)
                if word == "fall":
                    raise ServiceFailure("worker_lost", "worker text died: SIGKILL")
                if word == "wait":
                    await anyio.sleep_forever()
            finish = "length" if written < len(words) else "stop"
            yield TextDelta("", (), finish, Usage(len(words), written, 1, 0.03))
        except anyio.get_cancelled_exc_class():
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    async def embed(self, model: str, inputs: Sequence[str | Sequence[int]]) -> tuple[NDArray[np.float32], int]:
        if model != "letters":
            raise ServiceFailure("unknown_model", f"there is no model {model!r}")
        rows = [[float(len(text)), 0.1, -1e-3] for text in inputs]
        return np.array(rows, np.float32), sum(map(len, inputs))

    async def classify(self, model: str, inputs: Sequence[str]) -> Sequence[Sequence[tuple[str, float]]]:
        return [[("calm", 0.75), ("angry", 0.25)] for _ in inputs]


def _logprobs(piece: str) -> tuple[TokenLogprob, ...]:
    return (TokenLogprob(piece, piece.encode(), -0.5, ((piece, piece.encode(), -0.5), ("x", b"x", -2.0))),)


@dataclass
class Eyes:
    """A camera whose pictures are given, and a detector that finds one parcel in everything."""

    jpeg: bytes = JPEG
    watching: int = 0
    left: anyio.Event = field(default_factory=anyio.Event)
    failure: Exception | None = None
    asked: tuple[str, bytes, float | None, bool] | None = None
    report: Mapping[str, Any] = field(default_factory=lambda: {"state": "streaming", "fps": 12.0, "model": "boxes"})

    async def detect(self, model: str, image: bytes, threshold: float | None, annotate: bool) -> Picture:
        self.asked = (model, image, threshold, annotate)
        if image == b"junk":
            raise ServiceFailure("invalid", "the picture is neither JPEG nor PNG")
        found = {"label": "parcel", "score": 0.93, "box": [1.0, 2.0, 30.0, 40.0]}
        return Picture(64, 48, 12.5, [found], self.jpeg if annotate else None)

    def cameras(self) -> Sequence[Mapping[str, Any]]:
        return [{"id": "belt", **self.report}]

    async def snapshot(self, camera: str, view: View = "drawn") -> bytes:
        return self.jpeg

    async def frames(self, camera: str, view: View = "drawn") -> AsyncIterator[Frame]:
        if self.failure:
            raise self.failure
        self.watching += 1
        try:
            sequence = 0
            while True:
                yield Frame(self.jpeg, (), sequence)
                sequence += 1
                await anyio.sleep(0.05)
        finally:
            self.watching -= 1
            self.left.set()


@dataclass
class Node:
    """Holds what the node says of itself; a test changes `now`."""

    now: NodeSnapshot = field(
        default_factory=lambda: NodeSnapshot(
            node="spare-1",
            version="0.1.0",
            mode="active",
            reason="lease",
            epoch=7,
            uptime_s=4210.0,
            lease_kind="full",
            lease_left_s=73.0,
            uplink="connected",
            device=Reading(31.0, 62.3, 9216, 15657, {"gpu": 58.0, "cpu": 51.2}, 17.2, True),
            models=MODELS,
            pipelines=(
                PipelineView(
                    "belt",
                    "boxes",
                    "streaming",
                    12.1,
                    31.5,
                    {"parcel": 3, "ball": 1},
                    {"parcel": 120, "ball": 48},
                    {"parcel": 121, "ball": 48},
                ),
            ),
            workers=(WorkerView("text", "ready", 4711, 1, 315 << 20), WorkerView("vision", "ready", 4712, 0, 190 << 20)),
            events=(
                EventView(2, "2026-11-23T20:55:07Z", "lease", "info", "activated with epoch 7 for 90 s"),
                EventView(1, "2026-11-23T20:54:01Z", "worker", "warning", "worker text died: SIGSEGV; started again"),
            ),
        )
    )
    is_open: bool = True
    reason: Reason = "no_lease"

    def snapshot(self) -> NodeSnapshot:
        return self.now

    def models(self) -> Sequence[ModelView]:
        return self.now.models

    def gate(self) -> Allowed | Refused:
        return Allowed() if self.is_open else Refused(12, self.now.mode, self.reason)

    def close(self, mode: Mode = "standby") -> None:
        self.is_open = False
        self.now = replace(self.now, mode=mode, reason=self.reason, lease_left_s=None, lease_kind=None)


@dataclass
class Switch:
    on: bool = True

    async def primary_is_on(self) -> bool | None:
        return self.on

    async def switch_primary(self, on: bool) -> None:
        self.on = on


@dataclass
class Foreman:
    """Takes orders about models and writes them down; `unknown` is a model that it does not know."""

    orders: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def deploy(self, model: str, build: Mapping[str, Any]) -> str:
        if model == "unknown":
            raise ServiceFailure("unknown_model", "no model is called 'unknown'")
        self.orders.append((model, build))
        return model

    def cancel(self, model: str) -> bool:
        self.cancelled.append(model)
        return model == "parrot"
