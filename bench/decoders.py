"""The same weights behind several runtimes, each in a process of its own: our scheduler and engine, and the peers'.

Each decoder has `prefill(prompt)` and `decode(prompts, steps)`, which return a Timing; sequences never end before their time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from bench.decoder_peers import LlamaCpp, OnnxRuntimeGenai, Transformers
from bench.report import busy_s
from bench.timing import Decoder, Prompt, Room, Timing

START_S, ANSWER_S = 300.0, 600.0


class Ours:
    """Scheduler and engine as the worker runs them; its pieces of prompts and its sampling are in the times."""

    def __init__(self, room: Room, spinning: bool = False) -> None:
        from models.engines import EngineOptions, open_generation_engine

        options = EngineOptions(threads=room.threads, spinning=spinning, slots=room.slots, context_tokens=room.context_tokens)
        self._engine = open_generation_engine(room.path, options)
        self._numbers = itertools.count()
        self._most = room.context_tokens
        self._start(speculates=False)

    def prefill(self, prompt: Prompt) -> Timing:
        self._add(prompt, 1)
        began_s = time.perf_counter()
        outputs: list[Any] = []
        while not self._scheduler.is_idle:
            outputs += self._scheduler.step()
        seconds = time.perf_counter() - began_s
        if outputs[-1].cached_tokens:
            raise RuntimeError(f"{outputs[-1].cached_tokens} tokens of the prompt were remembered: this is not the time of a new prompt")
        return Timing(len(prompt), seconds)

    def echo(self, prompt: Prompt, tokens: int, speculates: bool) -> Timing:
        """Tokens after the first, with guesses of what the text repeats or without."""
        self._start(speculates)
        self._add(prompt, tokens)
        said: list[int] = []
        began_s = 0.0
        while not self._scheduler.is_idle:
            for output in self._scheduler.step():
                began_s = began_s or time.perf_counter()
                said += output.tokens
        seconds = time.perf_counter() - began_s
        self._start(speculates=False)
        return Timing(len(said) - 1, seconds, tuple(said))

    def first_again(self, prompt: Prompt, shared: int) -> Timing:
        """The first token of `prompt` after one that begins with the same `shared` tokens."""
        self._start(speculates=False)
        self._until_first(self._add([*prompt[:shared], *reversed(prompt[shared:])], 1))
        return self._until_first(self._add(prompt, 1))

    def first_beside(self, prompt: Prompt, long: Prompt) -> Timing:
        """The first token of `prompt` while `long` is being read; without `long`, alone."""
        self._start(speculates=False)
        if long:
            self._add(long, 1)
            self._scheduler.step()
        timing = self._until_first(self._add(prompt, 1))
        self._start(speculates=False)
        return timing

    def _start(self, speculates: bool) -> None:
        """A scheduler that remembers nothing."""
        from models.tasks.generation.scheduler import Scheduler, SchedulerSettings

        for slot in range(self._engine.slots):
            self._engine.truncate(slot, 0)
        self._scheduler = Scheduler(self._engine, SchedulerSettings(speculates=speculates))

    def _until_first(self, number: int) -> Timing:
        began_s = time.perf_counter()
        while all(output.number != number for output in self._scheduler.step()):
            pass
        return Timing(1, time.perf_counter() - began_s)

    def decode(self, prompts: Sequence[Prompt], steps: int) -> Timing:
        numbers = [self._add(prompt, self._most) for prompt in prompts]
        waiting, first, count = set(numbers), [], 0
        while waiting:
            outputs = self._scheduler.step()
            waiting -= {output.number for output in outputs if output.tokens}
            first += [token for output in outputs for token in output.tokens if output.number == numbers[0]]
        began_s = time.perf_counter()
        for _ in range(steps):
            for output in self._scheduler.step():
                count += len(output.tokens)
                if output.number == numbers[0]:
                    first += output.tokens
        seconds = time.perf_counter() - began_s
        for number in numbers:
            self._scheduler.cancel(number)
        while not self._scheduler.is_idle:
            self._scheduler.step()
        return Timing(count, seconds, tuple(first[:steps]))

    def _add(self, prompt: Prompt, max_tokens: int) -> int:
        from models.tasks.generation.sequence import GenerationRequest

        number = next(self._numbers)
        self._scheduler.add(GenerationRequest(number, tuple(prompt), max_tokens))
        return number


OPEN: dict[str, Callable[[Room], Decoder]] = {
    "hotspare native": Ours,
    "hotspare native spinning": lambda room: Ours(room, spinning=True),
    "hotspare native, 8 bits": Ours,
    "hotspare onnxruntime": Ours,
    "hotspare, long context": Ours,
    "transformers float32": Transformers,
    "llama.cpp": LlamaCpp,
    "llama.cpp Q4_0": LlamaCpp,
    "onnxruntime-genai int4": OnnxRuntimeGenai,
}


@dataclass(frozen=True)
class Turn:
    """A timing and what happened beside it. neighbours: cores that other processes used meanwhile."""

    timing: Timing
    neighbours: float
    peak_mb: float


class Child:
    """A decoder in a process of its own, so that no runtime's waiting threads or memory count for another's. A context manager."""

    def __init__(self, way: str, room: Room) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        self._way = way
        self._process = spawn.Process(target=_serve, args=(theirs, way, room), daemon=True)

    def __enter__(self) -> Child:
        self._process.start()
        self._receive(START_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.join()

    def ask(self, method: str, *arguments: object) -> Turn:
        """Run one method of the decoder. Raises RuntimeError with the child's words."""
        before_s, began_s = busy_s(), time.perf_counter()
        self._ours.send((method, arguments))
        timing, cpu_s, peak_mb = self._receive(ANSWER_S)
        others_s = busy_s() - before_s - cpu_s
        return Turn(timing, max(0.0, others_s / (time.perf_counter() - began_s)), peak_mb)

    def _receive(self, timeout_s: float) -> Any:
        try:
            answer = self._ours.recv() if self._ours.poll(timeout_s) else f"no answer within {timeout_s:g} s"
        except EOFError:
            answer = "its process has ended"
        if isinstance(answer, str):
            raise RuntimeError(f"{self._way}: {answer}")
        return answer


def _serve(connection: Connection, way: str, room: Room) -> None:
    os.environ["OMP_NUM_THREADS"] = str(room.threads)
    try:
        decoder = OPEN[way](room)
        connection.send(())
        while True:
            method, arguments = connection.recv()
            before_s = time.process_time()
            timing = getattr(decoder, method)(*arguments)
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            connection.send((timing, time.process_time() - before_s, peak_mb))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  # whatever a runtime raises is told to the parent, which ends
        connection.send(f"{type(error).__name__}: {error}")
