"""The command tools/aarch64, step by step."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from environment import ROOT, prepare, tool

from . import release
from .compare import Row, compare, prove_something, requests, table
from .emulate import ASK, ask_cpp, ask_python, python_interpreter, questions
from .system import ToolError, call, debian_mirror, missing, once, unpack, wheels

BUILD = ROOT / "build" / "aarch64"
OLD_SYSTEM, NEW_SYSTEM = BUILD / "old-system", BUILD / "new-system"  # Debian 11 for C++, Debian 13 for Python
NEW_SUITE = "trixie"
# With the dot products of 8-bit numbers (Jetson Orin, Raspberry Pi 5), and without (Jetson Nano, Raspberry Pi 4).
CORES = ("cortex-a76", "cortex-a57")
OLD_ONNXRUNTIME = "1.23.2"  # what pip takes on JetPack 6, which has Python 3.10
EXPORTS = {
    "fp32": ("--precision", "fp32"),
    "int8": ("--precision", "int8"),
    "int4": ("--precision", "int4"),
    "int4-prefill8": ("--precision", "int4", "--prefill-precision", "int8"),
}
STARTED = time.monotonic()


def main(usage: str) -> int:
    """Exit code: 0, or 1 where a runtime does not do there what it does here."""
    try:
        return run(parse(usage))
    except ToolError as error:
        print(f"tools/aarch64: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parse(usage: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tools/aarch64", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--release", action="store_true", help="build the C++ runtime for boards, and run nothing")
    add("--core", action="append", help=f"qemu's name of a processor; repeatable. Default: {', '.join(CORES)}")
    add("--onnxruntime", action="append", help=f"a version; repeatable. Default: this machine's, {OLD_ONNXRUNTIME}")
    exported = ", ".join(EXPORTS)
    add("--package", action="append", type=Path, help=f"one of the demo's; repeatable. Default: exports of {exported}")
    add("--python", help="interpreter that exports, and answers on this machine. Default: .venv, created if missing")
    add("--mirror", help="URL of a Debian archive. Default: this machine's")
    add(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="emulators that run at a time. Default: all cores",
    )
    add("--json", action="store_true", help="the rows as JSON")
    return parser.parse_args()


def run(wanted: argparse.Namespace) -> int:
    if absent := missing():
        raise ToolError(f"something is missing: apt-get install {' '.join(sorted(absent))}")
    if not wanted.python:
        prepare()
    python = wanted.python or tool("python")
    newest = call(python, "-c", "import onnxruntime; print(onnxruntime.__version__)").strip()
    versions = wanted.onnxruntime or [newest, OLD_ONNXRUNTIME]
    BUILD.mkdir(parents=True, exist_ok=True)
    build(python, versions, wanted.mirror)
    if wanted.release:
        return 0
    packages = [package.resolve() for package in wanted.package] if wanted.package else export(python)
    rows = ask(python, packages, wanted.core or CORES, versions, wanted.jobs)
    bad = [row for row in rows if row.problems]
    for row in bad:
        for problem in row.problems:
            place = f"{row.core}, onnxruntime {row.onnxruntime}, {row.runtime}, {row.package}"
            print(f"{place}: {problem}", file=sys.stderr)
    here = {"machine": platform.machine(), "onnxruntime": newest}
    said = f"compared with {' and '.join(here.values())}\n\n{table(rows)}"
    print(said, file=sys.stderr if wanted.json else sys.stdout)
    if wanted.json:
        print(json.dumps({"here": here, "rows": [row.as_json() for row in rows]}))
    progress("FAILED" if bad else "done")
    return int(bool(bad))


def progress(message: str) -> None:
    """A line on stderr, with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:4.0f} s  {message}", file=sys.stderr, flush=True)


