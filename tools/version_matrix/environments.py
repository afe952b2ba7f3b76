"""Interpreters with an onnxruntime of one version each, made once and kept in build/matrix."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "matrix"


class NoWheel(Exception):
    """This onnxruntime has no wheel for this Python."""


@functools.cache
def installed() -> str:
    """The onnxruntime of this interpreter, the reference for all others."""
    return importlib.metadata.version("onnxruntime")


class Interpreter:
    """A Python with the runtime's dependencies, into whose path an onnxruntime is put."""

    def __init__(self, python: str = sys.executable):
        """`python`: this interpreter as it is; of another one, a virtual environment is made."""
        self.version = _said(python, "-c", "import platform; print(platform.python_version())").strip()
        self._folder = BUILD / f"python{self.version}"
        self.python = python
        if python != sys.executable:
            self.python = str(self._folder / "venv" / "bin" / "python")
            done = self._folder / "installed"
            if not done.exists():
                _said(python, "-m", "venv", "--clear", str(self._folder / "venv"))
                self._pip("onnxruntime", *_dependencies())
                done.touch()

    def environ(self, onnxruntime: str) -> dict[str, str]:
        """The environment in which this interpreter imports the sources and that onnxruntime.

        Raises NoWheel; CalledProcessError where pip fails otherwise.
        """
        path = [str(ROOT / ".typing")]
        if self.python != sys.executable or onnxruntime != installed():
            path.insert(0, str(self.site(onnxruntime)))
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}

    def site(self, onnxruntime: str) -> Path:
        """A folder with that onnxruntime alone."""
        folder = self._folder / f"onnxruntime-{onnxruntime}"
        done = folder / "installed"
        if not done.exists():
            self._pip("--no-deps", "--upgrade", "--target", str(folder), f"onnxruntime=={onnxruntime}")
            done.touch()
        return folder

    def library(self, onnxruntime: str) -> Path:
        """That wheel's libonnxruntime.so.1.2.3."""
        if self.python == sys.executable and onnxruntime == installed():
            package = Path(str(importlib.metadata.distribution("onnxruntime").locate_file("onnxruntime")))
        else:
            package = self.site(onnxruntime) / "onnxruntime"
        return next((package / "capi").glob("libonnxruntime.so.*"))

    def _pip(self, *arguments: str) -> None:
        options = ("--disable-pip-version-check", "--quiet", "--progress-bar", "off")
        try:
            _said(self.python, "-m", "pip", "install", *options, *arguments)
        except subprocess.CalledProcessError as err:
            others = re.search(r"from versions: (.+)\)", err.stderr)
            if others and others[1] != "none":  # "none" is what pip says without a network
                raise NoWheel(f"no wheel for Python {self.version}") from err
            raise


def _dependencies() -> list[str]:
    """What the runtime itself needs, by pyproject.toml."""
    required = importlib.metadata.requires("autosteer-edge") or []
    return [line for line in required if "extra ==" not in line]


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout
