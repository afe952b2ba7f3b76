"""JSON documents, changed in one place or another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from autosteer.runtime.manifest import PREFILL_GRAPHS, UNSIGNED, signed

Keys = tuple[str | int, ...]  # where a value is in the JSON document


def changed(document: dict[str, Any], keys: Keys, value: Any) -> dict[str, Any]:
    """A copy of the document with another value at `keys`."""
    data = json.loads(json.dumps(document))  # ten times as quick as deepcopy
    at = data
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return data


def without(document: dict[str, Any], keys: Keys) -> dict[str, Any]:
    data = json.loads(json.dumps(document))  # ten times as quick as deepcopy
    at: Any = data
    for key in keys[:-1]:
        at = at[key]
    del at[keys[-1]]
    return data


def places_of(data: Any, prefix: Keys = ()) -> Iterator[Keys]:
    """Where every value of a document is, innermost and all."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from places_of(value, (*prefix, key))


OTHERS = {"embed_tokens", "decoder_upper", *PREFILL_GRAPHS.values(), "lm_head", "refusal_head", "vision_encoder"}


def kinds(data: Any) -> list[Keys]:
    """One place of each kind: the first of a list's items, two of the graphs."""
    first = [keys for keys in places_of(data) if not any(isinstance(k, int) and k > 0 for k in keys)]
    return [keys for keys in first if OTHERS.isdisjoint(keys)]


def value_at(data: Any, keys: Keys) -> Any:
    for key in keys:
        data = data[key]
    return data


def manifest_text(data: Any) -> str:
    """A manifest as JSON with a digest of its own, if it has one: edited, not damaged."""
    text = json.dumps(data)
    digest = data.get("manifest_sha256") if isinstance(data, dict) else None
    return signed(text, digest) if isinstance(digest, str) and len(digest) == len(UNSIGNED) else text
