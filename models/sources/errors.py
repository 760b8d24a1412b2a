"""Why a file could not be fetched."""

from __future__ import annotations


class SourceError(RuntimeError):
    """A file cannot be had from its source; the message names the source, the reason and the remedy."""


class NotThere(SourceError):
    """The source answered, and has no such file."""


class DigestMismatch(SourceError):
    """The fetched bytes are not the ones the manifest pins or the first fetch recorded."""
