"""A real worker process whose text service misbehaves on request: the model's name says how."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from agent.worker.loop import Emit, Refusal  # noqa: E402
from agent.worker_protocol import Cancel, Done, Failed, Generate, OpenModel, Tokens  # noqa: E402
from models.engines import DeviceLost, EngineError  # noqa: E402
from models.engines.device_memory import open_device_memory  # noqa: E402


class ChaosService:
    handles: tuple[Any, ...] = (OpenModel, Generate, Cancel)

    def __init__(self, emit: Emit, wake: Callable[[], None]) -> None:
        self._emit = emit
        self._running: list[tuple[Generate, list[int]]] = []
        self._cancelled: list[int] = []

    def handle(self, message: Any, payload: bytes) -> None:
        if isinstance(message, OpenModel):
            time.sleep(float(message.options.get("seconds", 0)))
            self._emit(Done(message.request))
        elif isinstance(message, Cancel):
            self._cancelled.append(message.target)
            self._running = [item for item in self._running if item[0].request != message.target]
            self._emit(Failed(message.target, "cancelled", "cancelled"))
        elif message.model in MISDEEDS:
            MISDEEDS[message.model]()
        else:
            self._running.append((message, list(range(message.max_tokens))))

    def step(self) -> bool:
        for item in list(self._running):
            message, tokens = item
            if message.model == "silent":
                continue
            if tokens:
                self._emit(Tokens(message.request, (tokens.pop(0),)))
            else:
                self._running.remove(item)
                self._emit(Done(message.request, {"finish": "length"}))
        if self._running:
            time.sleep(0.002)
        return bool(self._running)

    def status(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        return {"chaos": {"cancelled": list(self._cancelled), "running": len(self._running)}}, {}

    def close(self) -> None:
        sys.stderr.write("closed cleanly\n")


def hang() -> None:
    while True:
        time.sleep(3600)


def fill_output() -> None:
    for number in range(5000):
        sys.stderr.write(f"line {number} {'x' * 200}\n")
    os._exit(3)


def talk_nonsense() -> None:
    os.write(int(sys.argv[1]), b"\xff" * 64)
    hang()


def refuse() -> None:
    raise Refusal("busy", "too much to do")


def fail_in_engine() -> None:
    raise EngineError("the engine is broken")


def lose_the_device() -> None:
    raise DeviceLost("CUDA: cuStreamSynchronize failed with error 700 (an illegal memory access); the context of this process is lost")


def fault_on_the_device() -> None:
    from tests.gpu.cuda_fault import fault

    fault("auto")


def use_the_device() -> None:
    memory = open_device_memory("auto")
    address = memory.allocate(1 << 20)
    memory.zero(address, 1 << 20)
    memory.synchronize()
    memory.free(address)
    memory.close()
    raise Refusal("busy", "the device answers")


def have_a_bug() -> None:
    raise ZeroDivisionError("a bug")


MISDEEDS: dict[str, Callable[[], Any]] = {
    "segfault": lambda: ctypes.string_at(0),
    "hang": hang,
    "exit": lambda: os._exit(3),
    "flood": fill_output,
    "nonsense": talk_nonsense,
    "refuse": refuse,
    "engine": fail_in_engine,
    "bug": have_a_bug,
    "lost device": lose_the_device,
    "cuda fault": fault_on_the_device,
    "cuda": use_the_device,
}


if __name__ == "__main__":
    from agent.worker.__main__ import main

    if os.environ.get("CHAOS_AT_START"):
        import a_module_that_is_missing  # type: ignore[import-not-found]  # noqa: F401  # the point of this start

    sys.exit(main(sys.argv[1:], {"text": ("tests.agent.supervision.chaos_worker", "ChaosService")}))
