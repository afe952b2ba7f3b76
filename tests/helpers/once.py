"""Folders that all test processes of a run share: whoever asks first fills one, the others wait for it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

RUN_FOLDER = "AUTOSTEER_TESTS_RUN"  # environment variable: conftest.py sets it, and pytest-xdist's workers inherit it


def start_run() -> None:
    """Make the folder of this run, in the process that starts the others."""
    os.environ[RUN_FOLDER] = tempfile.mkdtemp(prefix="autosteer-tests-")


def end_run() -> None:
    """Delete it."""
    shutil.rmtree(os.environ.pop(RUN_FOLDER), ignore_errors=True)


def once(name: str, fill: Callable[[Path], object]) -> Path:
    """The folder `name` of this run, which `fill` has filled. If `fill` fails, the next process tries again."""
    folder = Path(os.environ[RUN_FOLDER]) / name
    filled = folder.with_name(f"{name}.filled")
    with FileLock(f"{folder}.lock"):
        if not filled.exists():
            shutil.rmtree(folder, ignore_errors=True)
            fill(folder)
            filled.touch()
    return folder
