"""autosteer-draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..console import debug_option, progress, run_command
from .options import device_option, load, package_argument, threads_option


@click.command("autosteer-draft", context_settings={"help_option_names": ["-h", "--help"]})
@package_argument
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL of prompts like those that the package will be asked, in the formats of autosteer-eval; repeatable.",
)
@click.option("--images", type=click.Path(path_type=Path), help="Folder of the images. Default: beside each file.")
@click.option("--text-only", is_flag=True, help="Drop the images of all rows.")
@click.option("--max-tokens", type=click.IntRange(1), default=160, show_default=True, help="Longest answer.")
@device_option
@threads_option
@debug_option
def draft(
    package: Path,
    data: tuple[Path, ...],
    images: Path | None,
    text_only: bool,
    max_tokens: int,
    device: Any,
    threads: int | None,
) -> None:
    """Make PACKAGE answer faster: note which tokens its model often says one after the other.

    It answers your prompts, and the table of what follows what goes into the package, in place of an earlier one. The
    runtimes draft from it, and verify several tokens in one pass. Answers do not change. Some 500 prompts help; with
    100,000 tokens of answers most is gained. Ctrl-C ends early, with the answers so far.
    """
    from ..draft_maker import install, own_answers
    from ..draft_table import draft_table
    from ..evaluation.datasets import DataSource, read_rows

    rows = read_rows(
        [DataSource(file, unsafe=False, labelled=False) for file in data], images=images, text_only=text_only
    )
    engine = load(package, device, threads)
    answers: list[list[int]] = []
    try:
        with progress("answering", len(rows)) as advance:
            for answer in own_answers(engine, (row.messages for row in rows), max_tokens):
                answers.append(answer)
                advance()
    except KeyboardInterrupt:
        click.echo("\ninterrupted: the table is made from the answers so far", err=True)
    table = draft_table(answers)
    manifest = install(package, table)
    assert manifest.drafts
    name, ngrams, seen = manifest.drafts.file, manifest.drafts.ngrams, sum(map(len, answers))
    size = (package / name).stat().st_size / 1e6
    click.echo(f"{name}: {ngrams} n-grams from {seen} tokens of {len(answers)} answers, {size:.1f} MB")


def draft_main() -> None:
    """Entry point of autosteer-draft."""
    run_command(draft)
