from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from converters.calibration import calibration_inputs
from converters.calibration_digest import calibration_digest
from converters.errors import ConversionError
from tests.converters.manifests import detection_manifest, embedding_manifest
from tests.converters.tiny_onnx import detector, encoder, save


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(6):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((40, 60, 3), 40 * index, np.uint8))
    return folder


def test_pictures_pass_the_pre_processing_of_the_model(tmp_path: Path, pictures: Path) -> None:
    graph = save(tmp_path / "m.onnx", detector())
    feeds = calibration_inputs(detection_manifest(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]), graph, pictures)
    assert [feed["pixel_values"].shape for feed in feeds] == [(1, 3, 32, 48)] * 6
    assert [float(feed["pixel_values"].mean()) for feed in feeds] == pytest.approx([80 * index / 255 - 1 for index in range(6)], abs=1e-5)


def test_few_are_taken_and_always_the_same(tmp_path: Path, pictures: Path) -> None:
    graph = save(tmp_path / "m.onnx", detector())
    once, again = (calibration_inputs(detection_manifest(), graph, pictures, count=3) for _ in range(2))
    assert [float(feed["pixel_values"].max()) for feed in once] == pytest.approx([0, 40 / 255, 80 / 255])
    assert all(np.array_equal(one["pixel_values"], other["pixel_values"]) for one, other in zip(once, again, strict=True))


def test_of_many_every_second_is_left_to_the_gate(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(40):
        cv2.imwrite(str(folder / f"{index:02}.png"), np.full((40, 60, 3), index, np.uint8))
    feeds = calibration_inputs(detection_manifest(), save(tmp_path / "m.onnx", detector()), folder)
    assert [round(float(feed["pixel_values"].max()) * 255) for feed in feeds] == list(range(1, 40, 2))


def test_what_cannot_be_read_is_left_out_unless_it_is_all(tmp_path: Path, pictures: Path) -> None:
    graph = save(tmp_path / "m.onnx", detector())
    for index in range(5):
        (pictures / f"{index}.png").write_bytes(b"no picture")
    assert len(calibration_inputs(detection_manifest(), graph, pictures)) == 1
    (pictures / "5.png").write_bytes(b"")
    with pytest.raises(ConversionError, match="no picture that can be read"):
        calibration_inputs(detection_manifest(), graph, pictures)


def test_made_up_pictures_serve_where_there_are_none(tmp_path: Path) -> None:
    feeds = calibration_inputs(detection_manifest(), save(tmp_path / "m.onnx", detector()), None)
    assert len({feed["pixel_values"].tobytes() for feed in feeds}) == len(feeds) == 32


def test_lines_of_text_become_tokens(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "one": 1, "two": 2, "three": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "texts.txt").write_text("one two\n\nthree\none one one one\n")
    graph = save(tmp_path / "m.onnx", encoder())
    feeds = calibration_inputs(embedding_manifest(max_tokens=3), graph, tmp_path / "texts.txt", tmp_path / "tokenizer.json")
    assert [feed["input_ids"].tolist() for feed in feeds] == [[[1, 2]], [[3]], [[1, 1, 1]]]
    with pytest.raises(ConversionError, match="no tokenizer"):
        calibration_inputs(embedding_manifest(), graph, tmp_path / "texts.txt")
    assert len(calibration_inputs(embedding_manifest(), graph, None)) == 6


def test_the_digest_is_of_what_is_looked_at(pictures: Path) -> None:
    before = calibration_digest(pictures)
    (pictures / "notes.txt").write_text("no picture")
    assert calibration_digest(pictures) == before
    content = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert calibration_digest(pictures) != before, "of the same name and size, another picture"
