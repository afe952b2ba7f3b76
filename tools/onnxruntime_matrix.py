"""Does every onnxruntime answer as the newest one does? tools/matrix runs this.

The demo is exported at every precision with the onnxruntime of this environment. Every version, each in a process of
its own, then answers 30 dialogues with each package (version_matrix/cases.py): passed, steered, stopped, with several
pictures, two turns, forced drafts. Token ids, verdicts and p_unsafe are compared with this environment's. Exit code 1
where a version that a package allows (export/floor.py) does not answer alike; what it does not allow is shown.

What is made lies in build/matrix: wheels, which are kept, packages, pictures.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from version_matrix.cases import make_cases
from version_matrix.compare import Cell, compare
from version_matrix.environments import BUILD, ROOT, Interpreter, NoWheel, installed

from autosteer.export.floor import lowest_onnxruntime
from autosteer.export.graphs.quantize import recipe
from autosteer.runtime.console import dumps, run_command, table

VERSIONS = (
    *("1.20.1", "1.21.1", "1.22.1", "1.23.2", "1.24.4", "1.25.1", "1.26.0", "1.27.0", "1.28.0", "1.29.0", "1.30.0"),
    *("1.31.1", "1.32.0"),
)
HERE = Path(__file__).resolve().parent / "version_matrix"
CPP = ROOT / "runtime" / "cpp"


@dataclass(frozen=True)
class Kind:
    """A package of the demo, and what it needs."""

    precision: str
    options: tuple[str, ...]  # of autosteer-export
    lowest: str  # onnxruntime


KINDS = {
    "fp32": Kind("fp32", (), lowest_onnxruntime(recipe("fp32"))),
    "fp16": Kind("fp16", (), lowest_onnxruntime(recipe("fp16"))),
    "int8": Kind("int8", (), lowest_onnxruntime(recipe("int8"))),
    "int4": Kind("int4", (), lowest_onnxruntime(recipe("int4"))),
    "int4-head4": Kind("int4", ("--head-bits=4",), lowest_onnxruntime(recipe("int4", head_bits=4))),
    "int4-kv8": Kind("int4", ("--kv-cache=int8",), lowest_onnxruntime(recipe("int4", caches="int8"))),
    "int4-prefill8": Kind("int4", ("--prefill-precision=int8",), lowest_onnxruntime(recipe("int4", prefill="int8"))),
}


def numbers(version: str) -> tuple[int, ...]:
    """ "1.23.2" -> (1, 23, 2)"""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def oldest() -> str:
    """The oldest of VERSIONS that pyproject.toml allows."""
    floor = re.search(r'"onnxruntime>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert floor, "pyproject.toml names no lowest onnxruntime"
    return next(version for version in VERSIONS if numbers(version) >= numbers(floor[1]))


def export(name: str) -> Path:
    """The demo's package of that name, made anew."""
    kind, folder = KINDS[name], BUILD / "packages" / name
    command = [sys.executable, "-c", "from autosteer.export.cli import main; main()", "--model", "demo", "--force"]
    command += ["--output", str(folder), "--precision", kind.precision, *kind.options]
    _run(command, env=Interpreter().environ(installed()))
    return folder


