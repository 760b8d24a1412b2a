"""One JSON object from a file that nobody vouches for, read with the types that are expected of it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from converters.errors import ConversionError

MAX_BYTES = 1 << 20
_LARGEST = sys.float_info.max
Items: TypeAlias = "list[Any]"


@dataclass(frozen=True)
class JsonObject:
    """Methods raise ConversionError for a value of another type; null is as good as absent."""

    name: str
    values: dict[str, Any]

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._broken(key, value, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
            raise self._broken(key, value, "a finite number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._broken(key, value, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._broken(key, value, "true or false")
        return value

    def object(self, key: str) -> JsonObject:
        """The object behind a key; empty where there is none."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self._broken(key, value, "an object")
        return JsonObject(f"{self.name}: {key}", value)

    def list(self, key: str) -> Items:
        value = self._value(key, [])
        if not isinstance(value, list):
            raise self._broken(key, value, "a list")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ConversionError(f"{self.name}: {key!r} is missing; fetch the model again, or use one that has it")
        return value

    def _broken(self, key: str, value: Any, what: str) -> ConversionError:
        return ConversionError(f"{self.name}: {key} is {str(value)[:80]!r}, not {what}; the file is damaged: fetch it again")


def read_json_object(path: Path, name: str = "", limit_bytes: int = MAX_BYTES) -> JsonObject:
    """`name` is what messages call the file. Raises ConversionError, OSError."""
    name = name or path.name
    with path.open("rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ConversionError(f"{name} has more than {limit_bytes} bytes, too many for what it should be")
    return json_object(content, name)


def json_object(content: bytes, name: str) -> JsonObject:
    """Raises ConversionError for what is no JSON object, or names a key twice."""
    try:
        values = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{name} is not JSON: {error}; the file is damaged: fetch it again") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{name} is no JSON object; the file is damaged: fetch it again")
    return JsonObject(name, values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values
