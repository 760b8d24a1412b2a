"""Generated tokens to the text that a client gets: whole characters, nothing behind a stop string, log probabilities with words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.http.collaborators import TextDelta, TokenLogprob, Usage
from agent.worker_protocol import Tokens
from models.stop_matcher import StopMatcher
from models.tokenizer import Detokenizer, Tokenizer


class Answer:
    """One answer in the making. `is_stopped`: a stop string was met, what comes after it does not count.

    `context`: the tokens that the answer follows without a break, where it goes on with a begun text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: int, stops: Sequence[str], context: Sequence[int] = ()) -> None:
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        if context:
            self._detokenizer.feed(context)
        self._matcher = StopMatcher(stops)
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = 0
        self._count = 0

    def feed(self, report: Tokens) -> TextDelta:
        """The text and log probabilities that are certain now; both may be empty."""
        self._cached_tokens = report.cached_tokens
        text = ""
        logprobs: list[TokenLogprob] = []
        for position, token in enumerate(report.tokens):
            self._count += 1
            if report.logprobs:
                logprobs.append(self._logprob(report.logprobs[position]))
            safe, self.is_stopped = self._matcher.feed(self._detokenizer.feed([token]))
            text += safe
            if self.is_stopped:
                break
        return TextDelta(text, tuple(logprobs))

    def end(self, finish: str, queued_s: float | None = None) -> TextDelta:
        """The last delta: what was held back, why it ended, what it cost."""
        text = ""
        if not self.is_stopped:
            text, self.is_stopped = self._matcher.feed(self._detokenizer.flush())
        if not self.is_stopped:
            text += self._matcher.flush()
        usage = Usage(self._prompt_tokens, self._count, self._cached_tokens, queued_s)
        return TextDelta(text, finish="stop" if self.is_stopped else finish, usage=usage)

    def _logprob(self, entries: Sequence[Any]) -> TokenLogprob:
        """`entries`: [token, log probability] of the generated token, then of the most probable ones."""
        (token, logprob), *top = entries
        return TokenLogprob(*self._written(token), logprob, tuple((*self._written(other), value) for other, value in top))

    def _written(self, token: int) -> tuple[str, bytes]:
        text = self._tokenizer.token_text(token)
        return text, text.encode()
