"""`python -m converters.evaluate`: one engine, run for a parent that lives under another interpreter.

TensorRT's module exists for the interpreter of JetPack only, on JetPack 5 for Python 3.8 with numpy alone; the gate that compares
engines needs libraries which that one lacks. So the gate keeps its pre- and post-processing, and asks this child for the bare runs.

Standard input   one JSON line {"folder", "task", "options": {…fields of EngineOptions}}, then calls, each a JSON line
                     {"call": "run", "bytes": n} and n bytes of npz: one array for each input      (stateless engines)
                     {"call": "step", "batch": [[slot, [token, …], adapter], …]}                   (generation)
                     {"call": "truncate", "slot": n, "length": n}                                  (generation)
Standard output  for the first line {"provider", "inputs": [[name, dtype, shape], …], "outputs": …} or for generation {"provider",
                 "vocabulary", "slots", "context_tokens"}; for each call a JSON line {"bytes": n} and n bytes of npz (`step`: `logits`);
                 wherever something fails {"error": message}
Exit status      0 at the end of standard input; 1 if the engine could not be opened; 2 for a call that is none
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import IO, Any, Dict, Mapping, Optional

import numpy as np

from models.engines import EngineError, EngineOptions, SlotTokens, open_engine, open_generation_engine

MAX_LINE_BYTES = 16 << 20
MAX_ARRAY_BYTES = 2 << 30


def main() -> int:
    requests = sys.stdin.buffer
    # Native libraries write to descriptor 1 as they like; the answers keep a copy and give them standard error.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        try:
            return serve(requests, answers)
        except BrokenPipeError:
            return 2


def serve(requests: IO[bytes], answers: IO[bytes]) -> int:
    first = read_line(requests)
    if first is None:
        return 2
    try:
        folder, options = Path(first["folder"]), EngineOptions(**first.get("options", {}))
        is_decoder = first["task"] == "generation"
        engine: Any = open_generation_engine(folder, options) if is_decoder else open_engine(folder, options)
    except (EngineError, OSError) as error:
        write_line(answers, {"error": str(error)})
        return 1
    write_line(answers, facts_of(engine, is_decoder))
    try:
        while True:
            call = read_line(requests)
            if call is None:
                return 0
            if not answer(engine, call, requests, answers):
                return 2
    finally:
        engine.close()


def facts_of(engine: Any, is_decoder: bool) -> Dict[str, Any]:
    if is_decoder:
        return {name: getattr(engine, name) for name in ("provider", "vocabulary", "slots", "context_tokens")}
    sides = {"inputs": engine.inputs, "outputs": engine.outputs}
    facts = {name: [[spec.name, spec.dtype, list(spec.shape)] for spec in specs] for name, specs in sides.items()}
    return {"provider": engine.provider, **facts}


def answer(engine: Any, call: Mapping[str, Any], requests: IO[bytes], answers: IO[bytes]) -> bool:
    """Do one call; False when it is none that is known."""
    arrays: Dict[str, np.ndarray] = {}
    try:
        if call.get("call") == "run":
            arrays = engine.run(read_arrays(requests, int(call["bytes"])))
        elif call.get("call") == "step":
            batch = [SlotTokens(int(slot), [int(token) for token in tokens], int(adapter)) for slot, tokens, adapter in call["batch"]]
            arrays = {"logits": engine.step(batch)}
        elif call.get("call") == "truncate":
            engine.truncate(int(call["slot"]), int(call["length"]))
        else:
            write_line(answers, {"error": f"there is no call {call.get('call')!r}"})
            return False
    except EngineError as error:
        write_line(answers, {"error": str(error)})
        return True
    write_arrays(answers, {}, arrays)
    return True


# The two ends of the pipe; the parent's is in `converters/engine_process.py`.


def read_line(stream: IO[bytes]) -> Optional[Dict[str, Any]]:
    """The next JSON object, or None at the end. Raises ValueError for anything else."""
    line = stream.readline(MAX_LINE_BYTES)
    if not line:
        return None
    value = json.loads(line.decode())
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def write_line(stream: IO[bytes], value: Mapping[str, Any]) -> None:
    stream.write(json.dumps(value).encode() + b"\n")
    stream.flush()


def read_arrays(stream: IO[bytes], size: int) -> Dict[str, np.ndarray]:
    """Raises ValueError for more than MAX_ARRAY_BYTES, or fewer bytes than were promised."""
    if not 0 <= size <= MAX_ARRAY_BYTES:
        raise ValueError(f"{size} bytes of arrays, {MAX_ARRAY_BYTES} are the most")
    data = stream.read(size)
    if len(data) != size:
        raise ValueError(f"the stream ended after {len(data)} of {size} bytes")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def write_arrays(stream: IO[bytes], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names of arrays for its own flag
    data = buffer.getvalue()
    stream.write(json.dumps({**header, "bytes": len(data)}).encode() + b"\n" + data)
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
