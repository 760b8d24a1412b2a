from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers, trainers

from models.tokenizer import Detokenizer, Tokenizer, TokenizerError

CORPUS = [
    "The parcel moves on the belt, then the camera counts it: 1, 2, 3.",
    "Zürich, Ærø, naïve café, Straße; Привет, мир! こんにちは世界。你好,世界",
    "smile 😀 family 👨‍👩‍👧 flags 🇨🇭🇯🇵 and x ≤ y ∀ z",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer whose merges run across the bytes of characters, as in GPT-2's family."""
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet))
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    bpe.save(str(folder / "tokenizer.json"))
    facts = {"layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "hidden": 8, "vocabulary": 330, "context_tokens": 64}
    (folder / "generation.json").write_text(json.dumps({**facts, "eos_ids": [2], "bos_id": 1, "add_bos": True}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def in_pieces(tokenizer: Tokenizer, tokens: list[int], sizes: list[int]) -> list[str]:
    detokenizer, pieces, start = Detokenizer(tokenizer), [], 0
    for size in [*sizes, len(tokens)]:
        pieces.append(detokenizer.feed(tokens[start : start + size]))
        start += size
    return [*pieces, detokenizer.flush()]


def test_text_survives_and_the_files_own_truncation_does_not_count(tokenizer: Tokenizer) -> None:
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


def test_marks_come_from_generation_json(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.mark(2) == "<|im_end|>"
    assert tokenizer.mark(None) == ""
    assert tokenizer.encode("a")[0] == 1
    assert tokenizer.encode("a", special=False)[0] != 1
    assert tokenizer.encode("<|im_start|>a").count(1) == 1, "a mark that is there already is not doubled"
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.decode([2]) == ""


def test_an_encoders_closing_mark_survives_truncation(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[CLS]": 0, "[SEP]": 1, "cat": 2, "dog": 3}, unk_token="cat"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("cat dog dog cat") == [0, 2, 3, 3, 2, 1]
    assert tokenizer.encode("cat dog dog cat", max_tokens=4) == [0, 2, 3, 1]
    assert tokenizer.encode("cat dog dog cat", special=False, max_tokens=3) == [2, 3, 3]
    assert tokenizer.eos_ids == ()


@settings(deadline=None)
@given(text=st.text(max_size=60), sizes=st.lists(st.integers(1, 3), max_size=60))
def test_any_text_streams_without_a_broken_character(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    tokens = tokenizer.encode(text, special=False)
    pieces = in_pieces(tokenizer, tokens, sizes)
    assert "".join(pieces) == tokenizer.decode(tokens) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 329), max_size=60))
def test_any_tokens_stream_to_the_text_of_the_whole(tokenizer: Tokenizer, tokens: list[int]) -> None:
    assert "".join(in_pieces(tokenizer, tokens, [1] * len(tokens))) == tokenizer.decode(tokens)


def test_a_model_that_babbles_bytes_is_given_out_all_the_same(tokenizer: Tokenizer) -> None:
    lone = next(token for token in range(tokenizer.size) if tokenizer.decode([token]) == "\ufffd")
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed([lone]) for _ in range(200)]
    assert sum(map(len, pieces)) > 190


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is no tokenizer"):
        Tokenizer(tmp_path)
