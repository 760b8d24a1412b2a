"""Frozen records from and to plain JSON or TOML values, strictly.

The worker runs under JetPack's own interpreter (Python 3.8 on JetPack 5) with numpy and the standard library only, so pydantic is not
to be had on that side. A record is a frozen dataclass; every field is checked, unknown fields are refused.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, Dict, List, Literal, Mapping, Tuple, Type, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


class RecordError(ValueError):
    """A value does not have the shape its record asks for; the message names the field."""


def from_mapping(kind: Type[Record], values: Any, where: str = "") -> Record:
    """Build the dataclass `kind` from a mapping. Raises RecordError with the path of the offending field."""
    where = where or kind.__name__
    if not isinstance(values, Mapping):
        raise RecordError(f"{where}: expected a table, got {type(values).__name__}")
    fields, hints = _shape(kind)  # type: ignore[arg-type]  # a class is hashable
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise RecordError(f"{where}: unknown field {unknown[0]!r}; known fields are {', '.join(sorted(fields))}")
    arguments: Dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecordError(f"{where}: field {name!r} is missing")
    return kind(**arguments)


@lru_cache(maxsize=None)
def _shape(kind: Type[Any]) -> Tuple[Dict[str, "dataclasses.Field[Any]"], Dict[str, Any]]:
    """Fields and their types by name. They are text to be evaluated, which costs more than all the rest and is asked with every token."""
    return {field.name: field for field in dataclasses.fields(kind)}, get_type_hints(kind)


def to_mapping(value: Any) -> Any:
    """The plain JSON value of a record: dataclasses become objects, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_mapping(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_mapping(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_mapping(item) for item in value]
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Union:
        return _convert_union(get_args(hint), value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise RecordError(f"{where}: {value!r} is not one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if origin in (tuple, list):
        return _convert_sequence(hint, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecordError(f"{where}: expected a table, got {type(value).__name__}")
        item_hint = get_args(hint)[1]
        return {str(key): _convert(item_hint, item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where)
    return _convert_scalar(hint, value, where)


def _convert_union(options: Tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    return _convert(next(option for option in options if option is not type(None)), value, where)


def _convert_sequence(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise RecordError(f"{where}: expected a list, got {type(value).__name__}")
    arguments = get_args(hint)
    variadic = get_origin(hint) is list or (len(arguments) == 2 and arguments[1] is Ellipsis)
    if not variadic and len(value) != len(arguments):
        raise RecordError(f"{where}: expected {len(arguments)} values, got {len(value)}")
    hints: List[Any] = [arguments[0]] * len(value) if variadic else list(arguments)
    items = [_convert(item_hint, item, f"{where}[{index}]") for index, (item_hint, item) in enumerate(zip(hints, value))]
    return items if get_origin(hint) is list else tuple(items)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecordError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
