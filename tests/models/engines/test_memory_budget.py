"""Memory that was granted to one model is not granted to the next."""

from __future__ import annotations

import importlib
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from models.engines import EngineOptions, TooLittleMemory, open_generation_engine
from models.engines.free_memory import MEMORY_RESERVE
from tests.models.engines.tiny_decoder import write_tiny_decoder

MIB = 1 << 20
CACHE = {"onnx": 125 * MIB, "native": 250 * MIB}  # of 1000 slots of 256 tokens


@pytest.mark.parametrize("runtime", ["onnx", "native"])
def test_a_second_model_is_refused_what_the_first_has_been_promised(runtime: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue("tiny_native") if runtime == "native" else write_tiny_decoder(tmp_path)
    # In a process of its own: what other tests left behind would be given back in the middle.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        refusal = pool.submit(refusal_of_a_second, runtime, folder).result(100)
    assert re.search(rf"{CACHE[runtime] >> 20} MiB of KV cache \(1000 slots of 256 tokens\).*MiB are free", refusal), refusal


def refusal_of_a_second(runtime: str, folder: Path) -> str:
    """On a machine that counts pages when they are touched, as Linux does, with room for one and a half caches. Empty: not refused."""
    began = resident_bytes()
    machine = CACHE[runtime] * 3 // 2 + MEMORY_RESERVE + 20 * MIB
    importlib.import_module(f"models.engines.{runtime}").available_bytes = lambda: machine - (resident_bytes() - began)  # type: ignore[attr-defined]
    options = EngineOptions(slots=1000, context_tokens=256, threads=1)
    first = open_generation_engine(folder, options)
    try:
        open_generation_engine(folder, options)
    except TooLittleMemory as error:
        return str(error)
    finally:
        first.close()
    return ""


def resident_bytes() -> int:
    """Pages of this process alone: those of files the kernel takes back when others need memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024
