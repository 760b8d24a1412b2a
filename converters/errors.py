"""What a conversion may fail with."""

from __future__ import annotations


class ConversionError(Exception):
    """An artefact cannot be converted. The message says what was found, with which value, and what to do.

    `code` is stable; `converters/__main__.py` lists all that a build may end with.
    """

    def __init__(self, message: str, code: str = "bad_file") -> None:
        super().__init__(message)
        self.code = code


def unsupported(message: str) -> ConversionError:
    return ConversionError(message, "unsupported")
