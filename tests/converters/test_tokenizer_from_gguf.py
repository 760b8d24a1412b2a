from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.gguf import read_gguf
from converters.tokenizer_from_gguf import SPLITTINGS, vocabulary_from_gguf
from converters.vocabulary import Vocabulary
from tests.converters.tiny_gguf import byte_vocabulary, write_gguf

TEXT = "hello world, 12 Größe 日本語 🙂\n\n\tit's 2026  x<=y"


def vocabulary(folder: Path, **changes: Any) -> Vocabulary:
    metadata = byte_vocabulary()
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return vocabulary_from_gguf(read_gguf(write_gguf(folder / "v.gguf", metadata, {})))


@pytest.mark.parametrize("name", SPLITTINGS)
def test_any_text_comes_back(tmp_path: Path, name: str) -> None:
    tokenizer = vocabulary(tmp_path, pre=name).tokenizer
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


@pytest.mark.parametrize(("name", "pieces"), [("smollm", ["1", "2"]), ("qwen2", ["1", "2"]), ("gpt-2", ["12"]), ("llama-bpe", ["12"])])
def test_digits_are_cut_as_the_model_was_trained(tmp_path: Path, name: str, pieces: list[str]) -> None:
    assert vocabulary(tmp_path, pre=name).tokenizer.encode("12").tokens == pieces


def test_merges_apply_in_order(tmp_path: Path) -> None:
    assert vocabulary(tmp_path).tokenizer.encode("hello world").tokens == ["hello", "Ġworld"]


def test_marks_are_single_tokens_and_end_a_turn(tmp_path: Path) -> None:
    built = vocabulary(tmp_path)
    encoded = built.tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert encoded.ids == [268, 260 - 1, 269]
    assert built.tokenizer.decode(encoded.ids) == "hello"
    assert built.eos_ids == (267, 269)
    assert not built.add_bos


def test_llama_3_begins_with_its_mark_unless_told_otherwise(tmp_path: Path) -> None:
    assert vocabulary(tmp_path, pre="llama-bpe").add_bos
    assert not vocabulary(tmp_path, pre="llama-bpe", add_bos_token=False).add_bos


def test_sentence_pieces_merge_by_score_and_fall_back_to_bytes(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab", "ba"]
    types = np.array([2, 3, 3, *([6] * 256), *([1] * 7)], np.int32)
    scores = np.array([0.0] * 259 + [-9, -10, -11, -2, -3, -1, -4], np.float32)
    built = vocabulary(
        tmp_path, model="llama", tokens=tokens, token_type=types, scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0
    )
    assert built.tokenizer.encode("ab aba").tokens == ["▁ab", "▁ab", "a"]
    assert built.tokenizer.encode("a☃").tokens == ["▁a", "<0xE2>", "<0x98>", "<0x83>"]
    assert built.tokenizer.decode(built.tokenizer.encode("ab a☃").ids) == "ab a☃"
    assert (built.bos_id, built.eos_ids, built.add_bos) == (1, (2,), True)