def build(python: str, versions: Sequence[str], mirror: str | None) -> None:
    """Roots, wheels and the C++ runtime, as far as they are not there yet."""

    def archive() -> str:
        return mirror.rstrip("/") if mirror else debian_mirror()

    def old_system(root: Path) -> None:
        unpack(root, archive(), release.SUITE, release.PACKAGES)
        release.only_archives(root)

    def new_system(root: Path) -> None:
        unpack(root, archive(), NEW_SUITE, ["python3", "libstdc++6"], alone=["libonnxruntime-dev"])  # for its headers

    if once(OLD_SYSTEM, [release.SUITE, release.PACKAGES, release.STATIC], old_system):
        progress(f"unpacked Debian {release.SUITE}'s arm64 packages, for the C++ runtime")
    if once(NEW_SYSTEM, NEW_SUITE, new_system):
        progress(f"unpacked Debian {NEW_SUITE}'s arm64 packages, for the Python runtime")
    version = python_interpreter(NEW_SYSTEM).name.removeprefix("python")
    for onnxruntime in versions:
        if once(site(onnxruntime), version, partial(wheels, python=python, onnxruntime=onnxruntime, version=version)):
            progress(f"unpacked onnxruntime {onnxruntime} and the other wheels for Python {version}")
    release.cross_compile(BUILD / "build", OLD_SYSTEM, NEW_SYSTEM / "usr" / "include" / "onnxruntime")
    for onnxruntime in versions:
        folder = release_folder(onnxruntime)
        release.assemble(folder, BUILD / "build", OLD_SYSTEM, site(onnxruntime) / "onnxruntime")
        progress("\n        ".join([f"{folder.relative_to(ROOT)}/", *release.check(folder)]))


def site(onnxruntime: str) -> Path:
    """Wheels for one version of onnxruntime."""
    return BUILD / f"wheels-{onnxruntime}"


def release_folder(onnxruntime: str) -> Path:
    """What goes to a board."""
    return BUILD / f"release-{onnxruntime}"


def export(python: str) -> list[Path]:
    """The demo's packages, exported again when a file of the code or of the checkpoint has changed."""
    digest = hashlib.sha256()
    for source in sorted(p for part in ("export", "models", "runtime") for p in (ROOT / part).rglob("*")):
        if source.is_file() and not {"__pycache__", "cpp"} & set(source.parts):
            digest.update(f"{source.relative_to(ROOT)}\0".encode() + source.read_bytes())
    command = [python, "-c", "from autosteer.export.cli import main; main()", "--model", "demo", "--output"]
    for name, options in EXPORTS.items():
        folder = BUILD / "packages" / name

        def write(part: Path, name: str = name, options: Sequence[str] = options) -> None:
            ours(*command, part / name, *options)

        if once(folder, [options, digest.hexdigest()], write):
            progress(f"exported the demo as {name}")
    return [BUILD / "packages" / name / name for name in EXPORTS]


def ours(*command: str | Path, **options: Any) -> str:
    """Run a command with this checkout's code, whatever is installed."""
    return call("env", f"PYTHONPATH={ROOT / '.typing'}", *command, **options)


def ask(python: str, packages: Sequence[Path], cores: Sequence[str], versions: Sequence[str], jobs: int) -> list[Row]:
    """Ask this machine and all others the same, and compare."""
    asked = requests()
    here = [json.loads(line) for line in ours(python, ASK, input=questions(packages, asked)).splitlines()]
    for said in here:
        prove_something(said["package"], said["answers"])
    progress("asked this machine")

    def by_python(core: str, version: str) -> list[dict[str, Any]]:
        answers = ask_python(core, NEW_SYSTEM, site(version), BUILD / "bytecode", packages, asked)
        progress(f"asked the Python runtime: {core}, onnxruntime {version}")
        return answers

    def by_cpp(core: str, version: str) -> list[dict[str, Any]]:
        answers = [ask_cpp(core, OLD_SYSTEM, release_folder(version), package, asked) for package in packages]
        progress(f"asked the C++ runtime: {core}, onnxruntime {version}")
        return answers

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        there = {
            (core, version, runtime): pool.submit(ask_it, core, version)
            for core in cores
            for version in versions
            for runtime, ask_it in (("Python", by_python), ("C++", by_cpp))
        }
    pairs = [(place, zip(here, answers.result(), strict=True)) for place, answers in there.items()]
    return [line(one, other, *place) for place, answers in pairs for one, other in answers]


def line(here: dict[str, Any], there: dict[str, Any], core: str, version: str, runtime: str) -> Row:
    """One package's line of the table; `there` may be {"error": why}."""
    if "error" in there:
        equal, drift, problems = 0, 0.0, [f"no answers: {there['error']}"]
    else:
        facts = {"exact": here["exact"], "limit": here["limit"]}
        equal, drift, problems = compare(requests(), here["answers"], there["answers"], **facts)
        problems += [f"autosteer-check fails: {name}" for name in there["failed"]]
    return Row(core, version, runtime, here["package"], len(here["answers"]), equal, drift, problems)
