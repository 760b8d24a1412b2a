"""A form with a file, written to the disk as it comes: never more of it in memory than a piece."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from anyio import to_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from agent.http.errors import ApiError, invalid

if TYPE_CHECKING:  # older versions have no name for it
    from python_multipart.multipart import MultipartCallbacks

PIECE_BYTES = 1 << 20
MOST_PARTS = 16
HEAD_BYTES = 8192  # all headers of one part
FIELD_BYTES = 4096


@dataclass
class Form:
    """`filename` None: there was no file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size: int = 0


class _Reader:
    """Parts as the parser tells them: fields are kept, of the file whatever `take` has not fetched yet."""

    def __init__(self) -> None:
        self.form = Form()
        self.is_complete = False
        self._piece = bytearray()
        self._header, self._value = b"", b""
        self._disposition = b""
        self._parts, self._head_bytes = 0, 0
        self._name, self._field = "", bytearray()
        self._is_file = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._all,
        }

    def take(self, least: int) -> bytes:
        """What waits to be written, if it is as much as `least`."""
        if len(self._piece) < least:
            return b""
        piece, self._piece = bytes(self._piece), bytearray()
        return piece

    def _begin(self) -> None:
        self._parts, self._head_bytes = self._parts + 1, 0
        if self._parts > MOST_PARTS:
            raise invalid(None, f"the form has more than {MOST_PARTS} parts")
        self._disposition, self._header, self._value = b"", b"", b""
        self._field = bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._bound_head(end - start)
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._bound_head(end - start)
        self._value += data[start:end]

    def _bound_head(self, more_bytes: int) -> None:
        self._head_bytes += more_bytes
        if self._head_bytes > HEAD_BYTES:
            raise invalid(None, f"the head of a part is longer than {HEAD_BYTES} bytes")

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")[:64]
        self._is_file = self._name == "file"
        if self._is_file:
            if self.form.filename is not None:
                raise invalid("file", "file: there are two of them; send one")
            self.form.filename = plain_name(options.get(b"filename", b"").decode("utf-8", "replace"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._piece += memoryview(data)[start:end]
            self.form.size += end - start
            return
        self._field += data[start:end]
        if len(self._field) > FIELD_BYTES:
            raise invalid(self._name or None, f"{self._name or 'a field'}: it is longer than {FIELD_BYTES} bytes")

    def _end(self) -> None:
        if not self._is_file:
            self.form.fields[self._name] = self._field.decode("utf-8", "replace")

    def _all(self) -> None:
        self.is_complete = True


async def read_form(request: Request, target: Path, has_room: Callable[[int], Awaitable[None]], most_bytes: int) -> Form:
    """The form; its file is written into `target`. `has_room` is asked before each piece and raises where there is none.

    Raises ApiError (400, 413), OSError, and what reading the body raises.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 256:
        raise ApiError(400, "the body must be multipart/form-data with a file and its purpose", code="invalid_value")
    reader = _Reader()
    stream = await to_thread.run_sync(target.open, "wb")
    try:
        try:
            parser = MultipartParser(boundary, reader.callbacks())
            async for chunk in request.stream():
                parser.write(chunk)
                if reader.form.size > most_bytes:
                    raise ApiError(413, f"the file is over the limit of {most_bytes} bytes; send it in parts", code="request_too_large")
                await _write(stream, reader.take(PIECE_BYTES), has_room)
        except FormParserError as error:
            raise invalid(None, f"the body is no form: {str(error)[:200]}") from error
        if not reader.is_complete:
            raise invalid(None, "the body ended before its form did")
        await _write(stream, reader.take(0), has_room)
    finally:
        await to_thread.run_sync(stream.close)
    return reader.form


async def _write(stream: BinaryIO, piece: bytes, has_room: Callable[[int], Awaitable[None]]) -> None:
    if piece:
        await has_room(len(piece))
        await to_thread.run_sync(stream.write, piece)


def plain_name(name: str) -> str:
    """A file's name as it may be told: no folders, nothing that does not print."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in last if letter.isprintable())[:255] or "upload"