def ask(
    command: Sequence[str], environ: dict[str, str], package: Path, cases: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What a worker (answer.py, answer_c.py) says to the cases, without its first line; one that dies says less."""
    text = "".join(json.dumps(line) + "\n" for line in ({"package": str(package)}, *cases))
    done = subprocess.run(command, env=environ, input=text, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if not lines:
        return [{"error": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]}]
    return lines[1:]


class Runtimes:
    """The commands that answer, by version."""

    def __init__(self, interpreter: Interpreter, build: Path = BUILD / "cpp"):
        """`build`: a folder of CMake's for runtime/cpp."""
        self._interpreter, self._build = interpreter, build

    def python(self, version: str) -> tuple[list[str], dict[str, str]]:
        """The Python runtime on that onnxruntime. Raises NoWheel."""
        return [self._interpreter.python, str(HERE / "answer.py")], self._interpreter.environ(version)

    def cpp(self, version: str) -> tuple[list[str], dict[str, str]]:
        """The C++ runtime, which loads that wheel's library: one binary for all versions. Raises NoWheel."""
        library = self._interpreter.library(version)
        _run(["cmake", "-S", str(CPP), "-B", str(self._build)])
        _run(["cmake", "--build", str(self._build), "-j2", "--target", "autosteer-shared"])
        command = [sys.executable, str(HERE / "answer_c.py"), str(self._build / "libautosteer.so")]
        return command, {**os.environ, "AUTOSTEER_ONNXRUNTIME": str(library)}


@dataclass(frozen=True)
class Row:
    """One version with one runtime: a cell for each package, or why there is none."""

    version: str
    runtime: str  # "Python 3.11.7", "C++"
    cells: dict[str, Cell]
    missing: str | None = None

    def supported(self, name: str) -> bool:
        """Whether the package may run there."""
        return numbers(self.version)[:2] >= numbers(KINDS[name].lowest)

    @property
    def wrong(self) -> list[str]:
        """Packages that may run there and do not answer as the newest version does."""
        return [n for n, c in self.cells.items() if self.supported(n) and not c.good(KINDS[n].precision)]


def rows(
    versions: Sequence[str], packages: dict[str, Path], pictures: Path, runtimes: Runtimes, cpp: Sequence[str], who: str
) -> Iterator[Row]:
    """The table, row by row: `versions` with the Python runtime, which is called `who`, and `cpp` with the other."""
    cases = make_cases(pictures)
    own = Runtimes(Interpreter()).python(installed())
    reference = {name: ask(*own, package, cases) for name, package in packages.items()}
    for name, lines in reference.items():
        if broken := [line["error"] for line in lines if "error" in line]:
            raise click.ClickException(
                f"{name} on onnxruntime {installed()}, the reference for all others: {broken[0]}"
            )
    for runtime, find, chosen in ((who, runtimes.python, versions), ("C++", runtimes.cpp, cpp)):
        for version in chosen:
            try:
                command, environ = find(version)
            except NoWheel as err:
                yield Row(version, runtime, {}, str(err))
                continue
            cells = {n: compare(ask(command, environ, p, cases), reference[n]) for n, p in packages.items()}
            yield Row(version, runtime, cells)


def as_table(found: Sequence[Row], names: Sequence[str]) -> str:
    """A Markdown table. In brackets: what this version is not allowed to run, and what came of it."""

    def text(row: Row, name: str) -> str:
        if row.missing:
            return row.missing
        said = row.cells[name].text(KINDS[name].precision)
        return said if row.supported(name) else f"({said})"

    lines = [[f"{row.version}, {row.runtime}", *(text(row, name) for name in names)] for row in found]
    lowest = ["allowed from", *(KINDS[name].lowest for name in names)]
    return table(["onnxruntime", *names], [lowest, *lines])


def _run(command: Sequence[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _choice(text: str | None, allowed: Sequence[str], what: str) -> list[str]:
    """Comma-separated words, "oldest" and "newest" among versions; None: all."""
    words = list(allowed) if text is None else text.split(",")
    words = [{"oldest": oldest(), "newest": installed()}.get(word, word) for word in words]
    if what == "package" and (unknown := set(words) - set(allowed)):
        raise click.UsageError(f"no {what} {', '.join(sorted(unknown))}; there are {', '.join(allowed)}")
    return words


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--versions", "--only", help="Comma-separated; may contain 'oldest' and 'newest'. [all]")
@click.option("--packages", help=f"Comma-separated, of {', '.join(KINDS)}. [all]")
@click.option("--python", default=sys.executable, help="The interpreter that runs the packages. [this one]")
@click.option("--cpp", help="Versions to run the C++ runtime on, too; needs the packages of docs/embedding.md. [none]")
@click.option("--keep", is_flag=True, help="Use the packages of the last run instead of exporting them anew.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every cell to this file.")
def main(
    versions: str | None, packages: str | None, python: str, cpp: str | None, keep: bool, json_file: Path | None
) -> None:
    wanted = _choice(versions, VERSIONS, "version")
    names = _choice(packages, list(KINDS), "package")
    folders = {}
    for name in names:
        known = BUILD / "packages" / name
        if not (keep and known.is_dir()):
            print(f"exporting {name}", file=sys.stderr, flush=True)
            export(name)
        folders[name] = known
    interpreter = Interpreter(python)
    found: list[Row] = []
    who = f"Python {interpreter.version}"
    chosen_cpp = _choice(cpp, (), "version") if cpp else []
    for row in rows(wanted, folders, BUILD / "pictures", Runtimes(interpreter), chosen_cpp, who):
        found.append(row)
        wrong = f"WRONG: {', '.join(row.wrong)}" if row.wrong else row.missing or "ok"
        print(f"onnxruntime {row.version}, {row.runtime}: {wrong}", file=sys.stderr, flush=True)
        for name, cell in row.cells.items():
            if cell.error:
                print(f"  {name}: {cell.error[:300]}", file=sys.stderr, flush=True)
    print(as_table(found, names))
    if json_file:
        facts = [dataclasses.asdict(row) | {"wrong": row.wrong} for row in found]
        json_file.write_text(dumps(facts) + "\n", encoding="utf-8")
    if any(row.wrong for row in found):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
