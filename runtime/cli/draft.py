"""autosteer-draft."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ..console import debug_option, progress, run_command, version_option
from ..errors import InputError
from .options import NamedPath, device_option, load, threads_option


@click.command("autosteer-draft", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=NamedPath(),
    help="JSONL of prompts like those that the package will be asked, in the formats of autosteer-eval; repeatable.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the images. Default: beside each file.",
)
@click.option("--text-only", is_flag=True, help="Drop the images of all rows.")
@click.option("--max-tokens", type=click.IntRange(1), default=160, show_default=True, help="Longest answer.")
@device_option
@threads_option
@debug_option
@version_option
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

    PACKAGE is a folder made by autosteer-export. It answers your prompts, and the table of what follows what goes into
    the folder, in place of an earlier one. The runtimes draft from it, and verify several tokens in one pass. At fp32
    and fp16 answers do not change; at int8 and int4 near ties may fall differently. Some 500 prompts help; with 100,000
    tokens of answers most is gained. Ctrl-C ends early, with the answers so far.
    """
    from ..draft_maker import install, own_answers
    from ..draft_table import draft_table
    from ..evaluation.datasets import DataSource, read_rows

    if not os.access(package, os.W_OK):
        raise InputError(f"{package}: not writable; copy the package, and name the copy")
    rows = read_rows(
        [DataSource(file, unsafe=False, labelled=False) for file in data], images=images, text_only=text_only
    )
    engine = load(package, device, threads)
    answers, ended = list[list[int]](), None
    try:
        with progress("answering", len(rows)) as advance:
            for answer in own_answers(engine, (row.messages for row in rows), max_tokens):
                answers.append(answer)
                advance()
    except (KeyboardInterrupt, SystemExit) as err:  # SIGTERM raises the latter
        click.echo("\ninterrupted: the table is made from the answers so far", err=True)
        ended = err
    table = draft_table(answers)
    manifest = install(package, table)
    assert manifest.drafts
    name, ngrams, seen = manifest.drafts.file, manifest.drafts.ngrams, sum(map(len, answers))
    size = (package / name).stat().st_size / 1e3
    click.echo(f"{name}: {ngrams} n-grams from {seen} tokens of {len(answers)} answers, {size:,.0f} kB")
    if isinstance(ended, SystemExit):
        raise ended


def draft_main() -> None:
    """Entry point of autosteer-draft."""
    run_command(draft)
