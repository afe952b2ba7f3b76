"""The demo model, exported once per run and precision, for the tests that need real packages."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from once import once
from traced import trace_once

from autosteer.export.checkpoint.open import Checkpoint, open_checkpoint
from autosteer.export.cli import export
from autosteer.export.package import ExportOptions, write_package
from autosteer.runtime.engine import Engine

trace_once()
SCRATCH = Path(tempfile.mkdtemp(prefix="autosteer-tests-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)


@cache
def demo_checkpoint() -> Checkpoint:
    """The bundled checkpoint."""
    return open_checkpoint("demo")


INT8_CACHES = "--kv-cache=int8"
PREFILL = "--prefill-precision=int8"


@cache
def demo_package(precision: str, *options: str) -> Path:
    """A validated package of the demo model, made by the command itself."""

    def write(folder: Path) -> None:
        arguments = ["--model", "demo", "--output", str(folder), "--precision", precision, *options]
        export.main(arguments, standalone_mode=False)

    return once("-".join(["demo", precision, *(option.strip("-") for option in options)]), write)


@cache
def demo_engine(precision: str, *options: str) -> Engine:
    """That package, loaded."""
    return Engine.load(demo_package(precision, *options), device="cpu", threads=1)


@cache
def unguarded_engine(split_layer: int) -> Engine:
    """The demo split elsewhere, without a gate (its prober belongs to one layer)."""

    def write(folder: Path) -> None:
        folder.mkdir()
        write_package(folder, demo_checkpoint(), None, ExportOptions(split_layer=split_layer), lambda _: None)

    folder = once(f"demo-split-{split_layer}", write)
    return Engine.load(folder, device="cpu", threads=1)
