"""Fuzz targets for the Python runtime, by name: what strangers hand over, as bytes.

Only errors of the runtime may come out. `run` gives them to atheris; tests/unit/test_attacks.py runs their corpus.
"""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import toy
from conformance_packages import CASES, PICTURES, Packages

from autosteer.runtime import Engine, Message
from autosteer.runtime.errors import AutoSteerError
from autosteer.runtime.evaluation.datasets import DataSource, read_rows
from autosteer.runtime.manifest import MANIFEST_FILE, Manifest, signed
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.stats import Stats
from autosteer.runtime.text import ImagePart, load_tokenizer
from autosteer.runtime.video import open_video


@functools.cache
def scratch() -> Path:
    """A folder for one file at a time."""
    return Path(tempfile.mkdtemp(prefix="autosteer-fuzz-"))


@functools.cache
def packages() -> Packages:
    """The packages of the conformance cases."""
    return Packages(scratch() / "packages")


@functools.cache
def engine() -> Engine:
    """The toy."""
    return Engine.load(packages().whole("toy"), device="cpu", threads=1)


def file_of(data: bytes, name: str = "file") -> Path:
    """A file with this content, which the next one overwrites."""
    (scratch() / name).write_bytes(data)
    return scratch() / name


def manifest(data: bytes) -> None:
    """autosteer.json, with a digest of its own: what is behind that check is read, too."""
    digest = re.search(rb'"manifest_sha256": "([0-9a-f]{64})"', data)
    with contextlib.suppress(UnicodeDecodeError):
        data = signed(data.decode(), digest[1].decode()).encode() if digest else data
    Manifest.load(file_of(data, MANIFEST_FILE).parent)


def tokenizer(data: bytes) -> None:
    """tokenizer.json."""
    load_tokenizer(file_of(data)).encode("a red circle")


def picture(data: bytes) -> None:
    """A picture, and the same as a video."""
    open_image(file_of(data))
    open_video(file_of(data), 3)


def prompt(data: bytes) -> None:
    """A dialogue, a line a turn. Every probed position must be one of its rows."""
    messages = []
    for line in data.decode("utf-8", "surrogateescape").split("\n")[:8]:
        if line:
            kind = ord(line[0])
            role = ("system", "user", "assistant")[kind % 3]
            shown = [ImagePart(np.full((1, 1, 3), 7, np.uint8))] if kind % 2 and role == "user" else []
            messages.append(Message(role, (*shown, line[1:]), role != "user" and kind % 5 == 0))  # type: ignore[arg-type]
    found = engine().encoder.prepare(messages, Stats())
    for read in found.probed:
        assert read == sorted(set(read)) and all(0 <= at < len(found.keys) for at in read)


def rows(data: bytes) -> None:
    """A test set of autosteer-eval."""
    read_rows([DataSource(file_of(data), True)], text_only=True)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "tokenizer": tokenizer,
    "picture": picture,
    "prompt": prompt,
    "rows": rows,
}


def corpus(target: str) -> Iterator[bytes]:
    """Inputs to begin with: sound ones, and what was found."""
    if target in ("manifest", "tokenizer"):
        name = MANIFEST_FILE if target == "manifest" else "tokenizer.json"
        yield from ((packages().whole(package) / name).read_bytes() for package in ("toy", "split", "tokens"))
        yield from (b"[" * 200_000, b'{"a":' * 70 + b"1" + b"}" * 70, b"\xff\xfe", b"")
    elif target == "picture":
        yield from (file.read_bytes() for file in sorted(PICTURES.iterdir()))
    elif target == "prompt":
        words = " ".join(toy.VOCABULARY[:20])
        yield from (f"{a}{words}\n{b}bad\n{c}red".encode() for a in "012" for b in "123456" for c in "147")
    elif target == "request":
        yield (CASES / "requests.json").read_bytes()[:4000]
        yield b'{"messages": [{"role": "system", "parts": ["a"], "trusted": true}, {"role": "user", "parts": ["b"]}]}'
    elif target == "rows":
        yield b'{"prompt": "red", "unsafe": true, "answer": "a"}\n{"turns": ["a", "b", "c"], "unsafe": false}'
        yield b'{"tur\\ns": ["a key that breaks the line"]}'
        yield b'{"question": "<image 1> a?", "options": "[\'a\', \'b\']", "answer": "A", "image_1": "x.png"}'


def attack(target: str, data: bytes) -> bool:
    """Run a target; whether it refused the input. Anything but an AutoSteerError is a finding."""
    said = None
    try:
        TARGETS[target](data)
    except AutoSteerError as err:
        said = str(err)
    assert said is None or "\n" not in said, "an error is one line"
    return said is not None
