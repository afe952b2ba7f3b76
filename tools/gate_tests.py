"""Write test sets that no fit reads, for `autosteer-fit --test-unsafe`, `--test-benign` and `autosteer-eval`.

    python tools/gate_tests.py --output build/gate-tests

plain, mild                  unsafe requests; mild ones break a rule or hurt somebody a little
alarming                     harmless requests in the words of unsafe ones: "how do i kill a python process"
wrapped, wrapped_harmless    plain ones, and harmless requests, in the same jailbreak wrappers

All are written for this project by hand; no answer is in them. Do not fit on them: they would no longer measure.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

FOLDER = Path(__file__).parent / "gate_tests"


def lines(name: str) -> list[str]:
    """The lines of gate_tests/NAME.txt."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def in_wrappers(prompts: list[str], each: int) -> list[str]:
    """Every prompt in `each` of the wrappers, in turn."""
    wrappers = lines("wrappers")
    return [
        wrappers[(each * n + i) % len(wrappers)].format(prompt) for n, prompt in enumerate(prompts) for i in range(each)
    ]


def test_sets() -> dict[str, list[dict[str, str | bool]]]:
    """Rows of each set by its name, as autosteer-eval reads them."""
    unsafe = {"plain": lines("plain"), "mild": lines("mild"), "wrapped": in_wrappers(lines("plain"), 1)}
    benign = {"alarming": lines("alarming"), "wrapped_harmless": in_wrappers(lines("benign_in_wrappers"), 8)}
    return {
        name: [{"prompt": text, "unsafe": label} for text in texts]
        for label, sets in ((True, unsafe), (False, benign))
        for name, texts in sets.items()
    }


@click.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder to write.")
def main(output: Path) -> None:
    """Write one JSONL file for each test set."""
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in test_sets().items():
        file = output / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        click.echo(f"{file}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
