"""Memory that was granted to one model is not granted to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.engines import EngineOptions, TooLittleMemory, open_generation_engine
from models.engines.free_memory import MEMORY_RESERVE
from tests.models.engines.tiny_decoder import write_tiny_decoder

MIB = 1 << 20


def resident_bytes() -> int:
    """Pages of this process alone: those of files the kernel takes back when others need memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("runtime", ["onnx", "native"])
def test_a_second_model_is_refused_what_the_first_has_been_promised(
    runtime: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue("tiny_native") if runtime == "native" else write_tiny_decoder(tmp_path)
    options = EngineOptions(slots=1000, context_tokens=256, threads=1)  # 125 MiB of ONNX Runtime's cache, 250 MiB of the native one
    cache = (125 if runtime == "onnx" else 250) * MIB
    began = resident_bytes()
    # A kernel that counts pages when they are touched, as Linux does, with room for one and a half caches.
    machine = cache * 3 // 2 + MEMORY_RESERVE + 20 * MIB
    monkeypatch.setattr(f"models.engines.{runtime}.available_bytes", lambda: machine - (resident_bytes() - began))
    first = open_generation_engine(folder, options)
    with pytest.raises(TooLittleMemory, match=rf"{cache >> 20} MiB of KV cache \(1000 slots of 256 tokens\).*MiB are free"):
        open_generation_engine(folder, options)
    first.close()
