"""A `tokenizers` file from the vocabulary in a GGUF: byte-level BPE, and SentencePiece-style BPE with byte fallback.

The splitting patterns are those of llama.cpp's `llama-vocab.cpp` (https://github.com/ggml-org/llama.cpp) for `tokenizer.ggml.pre`,
in the form in which the models' own tokenizer files hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from converters.errors import ConversionError, unsupported
from converters.gguf import GgufFile
from converters.vocabulary import TURN_ENDS, Vocabulary

_CONTROL, _USER_DEFINED = 3, 4
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@dataclass(frozen=True)
class Splitting:
    """How text is cut before merging. `takes_whole_words`: a piece that is a token is not built up from merges."""

    patterns: tuple[str, ...]
    normalises: bool = False
    takes_whole_words: bool = False
    adds_bos: bool = False


_GPT_2 = Splitting((_GPT2,))
_LLAMA_3 = Splitting((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), takes_whole_words=True, adds_bos=True)
SPLITTINGS = {
    "gpt-2": _GPT_2,
    "smollm": Splitting((r"\p{N}", _GPT2)),
    "qwen2": Splitting((rf"{_WORDS}|\p{{N}}|{_REST}",), normalises=True),
    "deepseek-r1-qwen": Splitting((rf"{_WORDS}|\p{{N}}|{_REST}",), normalises=True),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


def vocabulary_from_gguf(gguf: GgufFile) -> Vocabulary:
    """Raises ConversionError for a vocabulary that is damaged or of a kind that is not read here."""
    kind = gguf.text("tokenizer.ggml.model")
    builders: dict[str, Callable[[GgufFile, list[str]], tuple[Tokenizer, bool]]] = {"gpt2": _byte_level, "llama": _sentence_pieces}
    if kind not in builders:
        raise unsupported(f"tokenizer model {kind!r} is not converted here; supported are {', '.join(builders)}")
    tokens = gguf.texts("tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens) or not tokens:
        raise ConversionError(f"{gguf.path.name}: {len(tokens)} tokens, {len(set(tokens))} of them different; the file is damaged")
    tokenizer, adds_bos = builders[kind](gguf, tokens)
    types = _types(gguf, len(tokens))
    marks = [(token, types[index]) for index, token in enumerate(tokens) if types[index] in (_CONTROL, _USER_DEFINED)]
    if any(not token for token, _ in marks):
        raise ConversionError(f"{gguf.path.name}: a control token is empty; the file is damaged")
    # Ids stay as they are: every mark is in the vocabulary already.
    tokenizer.add_tokens([AddedToken(token, special=mark == _CONTROL, normalized=False) for token, mark in marks])
    controls = {token for token, mark in marks if mark == _CONTROL}
    ends = {_special_id(gguf, name, len(tokens)) for name in ("eos", "eot", "eom")}
    ends |= {tokens.index(token) for token in TURN_ENDS if token in controls}
    return Vocabulary(
        tokenizer=tokenizer,
        size=len(tokens),
        bos_id=_special_id(gguf, "bos", len(tokens)),
        eos_id=_special_id(gguf, "eos", len(tokens)),
        eos_ids=tuple(sorted(token for token in ends if token is not None)),
        add_bos=gguf.flag("tokenizer.ggml.add_bos_token", adds_bos),
    )


def _byte_level(gguf: GgufFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    name = gguf.text("tokenizer.ggml.pre", "default")
    splitting = SPLITTINGS.get(name)
    if splitting is None:
        raise unsupported(f"pre-tokenizer {name!r} is not implemented; supported are {', '.join(SPLITTINGS)}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = []
    for merge in gguf.texts("tokenizer.ggml.merges"):
        # A token may begin with a space only in unusual vocabularies, so the space to split at is never the first character.
        cut = merge.find(" ", 1)
        pairs.append((merge[:cut], merge[cut + 1 :]))
    tokenizer = Tokenizer(_bpe(gguf, vocabulary, pairs, ignore_merges=splitting.takes_whole_words))
    if splitting.normalises:
        tokenizer.normalizer = normalizers.NFC()
    cuts: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.adds_bos


def _sentence_pieces(gguf: GgufFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    scores = gguf.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ConversionError(f"{gguf.path.name}: {len(tokens)} tokens without as many scores; the file is damaged")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores.tolist(), strict=True):
        merges += [
            (-score, -len(token[:cut]), -len(token[cut:]), token[:cut], token[cut:])
            for cut in range(1, min(len(token), 64))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
    merges.sort(key=lambda merge: merge[:3])
    unknown = _special_id(gguf, "unknown", len(tokens))
    model = _bpe(
        gguf,
        vocabulary,
        [merge[3:] for merge in merges],
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    adds_space = gguf.flag("tokenizer.ggml.add_space_prefix", True)
    spaces: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if adds_space else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    strip: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if adds_space else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer, True


def _bpe(gguf: GgufFile, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], **options: object) -> models.BPE:
    try:
        return models.BPE(vocabulary, list(merges), **options)
    except Exception as error:  # the library raises plain Exception for merges that do not fit the vocabulary
        raise ConversionError(f"{gguf.path.name}: its tokenizer is damaged: {error}") from error


def _types(gguf: GgufFile, count: int) -> list[int]:
    types = gguf.numbers("tokenizer.ggml.token_type")
    if types is None:
        return [1] * count
    if len(types) != count or not np.issubdtype(types.dtype, np.integer):
        raise ConversionError(f"{gguf.path.name}: {count} tokens with {len(types)} types; the file is damaged")
    return [int(kind) for kind in types]


def _special_id(gguf: GgufFile, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in gguf.metadata:
        return None
    value = gguf.integer(key)
    if value == 0xFFFFFFFF:  # written for "there is none"
        return None
    if not 0 <= value < count:
        raise ConversionError(f"{gguf.path.name}: {key} is {value}, outside the {count} tokens; the file is damaged")
    return value
