"""Run both runtimes on an emulated arm64 processor (qemu), with the programs and libraries that system.py unpacks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import ROOT

from .compare import MAX_TOKENS, Request

ASK = ROOT / "tools" / "board" / "ask.py"


def emulator(core: str, root: Path, **environment: str | Path) -> list[str]:
    """The command that runs an arm64 program on `core` with the libraries of `root`."""
    words = [word for key, value in environment.items() for word in ("-E", f"{key}={value}")]
    return ["qemu-aarch64-static", "-cpu", core, "-L", str(root), *words]


def questions(packages: Sequence[Path], requests: Sequence[Request]) -> str:
    """What ask.py reads. The last package is checked, too: of the demo's, it has most kinds of arithmetic."""
    wishes = [{"prompt": r.prompt, "image": r.image, "policy": r.policy} for r in requests]
    names = [str(package) for package in packages]
    return json.dumps({"packages": names, "check": names[-1:], "requests": wishes, "max_tokens": MAX_TOKENS})


def python_interpreter(root: Path) -> Path:
    """Debian's python3 in `root`, by its full name: python3.13."""
    (found,) = (root / "usr" / "bin").glob("python3.[0-9][0-9]")
    return found


def ask_python(
    core: str, root: Path, wheels: Path, bytecode: Path, packages: Sequence[Path], requests: Sequence[Request]
) -> list[dict[str, Any]]:
    """ask.py's answers, package by package; {"error": line} from the one on that failed."""
    environment: dict[str, str | Path] = {
        "PYTHONHOME": "/usr",
        "PYTHONPATH": f"{ROOT / '.typing'}:{wheels}",
        "PYTHONPYCACHEPREFIX": bytecode,
    }
    command = [*emulator(core, root, **environment), str(python_interpreter(root)), str(ASK)]
    done = subprocess.run(command, input=questions(packages, requests), capture_output=True, text=True, check=False)
    said: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    return said + [{"error": last_line(done.stderr)}] * (len(packages) - len(said))


def ask_cpp(core: str, root: Path, release: Path, package: Path, requests: Sequence[Request]) -> dict[str, Any]:
    """autosteer-cli's answers, each by a process of its own; {"error": line} where one failed."""
    command = [*emulator(core, root), str(release / "bin" / "autosteer-cli"), str(package)]
    command += ["--json", "--threads", "1", "--max-tokens", str(MAX_TOKENS)]
    answers = []
    for request in requests:
        image = ["--image", request.image] if request.image else []
        words = [*command, "--prompt", request.prompt, "--policy", request.policy, *image]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": last_line(done.stderr)}
        answers.append(json.loads(done.stdout))
    return {"failed": [], "answers": answers}


def last_line(said: str) -> str:
    """Of stderr."""
    return (said.strip() or "no answer, and no word why").splitlines()[-1]
