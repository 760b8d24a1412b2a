"""Representative inputs of a model, ready for its graph: pictures or texts of the operator's, else made-up ones, always the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from converters.errors import ConversionError
from converters.gate_inputs import SENTENCES, made_up_pictures, pictures_of, texts_of
from converters.graph_contract import Stateless
from converters.verify_onnx import open_result
from models.engines import Engine
from models.manifest import ClassificationManifest, DetectionManifest, EmbeddingManifest
from models.tasks.encoder import encode, truncate

INPUTS = 64
MADE_UP_PICTURES = 32
# With fewer, none are held back for the gate.
ENOUGH = 16
RANDOM_LENGTHS = (3, 8, 16, 24, 32, 48)

Item = TypeVar("Item")
Feeds = list[dict[str, NDArray[Any]]]


def calibration_inputs(
    manifest: Stateless, graph: Path, calibration: Path | None, tokenizer: Path | None = None, count: int = INPUTS, threads: int = 2
) -> Feeds:
    """At most `count` inputs of `graph`, as the pre-processing that serves the model makes them: of many pictures or texts every second,
    so that the gate can look at others.

    calibration  folder of pictures, or text file with one text a line; None: made-up ones
    tokenizer    tokenizer.json of an encoder; without one, random tokens

    Raises ConversionError (code `bad_request`) where nothing in `calibration` can be read, EngineError.
    """
    engine = _Recorder(open_result(graph, threads))
    try:
        if isinstance(manifest, DetectionManifest):
            from models.tasks.detection import Detector  # brings OpenCV, which text needs not

            detector = Detector(engine, manifest)
            for picture in _alternate(pictures_of(calibration, 2 * count), count) or made_up_pictures(min(count, MADE_UP_PICTURES), seed=1):
                detector.detect(picture)
        else:
            facts = manifest.embedding if isinstance(manifest, EmbeddingManifest) else manifest.classification
            for tokens in truncate(_sequences(manifest, calibration, tokenizer, count), facts.max_tokens)[0]:
                # One at a time: padding is nothing that a scale should be made for.
                list(encode(engine, [tokens], facts.output))
    finally:
        engine.close()
    return engine.feeds


def _sequences(
    manifest: EmbeddingManifest | ClassificationManifest, calibration: Path | None, tokenizer: Path | None, count: int
) -> list[list[int]]:
    if tokenizer is not None:
        encoding = Tokenizer.from_file(str(tokenizer)).encode
        return [list(encoding(text).ids) for text in (_alternate(texts_of(calibration, 2 * count), count) or SENTENCES)[:count]]
    if calibration is not None:
        raise ConversionError(f"{manifest.name} has no tokenizer to read {calibration} with; add [files.tokenizer]", "bad_request")
    rng = np.random.default_rng(0)
    return [rng.integers(0, 100, length).tolist() for length in RANDOM_LENGTHS][:count]


def _alternate(items: list[Item], count: int) -> list[Item]:
    return (items[1::2] if len(items) >= 2 * ENOUGH else items)[:count]


class _Recorder:
    """An engine that keeps copies of all it is fed."""

    def __init__(self, engine: Engine) -> None:
        self.inputs, self.outputs, self.provider = engine.inputs, engine.outputs, engine.provider
        self.feeds: Feeds = []
        self._engine = engine

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.feeds.append({name: np.array(value) for name, value in inputs.items()})
        return self._engine.run(inputs)

    def close(self) -> None:
        self._engine.close()
