"""The virtual environment that tools/demo and tools/test share: .venv, made once. Needs only Python."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
EXTRAS = "cpu,export,serve,dev"


def say(message: str) -> None:
    """A heading between the tools' own output."""
    print(f"\n\033[1m{message}\033[0m" if sys.stdout.isatty() else f"\n{message}", flush=True)


def prepare() -> None:
    """Make .venv and install this project into it, unless that was done for this very pyproject.toml."""
    if sys.version_info < (3, 10):  # noqa: UP036 (run by whatever Python the user has)
        sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
    stamp = VENV / "installed-from"
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    say(f"Setting up {VENV} (once; PyTorch is the large part, a few minutes)")
    started = time.monotonic()
    venv.create(VENV, with_pip=True, clear=True)
    command = [str(BIN / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    quiet = [] if sys.stdout.isatty() else ["--quiet", "--progress-bar", "off"]
    run(*command, *quiet, "--editable", f"{ROOT}[{EXTRAS}]")
    stamp.write_text(digest)
    print(f"done in {time.monotonic() - started:.0f} s")


def run(*command: str) -> None:
    """Run a command in the project's folder; leave with its exit code if it fails, or with 130 on Ctrl-C."""
    try:
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:
        sys.exit(130)
    if code:
        print(f"failed ({code}): {' '.join(command)}", file=sys.stderr)
        sys.exit(code)


def tool(name: str) -> str:
    """Path of a program in the environment."""
    return str(BIN / name)
