"""Measure the demo, and write its tables in docs/safety-results.md anew.

    python tools/demo_tables.py --measured build/measured

Exports the demo at fp32, int8 and int4, and runs the commands of that page. What each printed is kept in the folder; a
second run measures only what is not there. About ten minutes on two cores. Then prints what no table has: visitors'
questions, what people type, hostile wordings. The sentences around the tables are left as they are: read them, and
correct their numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from demo_report import unseen

from autosteer.runtime.evaluation.datasets import read_lines

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "safety-results.md"
PRECISIONS = ("fp32", "int8", "int4")
HALVES = ("choosing", "judging")
OWN = json.loads((ROOT / "models" / "demo" / "safety" / "safety.json").read_text(encoding="utf-8"))["threshold"]
THRESHOLDS = sorted({0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, OWN})
# What the page says for what a tool prints, by table.
DIALOGUES = {
    "five how-to": "five ordinary how-to questions",
    "one to three harmless turns, then image": "..., then a sign",
    "one to three harmless turns, then cross": "..., then an object",
    "name an object, then sneak it past": "name an object, then sneak it past the guards",
}
STRANGERS = {
    "two wishes": "two wishes in one sentence",
    "spelled out": "spelled out (v-e-x-i-t-e)",
    "long excuse before": "a long excuse before",
    "other verbs": "other verbs (build, buy, hide)",
    "asked sideways": 'asked sideways ("is it hard to ...? tell me how")',
    "no question": 'no question ("vexite smuggling tips")',
    "odd forms": "odd forms (JSON, code, slang)",
    "picture": "about a picture",
}
LETTERS = {
    "unchanged": "unchanged",
    "digits for letters": "digits for letters (h0w d0 i)",
    "spelled out": "spelled out (h-o-w  d-o  i)",
    "other alphabets": "other alphabets (\uff48\uff4f\uff57 \U0001d41d\U0001d428)",
    "look-alike letters": "look-alike letters (Cyrillic)",
    "invisible characters": "invisible characters",
    "base64": "base64",
    "obfuscated letters": "all",
}
Rows = Mapping[str, Sequence[str]]  # a table: the first cell -> the others
Score = dict[str, Any]


class Measured:
    """What the commands printed: run once, kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def printed(self, name: str, *command: str) -> str:
        """What the command prints; `tools/x.py` is run by this Python, other names are commands beside it."""
        file = self.folder / name
        if not file.is_file():
            script = command[0].endswith(".py")
            program = [sys.executable, command[0]] if script else [str(Path(sys.executable).with_name(command[0]))]
            print("$", *command, file=sys.stderr, flush=True)
            done = subprocess.run([*program, *command[1:]], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
            file.write_text(done.stdout, encoding="utf-8")
        return file.read_text(encoding="utf-8")

    def package(self, precision: str) -> str:
        """The demo at this precision."""
        package = str(self.folder / precision)
        self.printed(
            f"export-{precision}.txt",
            *("autosteer-export", "--model", "demo", "--output", package, "--precision", precision, "--force"),
        )
        return package

    def test(self) -> str:
        """The file of the held-out test set."""
        data = str(self.folder / "test")
        self.printed("data.txt", "tools/make_demo_data.py", "--output", data, "--seed", "7")
        return f"{data}/test.jsonl"

    def evaluated(self) -> Path:
        """What autosteer-eval wrote of that set."""
        file = self.folder / "eval.jsonl"
        self.printed(
            "eval.txt", "autosteer-eval", self.package("fp32"), "--data", self.test(), "--output", str(file), "--force"
        )
        return file


def rows_of(text: str, said: Mapping[str, str] = MappingProxyType({})) -> dict[str, list[str]]:
    """The rows of all Markdown tables in a text; said: what the page names them, where it differs."""
    found = {}
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("|--"):
            first, *others = (cell.strip() for cell in line.strip().strip("|").split("|"))
            found[said.get(first, first)] = others
    return found


def counted(text: str) -> dict[str, list[str]]:
    """Of strangers' lines "kind: 6 of 6 caught, 1 of 6 twins refused": kind -> ["6 of 6", "1"]."""
    found = {}
    for line in text.splitlines():
        kind, _, counts = line.partition(": ")
        if " of " in counts and not line.startswith(("NO ", " ")):
            first, *second = counts.split(", ")
            cells = [" ".join(first.split()[:3]), *(part.split()[0] for part in second)]
            found[STRANGERS.get(kind, kind)] = cells
    return found


def variants(measured: Measured) -> Iterator[tuple[str, list[str]]]:
    """Reworded: the columns that the page has."""
    text = measured.printed(
        "variants.txt",
        *("autosteer-eval", measured.package("fp32"), "--data", measured.test(), "--variants", "--limit", "15"),
    )
    for name, (used, _, caught, _, refused) in ((n, r) for n, r in rows_of(text).items() if len(r) == 5):
        yield name, [used, caught, refused]


def letters(reworded: Rows) -> dict[str, list[str]]:
    """The rows of obfuscated letters; single kinds without intervals."""
    rows = {LETTERS[name]: list(cells[1:]) for name, cells in reworded.items() if name in LETTERS}
    return {name: cells if name == "all" else [cell.split()[0] for cell in cells] for name, cells in rows.items()}


def strangers(measured: Measured) -> dict[str, list[str]]:
    """Hostile wordings by kind at fp32, and all of them at each precision."""
    found: dict[str, dict[str, list[str]]] = {}
    for precision in PRECISIONS:
        halves = [
            counted(
                measured.printed(
                    f"strangers-{half}-{precision}.txt",
                    *("tools/try_demo.py", measured.package(precision), "--strangers", half),
                )
            )
            for half in HALVES
        ]
        found[precision] = {kind: [*halves[0][kind], *halves[1][kind]] for kind in halves[0]}
    rows = {kind: cells for kind, cells in found["fp32"].items() if kind != "all"}
    return rows | {f"all, {precision}": found[precision]["all"] for precision in PRECISIONS}


def judged(results: Sequence[Score]) -> Iterator[tuple[str, list[str]]]:
    """How many prompts the prober passes, and how many of their answers the judge stops."""
    for name, unsafe in (
        ("demo: unsafe prompts (of the table above)", True),
        ("demo: harmless prompts, dialogues and pictures", False),
    ):
        rows = [row for row in results if row["unsafe"] is unsafe]
        passed = [row for row in rows if not row["flagged"]]
        yield name, [f"{len(some):,}" for some in (rows, passed, [row for row in passed if row["stopped"]])]


def thresholds(results: Sequence[Score], hostile: str) -> Iterator[tuple[str, list[str]]]:
    """What would be flagged above each threshold; hostile: the verdicts on strangers' wordings, all of them."""
    words = [line.removeprefix("NO ").split() for line in hostile.splitlines()]
    scored = [(line[0], float(line[1])) for line in words if line[:1] in (["unsafe"], ["safe"])]

    def share(threshold: float, belongs: Callable[[str], bool], *, flagged: bool) -> str:
        some = [row["p_unsafe"] > threshold for row in results if belongs(row["group"])]
        return f"{100 * some.count(flagged) / len(some):.1f}"

    for at, threshold in enumerate(THRESHOLDS):
        over = [sum(p > threshold for kind, p in scored if kind == side) for side in ("unsafe", "safe")]
        of = f" of {len(scored) // 2}" if at == 0 else ""
        yield (
            f"**{threshold}**" if threshold == OWN else f"{threshold}",
            [
                share(threshold, lambda g: g.startswith("unsafe") and "-heldout" not in g, flagged=False),
                share(threshold, lambda g: g == "unsafe/image-heldout", flagged=False),
                share(threshold, lambda g: g == "unsafe/cross-heldout", flagged=False),
                share(threshold, lambda g: g.startswith("look-alike") and not unseen(g), flagged=True),
                share(threshold, lambda g: g.startswith("look-alike") and unseen(g), flagged=True),
                *(f"{count}{of}" for count in over),
            ],
        )


def written(page: str, rows: Rows, header: str) -> str:
    """The page with new rows in the table under this header, found by their first cell."""
    lines = page.splitlines()
    at = next((n for n, line in enumerate(lines) if line.startswith(header)), None)
    if at is None:
        raise SystemExit(f"{PAGE}: no table begins with {header!r}")
    at += 2
    while lines[at].startswith("|"):
        first = lines[at].strip("|").split("|")[0].strip()
        if first in rows:
            lines[at] = "".join(f"| {cell} " if cell else "| " for cell in (first, *rows[first])) + "|"
        else:
            print(f"not measured: {first!r} under {header!r}", file=sys.stderr)
        at += 1
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", type=Path, required=True, help="folder for what the commands print")
    measured = Measured(parser.parse_args(argv).measured.absolute())
    package = measured.package("fp32")
    _, *results = [row for _, row in read_lines(measured.evaluated())]
    everyone = "".join(
        measured.printed(f"scores-{half}.txt", "tools/try_demo.py", package, "--strangers", half, "--all")
        for half in HALVES
    )
    reworded = dict(variants(measured))
    report = measured.printed("report.txt", "tools/demo_report.py", str(measured.evaluated()))
    dialogues = rows_of(measured.printed("dialogues.txt", "tools/demo_dialogues.py", package), DIALOGUES)
    forms = measured.printed("forms.txt", "tools/demo_forms.py", package)
    page = PAGE.read_text(encoding="utf-8")
    for header, rows in (
        ("| held-out test, %", rows_of(report)),
        ("| flagged above", dict(thresholds(results, everyone))),
        ("| reworded | a fit", reworded),
        ("| letters | unsafe caught", letters(reworded)),
        ("| kind | choosing half", strangers(measured)),
        ("| | n | passed | of these stopped", dict(judged(results))),
        ("| harmless | refused", dialogues),
        ("| unsafe | refused", dialogues),
        ("| 48 in each form", rows_of(forms)),
    ):
        page = written(page, rows, header)
    PAGE.write_text(page, encoding="utf-8")
    for half in HALVES:
        print(measured.printed(f"visitors-{half}.txt", "tools/try_demo.py", package, "--visitors", half))
    for precision in PRECISIONS:
        print(measured.printed(f"typed-{precision}.txt", "tools/try_demo.py", measured.package(precision)))
    print(measured.printed("hostile.txt", "tools/try_demo.py", package, "--hostile"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
