"""Decode JSON strictly into frozen dataclasses, and write the equivalent JSON Schema for other languages.

Unknown keys, missing keys, values of another type and keys given twice are errors that name the path.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections import Counter
from typing import Any, Literal, TypeVar

from .errors import PackageError

T = TypeVar("T")

MAX_DEPTH = 64  # of arrays and objects in each other
_NESTED = (dict, list)


def decode(cls: type[T], data: Any, where: str) -> T:
    """Build the frozen dataclass `cls` from parsed JSON. `where`: its path, for errors.

    Raises PackageError with the path of the first value that does not fit. Keys with a default may be absent.
    """
    return typing.cast(T, _decode(cls, data, where))


@functools.cache
def _type_hints(kind: type) -> dict[str, Any]:
    """typing.get_type_hints, cached: it evaluates every annotation, and took 90 % of the time of reading a manifest."""
    return typing.get_type_hints(kind)


@functools.cache
def _taken_apart(kind: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """A type's origin, its arguments, and whether it is a dataclass: cached, as a manifest has thousands of values."""
    return typing.get_origin(kind), typing.get_args(kind), dataclasses.is_dataclass(kind)


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, args, is_object = _taken_apart(kind)
    if is_object:
        if not isinstance(data, dict):
            raise PackageError(f"{where}: expected an object")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        if unknown := sorted(data.keys() - fields.keys()):
            raise PackageError(f"{where}: unknown key {unknown[0]!r}")
        required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - data.keys()):
            raise PackageError(f"{where}: missing key {missing[0]!r}")
        hints = _type_hints(typing.cast(type, kind))
        return kind(**{key: _decode(hints[key], value, f"{where}: {key}") for key, value in data.items()})
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        fitting = [a for a in options if len(options) == 1 or isinstance(data, a)]
        if fitting:
            return _decode(fitting[0], data, where)
    elif origin is Literal:
        if data in args:
            return data
        raise PackageError(f"{where}: {shown(data)} is not one of {', '.join(map(repr, args))}")
    elif origin is tuple and isinstance(data, list):
        if args[-1] is Ellipsis:
            return tuple(_decode(args[0], x, f"{where}[{i}]") for i, x in enumerate(data))
        if len(args) == len(data):
            return tuple(_decode(a, x, f"{where}[{i}]") for i, (a, x) in enumerate(zip(args, data, strict=True)))
    elif origin is dict and isinstance(data, dict):
        return {_decode(str, key, where): _decode(args[1], value, f"{where}: {key}") for key, value in data.items()}
    elif kind is float:
        if isinstance(data, (int, float)) and not isinstance(data, bool) and _finite(data):
            return float(data)
    elif kind is int:
        if (
            isinstance(data, int) and not isinstance(data, bool) and -(2**63) <= data < 2**63
        ):  # int64, as in other languages
            return data
    elif kind is str:
        if isinstance(data, str) and is_text(data):
            return data
    elif isinstance(kind, type) and isinstance(data, kind):
        return data
    raise PackageError(f"{where}: {shown(data)} does not fit (expected {getattr(kind, '__name__', kind)})")


def shown(data: Any) -> str:
    """The beginning of a value's text, for errors: one line, and valid Unicode."""
    return repr(data)[:60]


def _finite(number: int | float) -> bool:
    """Whether it is a finite float64. Python's parser accepts NaN and infinities."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def is_text(text: str) -> bool:
    """Whether it is valid Unicode: no lone surrogate such as JSON's \\ud800, which other parsers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse(text: str) -> Any:
    """Parse JSON. Raises ValueError for what is none, for keys given twice, and for more than MAX_DEPTH levels of
    arrays and objects in each other, which parsers in other languages cannot hold on their stacks.
    """
    try:
        data = json.loads(text, object_pairs_hook=no_duplicates)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        inside = [value.values() if isinstance(value, dict) else value for value in level if isinstance(value, _NESTED)]
        if not inside:
            return data
        level = [value for values in inside for value in values]
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for object_pairs_hook. Raises ValueError for duplicate keys: parsers differ in which one wins."""
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"key {next(key for key in counts if counts[key] > 1)!r} is given twice")
    return found


def json_schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of what `decode` accepts for a dataclass, or for the type of a field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = _type_hints(typing.cast(type, kind))
        fields = dataclasses.fields(kind)
        return {
            "type": "object",
            "description": (kind.__doc__ or "").strip().split("\n")[0],
            "properties": {f.name: json_schema(hints[f.name]) for f in fields},
            "required": [f.name for f in fields if f.default is dataclasses.MISSING],
            "additionalProperties": False,
        }
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [json_schema(a) for a in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        if args[-1] is Ellipsis:
            return {"type": "array", "items": json_schema(args[0])}
        return {
            "type": "array",
            "prefixItems": [json_schema(a) for a in args],
            "minItems": len(args),
            "maxItems": len(args),
        }
    if origin is dict:
        return {"type": "object", "additionalProperties": json_schema(args[1])}
    return {"type": {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}[kind]}
