"""What a conversion may fail with."""

from __future__ import annotations

from collections.abc import Mapping


class ConversionError(Exception):
    """An artefact cannot be converted. The message says what was found, with which value, and what to do.

    `code` is stable; `converters/__main__.py` lists all that a build may end with. `verdict`: what was measured, if that is the reason.
    """

    def __init__(self, message: str, code: str = "bad_file", verdict: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.verdict = verdict


class BadSource(ConversionError):
    """The source cannot be used, whatever the precision: no other attempt will go better."""


def unsupported(message: str) -> ConversionError:
    return ConversionError(message, "unsupported")
