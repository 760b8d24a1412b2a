"""Text to token ids and back, for the daemon: the worker sees ids only. The one home of `tokenizers` outside converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

import tokenizers

from models.engines import EngineError
from models.engines.decoder import FILE as FACTS_FILE
from models.engines.decoder import DecoderFacts, read_facts

MAX_FILE_BYTES = 64 << 20
LONGEST_WORD = 256  # characters: what a word-piece vocabulary may turn into one unknown token


class TokenizerError(ValueError):
    """A tokenizer cannot be read; the message says which and why."""


class Tokenizer:
    """`tokenizer.json` of a folder, with the marks that `generation.json` beside it names (encoders have none)."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        self.facts = _facts(folder)
        self._tokenizer = _read_tokenizer(path)
        self._longest = max(LONGEST_WORD, *map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    def least_tokens(self, text: str) -> int:
        """A lower bound of the tokens that `text` will have, for free: encoding takes some hundred bytes of memory per character."""
        return -(-len(text) // self._longest)

    @property
    def eos_ids(self) -> Tuple[int, ...]:
        return self.facts.eos_ids if self.facts else ()

    @property
    def size(self) -> int:
        """Token ids are below this."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special: bool = True, max_tokens: Optional[int] = None) -> List[int]:
        """Token ids of `text`.

        special     with the opening and closing marks of the model; a text rendered by a chat template has its own: give False
        max_tokens  cut in the text, so that closing marks stay
        """
        if max_tokens is not None:
            text = text[: max_tokens * self._longest]
        encoding = self._tokenizer.encode(text, add_special_tokens=special)
        ids: List[int] = encoding.ids
        if special and self.facts and self.facts.add_bos and self.facts.bos_id is not None and ids[:1] != [self.facts.bos_id]:
            ids = [self.facts.bos_id, *ids]
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        closing = 0
        while special and closing < min(len(ids), max_tokens) and encoding.special_tokens_mask[-1 - closing]:
            closing += 1
        return ids[: max_tokens - closing] + (ids[-closing:] if closing else [])

    def decode(self, tokens: Sequence[int], keep_special: bool = False) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=not keep_special)
        return text

    def token_text(self, token: int) -> str:
        """The piece of text that one token stands for, special tokens included; for log probabilities."""
        return self.decode([token], keep_special=True)

    def mark(self, token: Optional[int]) -> str:
        """The written form of a special token such as `<|im_end|>`; empty where there is none."""
        text = None if token is None else self._tokenizer.id_to_token(token)
        return text or ""


class Detokenizer:
    """Tokens of one answer to text, as they come: the pieces joined are the text of the whole, and no piece ends inside a character.

    A token alone has no text (byte-level tokens may hold half a character, others lose their space), so each piece is the difference of
    two texts that begin at the same earlier token, where a character began.
    """

    # A character's bytes rarely span more tokens; then its beginning is no character and is given out as it is.
    MAX_WINDOW = 64
    UNFINISHED = "\ufffd"

    def __init__(self, tokenizer: Tokenizer, keep_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._window: List[int] = []
        self._context = 0
        self._given = 0

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that is certain after these tokens; may be empty."""
        self._window.extend(tokens)
        text = self._decode(self._window)
        certain = len(text)
        if text.endswith(self.UNFINISHED) and len(self._window) < self.MAX_WINDOW:
            certain = max(len(text.rstrip(self.UNFINISHED)), len(text) - 3)
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if certain == len(text):
            self._move_on()
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come."""
        piece = self._decode(self._window)[self._given :]
        self._window, self._context, self._given = [], 0, 0
        return piece

    def _move_on(self) -> None:
        """Everything is given out: the tokens since the last time are the context of the next, unless they have no text."""
        recent = self._window[self._context :]
        text = self._decode(recent)
        if text:
            self._window, self._context, self._given = recent, len(recent), len(text)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, self._keep_special) if tokens else ""


def _facts(folder: Path) -> Optional[DecoderFacts]:
    if not (folder / FACTS_FILE).is_file():
        return None
    try:
        return read_facts(folder)
    except EngineError as error:
        raise TokenizerError(str(error)) from error


def _read_tokenizer(path: Path) -> Any:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(read_bounded(path, MAX_FILE_BYTES))
    except TokenizerError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise TokenizerError(f"{path} is no tokenizer: {error}; convert the model again") from error
    # A file may carry truncation and padding of its training; lengths are decided here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises TokenizerError."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}; convert the model again") from error
    if len(content) > limit:
        raise TokenizerError(f"{path} is larger than {limit} bytes")
    return content
