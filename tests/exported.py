"""The demo model, exported once per session and precision, for the tests that need real packages."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from autosteer.export.checkpoint import Checkpoint, open_checkpoint
from autosteer.export.cli import export
from autosteer.export.package import ExportOptions, write_package
from autosteer.runtime.engine import Engine

SCRATCH = Path(tempfile.mkdtemp(prefix="autosteer-tests-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)


@cache
def demo_checkpoint() -> Checkpoint:
    """The bundled checkpoint."""
    return open_checkpoint("demo")


def demo_package(precision: str, kv_cache: str = "float32") -> Path:
    """A validated package of the demo model, made by the command itself."""
    return _package(precision, kv_cache)


@cache
def _package(precision: str, kv_cache: str) -> Path:
    folder = SCRATCH / f"demo-{precision}-{kv_cache}"
    arguments = ["--model", "demo", "--output", str(folder), "--precision", precision, "--kv-cache", kv_cache]
    export.main(arguments, standalone_mode=False)
    return folder


def demo_engine(precision: str, kv_cache: str = "float32") -> Engine:
    """That package, loaded."""
    return _engine(precision, kv_cache)


@cache
def _engine(precision: str, kv_cache: str) -> Engine:
    return Engine.load(demo_package(precision, kv_cache), device="cpu", threads=1)


@cache
def unguarded_engine(split_layer: int) -> Engine:
    """The demo split elsewhere, without a gate (its prober belongs to one layer)."""
    folder = SCRATCH / f"demo-split-{split_layer}"
    folder.mkdir()
    write_package(folder, demo_checkpoint(), None, ExportOptions(split_layer=split_layer), lambda _: None)
    return Engine.load(folder, device="cpu", threads=1)
