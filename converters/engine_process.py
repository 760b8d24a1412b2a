"""The parent's side of nested processes: starting one under the worker's interpreter, and engines that run there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from converters.evaluate import read_arrays, read_line, write_arrays, write_line
from models.engines import EngineError, EngineOptions, SlotTokens, TensorSpec

CHILD = Path(__file__).parent / "child.py"
# They speak of our interpreter; another one would take our site-packages for its own.
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
END_WAIT_S = 0.5


def start_child(python: Path, module: str) -> subprocess.Popen[bytes]:
    """`python -m module` with pipes, in our process group and with our niceness; what it logs goes where our log goes."""
    dropped = () if str(python) == sys.executable else NOT_INHERITED
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    command = [str(python), str(CHILD), module]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def end_child(child: subprocess.Popen[bytes]) -> None:
    """Give a child that has said all a moment to end, then end it."""
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            # Closing flushes what the child never read; it is gone or going.
            try:
                stream.close()
            except OSError:
                continue
    try:
        child.wait(END_WAIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


class _Process:
    """One engine in a process of its own, opened by `with`. Raises EngineError wherever that process does or dies."""

    provider: str

    def __init__(self, python: Path, folder: Path, task: str, options: EngineOptions) -> None:
        self._python = python
        self._request = {"folder": str(folder), "task": task, "options": asdict(options)}

    def __enter__(self) -> Any:
        self._child = start_child(self._python, "converters.evaluate")
        try:
            write_line(self._stdin, self._request)
            self._opened(self._answer())
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise self._died() from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if isinstance(self._child, subprocess.Popen):
            end_child(self._child)

    def _opened(self, facts: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _call(self, call: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> dict[str, NDArray[Any]]:
        try:
            if arrays is None:
                write_line(self._stdin, call)
            else:
                write_arrays(self._stdin, call, arrays)
            return read_arrays(self._stdout, int(self._answer()["bytes"]))
        except (OSError, ValueError) as error:
            raise self._died() from error

    def _answer(self) -> dict[str, Any]:
        answer = read_line(self._stdout)
        if answer is None:
            raise self._died()
        if "error" in answer:
            raise EngineError(str(answer["error"]))
        return answer

    def _died(self) -> EngineError:
        end_child(self._child)
        return EngineError(f"the process that ran {self._request['folder']} ended with status {self._child.returncode}; its log says why")

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._child.stdin is not None  # noqa: S101  (started with a pipe)
        return self._child.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._child.stdout is not None  # noqa: S101  (started with a pipe)
        return self._child.stdout


class EngineProcess(_Process):
    """A stateless engine, as `models.engines.Engine`."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._call({"call": "run"}, inputs)

    def _opened(self, facts: Mapping[str, Any]) -> None:
        self.provider = str(facts["provider"])
        self.inputs, self.outputs = (
            tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in facts[side]) for side in ("inputs", "outputs")
        )


class GenerationProcess(_Process):
    """A decoder, as far as the gate needs `models.engines.GenerationEngine`."""

    vocabulary: int
    slots: int
    context_tokens: int

    def step(self, batch: Sequence[SlotTokens]) -> NDArray[np.float32]:
        return self._call({"call": "step", "batch": [[item.slot, [int(token) for token in item.tokens], item.adapter] for item in batch]})[
            "logits"
        ]

    def truncate(self, slot: int, length: int) -> None:
        self._call({"call": "truncate", "slot": slot, "length": length})

    def _opened(self, facts: Mapping[str, Any]) -> None:
        self.provider = str(facts["provider"])
        self.vocabulary, self.slots, self.context_tokens = (int(facts[name]) for name in ("vocabulary", "slots", "context_tokens"))
