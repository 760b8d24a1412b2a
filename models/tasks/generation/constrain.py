"""Answers that match a grammar: which tokens may come next, by llguidance (https://github.com/guidance-ai/llguidance).

The one home of that package. It exists for Python 3.9 and newer and is loaded with the first grammar.
"""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple

import numpy as np

MAX_GRAMMAR_CHARACTERS = 1 << 18
MAX_TOKENIZER_BYTES = 64 << 20


class GrammarError(ValueError):
    """A grammar cannot be used; the message says why."""


class Grammars:
    """Starts constraints for one model. The first takes a quarter of a second and some 50 MB: the vocabulary is laid out as a tree.

    tokenizer   the model's tokenizer.json
    vocabulary  logits of the engine; what the tokenizer does not have is never allowed
    ends        tokens that may come where the grammar is complete
    """

    def __init__(self, tokenizer: Path, vocabulary: int, ends: Sequence[int]) -> None:
        self._file = tokenizer
        self._vocabulary = vocabulary
        self._ends = list(ends)
        self._tokenizer: Optional[Any] = None

    def start(self, grammar: str) -> Constraint:
        """`grammar` in llguidance's JSON form. Raises GrammarError."""
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise GrammarError(f"the grammar has {len(grammar)} characters, more than {MAX_GRAMMAR_CHARACTERS}")
        package = _package()
        if self._tokenizer is None:
            self._tokenizer = self._read(package)
        # Without details of its parser: they would quote what the model has said.
        matcher = package.LLMatcher(self._tokenizer, grammar, log_level=0, limits=package.LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be used: {_first_line(matcher.get_error())}")
        return Constraint(matcher, self._vocabulary)

    def _read(self, package: Any) -> Any:
        try:
            if self._file.stat().st_size > MAX_TOKENIZER_BYTES:
                raise GrammarError(f"{self._file} is larger than {MAX_TOKENIZER_BYTES} bytes")
            text = self._file.read_text(encoding="utf-8")
            return package.LLTokenizer(text, n_vocab=self._vocabulary, eos_token=self._ends or None)
        except (OSError, ValueError) as error:
            raise GrammarError(f"grammars need the model's tokenizer, and {self._file} cannot be used ({error})") from error


class Constraint:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._bits = np.zeros(-(-vocabulary // 32), np.int32)

    def allowed(self) -> np.ndarray:
        """bool [vocabulary]: what may come next, one token at least. Raises GrammarError where that cannot be told any more."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        mask = np.unpackbits(self._bits.view(np.uint8), count=self._vocabulary, bitorder="little").view(bool)
        if not mask.any():
            raise GrammarError("no token of the model continues the grammar")
        return mask

    def accept(self, token: int) -> bool:
        """Take a token that was allowed; whether the answer is complete with it. Raises GrammarError."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def forced(self) -> Tuple[int, ...]:
        """Tokens that write what must come next, where only one text can come."""
        return tuple(self._matcher.compute_ff_tokens())

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first, the grammar would take."""
        return int(self._matcher.validate_tokens(list(tokens)))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed any further: {_first_line(self._matcher.get_error())}")


def _package() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise GrammarError(
            f"grammars need the package llguidance, which Python {platform.python_version()} of this worker does not have ({error}); "
            "it exists for Python 3.9 and newer: pip install llguidance"
        ) from error


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0][:300]
