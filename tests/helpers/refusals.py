"""Every place in the sources of both runtimes that refuses something, and which of them no refusal came through."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

RUNTIME = Path(__file__).resolve().parents[2] / "runtime"
NO_REFUSAL = (  # what is raised or thrown for other reasons: the machine, or a mistake of ours
    *("AutoSteerError", "ProviderError", "ImportError", "IndexError", "RuntimeError"),
    *("Error", "ProviderError", "std::bad_alloc", "std::logic_error"),
)


@dataclass(frozen=True)
class Site:
    """A statement that refuses: a raise or a throw, or a call of what does that where a condition fails."""

    file: str
    first: int  # lines of it
    last: int
    text: str  # its source, in one line

    def __str__(self) -> str:
        return f"{self.file}:{self.first}: {self.text}"


def python_sites(*files: str) -> list[Site]:
    """Sites of runtime/*.py: `raise`, and calls of `need`."""
    found = []
    for file in files:
        source = (RUNTIME / file).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                refuses = ast.unparse(node.exc.func) not in NO_REFUSAL
            else:
                refuses = isinstance(node, ast.Call) and ast.unparse(node.func) == "need"
            if refuses:
                assert isinstance(node, (ast.Raise, ast.Call)) and node.end_lineno
                text = " ".join((ast.get_source_segment(source, node) or "").split())
                found.append(Site(file, node.lineno, node.end_lineno, text))
    return found


CALLS = re.compile(r"(?<!\[\[noreturn\]\] void )(?<!static )\b(?:throw ([\w:]+)|need|need_hash|fail|misfit|unknown)\(")


def cpp_sites(*files: str) -> list[Site]:
    """Sites of runtime/cpp/src/*.hpp: `throw`, and calls of what throws where its condition fails."""
    found = []
    for file in files:
        source = (RUNTIME / "cpp" / "src" / file).read_text(encoding="utf-8")
        for call in CALLS.finditer(source):
            comment = "//" in source[source.rfind("\n", 0, call.start()) + 1 : call.start()]
            if comment or call[1] in NO_REFUSAL:
                continue
            end = _closing(source, call.end() - 1)
            text = " ".join(source[call.start() : end].split())
            found.append(Site(file, source.count("\n", 0, call.start()) + 1, source.count("\n", 0, end) + 1, text))
    return found


def _closing(source: str, at: int) -> int:
    """One past the bracket that closes the one at `at`."""
    depth = 0
    for token in re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)\'|[()]').finditer(source, at):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    raise ValueError(f"a bracket is never closed: {source[at : at + 50]}")


def cpp_lines(program: Path, addresses: Iterable[int]) -> set[tuple[str, int]]:
    """Files and lines of a program's return addresses, those of inlined functions included."""
    text = "\n".join(hex(address - 1) for address in sorted(set(addresses)))
    command = ["addr2line", "--inlines", "--basenames", "--exe", str(program)]
    out = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\S+):(\d+)", out, re.MULTILINE)
    return {(file, int(line)) for file, line in found}


def unreached(sites: Iterable[Site], lines: Collection[tuple[str, int]], exempt: dict[str, str]) -> list[str]:
    """Sites that none of `lines` is in and that are not exempt (a piece of their text: the reason), and exemptions
    that are none: of no site, or of one that was reached.
    """
    used, missed = set(), []
    for site in sites:
        excused = [piece for piece in exempt if piece in str(site)]
        reached = any((site.file, line) in lines for line in range(site.first, site.last + 1))
        if not reached:
            used.update(excused)
            missed += [] if excused else [str(site)]
    return missed + [f"exempt, but reached or not there: {piece}" for piece in exempt.keys() - used]
