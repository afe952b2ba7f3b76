"""The command-line tools: as installed programs, and their main()."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from terminal import PATIENCE

from autosteer.runtime.cli import bench_main, check_main, draft_main, run_main
from autosteer.runtime.evaluation.cli import main as eval_main

MAINS = {
    "autosteer-run": run_main,
    "autosteer-check": check_main,
    "autosteer-bench": bench_main,
    "autosteer-draft": draft_main,
    "autosteer-eval": eval_main,
}


def program(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is not installed beside {sys.executable}: pip install -e ."
    return found


def installed(name: str, *args: object, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """Run the installed program."""
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run([program(name), *map(str, args)], input=data, capture_output=True, timeout=PATIENCE)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
