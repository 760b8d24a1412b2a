"""Engines in a process of their own answer like engines in this one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from converters.engine_process import EngineProcess, GenerationProcess
from converters.onnx_from_gguf import onnx_from_gguf
from models.engines import EngineError, EngineOptions, SlotTokens, open_engine, open_generation_engine
from tests.converters.tiny_gguf import Recipe, write_decoder
from tests.converters.tiny_onnx import detector, save

PYTHON = Path(sys.executable)


def test_a_stateless_engine_answers_as_in_this_process(tmp_path: Path) -> None:
    save(tmp_path / "model.onnx", detector())
    here = open_engine(tmp_path, EngineOptions(threads=1))
    picture = np.random.default_rng(1).random((1, 3, 32, 48), np.float32)
    with EngineProcess(PYTHON, tmp_path, "detection", EngineOptions(threads=1)) as there:
        assert (there.inputs, there.outputs, there.provider) == (here.inputs, here.outputs, here.provider)
        expected, found = here.run({"pixel_values": picture}), there.run({"pixel_values": picture})
        np.testing.assert_array_equal(found["logits"], expected["logits"])
        with pytest.raises(EngineError, match="pixel_values"):
            there.run({})
        assert there.run({"pixel_values": picture})["pred_boxes"].shape == (1, 12, 4)
    here.close()


def test_a_decoder_answers_as_in_this_process(tmp_path: Path) -> None:
    onnx_from_gguf(write_decoder(tmp_path / "tiny.gguf", Recipe()), tmp_path, "float32", lambda fraction, message: None, 64)
    options = EngineOptions(threads=1, slots=2, context_tokens=32)
    here = open_generation_engine(tmp_path, options)
    with GenerationProcess(PYTHON, tmp_path, "generation", options) as there:
        for batch in ([SlotTokens(0, [1, 2, 3])], [SlotTokens(0, [4]), SlotTokens(1, [5])]):
            np.testing.assert_array_equal(there.step(batch), here.step(batch))
        there.truncate(0, 2)
        here.truncate(0, 2)
        np.testing.assert_array_equal(there.step([SlotTokens(0, [7])]), here.step([SlotTokens(0, [7])]))
    here.close()


def test_an_engine_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not exist"), EngineProcess(PYTHON, tmp_path, "detection", EngineOptions()):
        pass


def test_a_process_that_dies_is_an_engine_error(tmp_path: Path) -> None:
    save(tmp_path / "model.onnx", detector())
    with EngineProcess(PYTHON, tmp_path, "detection", EngineOptions(threads=1)) as there:
        there._child.kill()
        with pytest.raises(EngineError, match="ended with status -9"):
            there.run({"pixel_values": np.zeros((1, 3, 32, 48), np.float32)})
