"""One GGUF, and what our converter, llama.cpp's quantiser and onnxruntime-genai's builder make of it."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import anyio

from agent.build_choice import BuildChoice
from agent.preparation import PreparationFailed
from agent.prepare import BuildSettings, prepare_model
from bench.decoder_peers import llama
from bench.report import Peer
from converters.gguf import read_gguf
from models.catalog import load_catalog
from models.manifest import GenerationManifest
from models.sources import fetch
from models.store import Store, open_store
from models.tokenizer import Tokenizer

STORE = Path(os.environ.get("HOTSPARE_TEST_CACHE", Path(__file__).parent.parent / ".cache")) / "store"
BUILD_DEADLINE_S = 3600.0
QUANTISE_S = 300.0
ROOM_TOKENS = 256  # of a short question and its answer, beside a long prompt
CHOICES = {
    "hotspare native": BuildChoice("native"),
    "hotspare native, 8 bits": BuildChoice("native", "int8"),
    "hotspare onnxruntime": BuildChoice("onnxruntime"),
}
WORDS = (
    "the water was cold that morning and nobody in the small harbour town had seen a boat come back since the storm began three people "
    "stood on the old stone wall looking for light far out where the sky met sea one of them held a map another counted waves while a "
    "third kept writing numbers into her book about wind rain hours and what each ship should carry home when all this would be over"
)


class Weights(NamedTuple):
    """gguf: the file itself; q4_0: llama.cpp's own 4-bit form of it; genai: that of onnxruntime-genai, a folder; folders: engines by way;
    missing: why others are not there."""

    store: Path
    gguf: Path
    q4_0: Path | None
    genai: Path | None
    folders: Mapping[str, Path]
    long: Path | None
    missing: Mapping[str, str]

    @property
    def ours(self) -> Path:
        """Of the engines, the one that serves by default."""
        return next(iter(self.folders.values()))


def weights(store_folder: Path, model: str, long_tokens: int, server: Path | None, installed: Mapping[str, Peer]) -> Weights:
    """Fetch and build what the store does not have yet."""
    store = open_store(store_folder)
    manifest = load_catalog().find(model)
    if not isinstance(manifest, GenerationManifest) or manifest.format != "gguf":
        raise SystemExit(f"{model} is no GGUF for generation; this bench compares runtimes on one GGUF")
    folders: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for way, choice in CHOICES.items():
        try:
            folders[way] = _built(store, manifest, choice)
        except PreparationFailed as error:
            missing[way] = str(error)
    if not folders:
        raise SystemExit(f"no engine could be built: {missing}")
    long = None
    if long_tokens:
        wider = dataclasses.replace(manifest.generation, context_tokens=long_tokens + ROOM_TOKENS)
        long = _built(store, dataclasses.replace(manifest, generation=wider), CHOICES[next(iter(folders))])
    gguf = fetch(manifest.files["model"], store)
    q4_0 = _q4_0(store_folder, gguf, server, missing)
    genai = None
    if installed["onnxruntime-genai"].version and installed["transformers float32"].version:
        genai = _genai(store_folder, gguf, next(iter(folders.values())), missing)
    return Weights(store_folder, gguf, q4_0, genai, folders, long, missing)


def _built(store: Store, manifest: GenerationManifest, choice: BuildChoice) -> Path:
    settings = BuildSettings(timeout_s=BUILD_DEADLINE_S)
    return anyio.run(prepare_model, store, settings, choice, manifest, lambda *_: None).folder


def _q4_0(store: Path, gguf: Path, server: Path | None, missing: dict[str, str]) -> Path | None:
    """Made from the file by llama-quantize, which lies beside llama-server; kept beside the store."""
    quantise = None if server is None else server.with_name("llama-quantize")
    if quantise is None or not quantise.is_file():
        missing["Q4_0"] = "llama-quantize was not found beside llama-server"
        return None
    target = store.parent / f"{gguf.name}.q4_0.gguf"
    if not target.is_file():
        temporary = target.with_suffix(".part")
        command = [str(quantise), "--allow-requantize", str(gguf), str(temporary), "Q4_0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUANTISE_S, check=False)
        if done.returncode:
            missing["Q4_0"] = f"llama-quantize failed: {done.stderr[-300:]}"
            return None
        temporary.replace(target)
    return target


def _genai(store: Path, gguf: Path, ours: Path, missing: dict[str, str]) -> Path | None:
    """Made by its model builder from the dequantised weights; kept beside the store."""
    target = store.parent / f"{gguf.name}.genai"
    if (target / "genai_config.json").is_file():
        return target
    with tempfile.TemporaryDirectory(dir=store.parent) as folder:
        published, made = Path(folder, "published"), Path(folder, "made")
        llama(read_gguf(gguf)).save_pretrained(published)
        shutil.copy(ours / "tokenizer.json", published)
        (published / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        command = [*builder, "-i", str(published), "-o", str(made), "-c", str(Path(folder, "cache"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_DEADLINE_S, check=False)
        if done.returncode:
            missing["onnxruntime-genai int4"] = f"its builder failed: {done.stderr[-300:]}"
            return None
        made.replace(target)
    return target


def prompts(tokenizer: Tokenizer, tokens: int, seed: int) -> Iterator[list[int]]:
    """Token ids of prompts that share no beginning: words in random order, so that no cache helps by accident."""
    chance = random.Random(seed)
    while True:
        yield tokenizer.encode(" ".join(chance.choices(WORDS.split(), k=2 * tokens)))[:tokens]


def echo_prompt(tokenizer: Tokenizer, tokens: int, seed: int) -> list[int]:
    """A text, and the same again up to a tenth: a model that continues it repeats it."""
    text = next(prompts(tokenizer, max(16, tokens // 2), seed))
    return [*text, *text, *text[: max(4, len(text) // 10)]]
