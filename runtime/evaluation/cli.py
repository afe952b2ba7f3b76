"""autosteer-eval. Tables or JSON go to stdout, progress and excluded rows to stderr, every answer to --output."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autosteer.runtime.cli.options import (
    device_option,
    judge_answers_option,
    load,
    package_argument,
    pieces_option,
    threads_option,
)
from autosteer.runtime.console import (
    debug_option,
    dumps,
    json_option,
    one_line,
    progress,
    run_command,
    table,
    version_option,
)
from autosteer.runtime.errors import InputError

if TYPE_CHECKING:
    from .datasets import Row
    from .refusals import Judge
    from .run import Group, Result, RunFacts
    from .shards import Asking
    from .statistics import PairedTest

FORMATS = (
    "ours",
    "vlsafe",
    "tovilag",
    "mmmu",
    "realworldqa",
    "turns",
)  # the keys of datasets.READERS, which --help must not import
file_option: Any = click.Path(path_type=Path)


@click.command("autosteer-eval", context_settings={"help_option_names": ["-h", "--help"]})
@package_argument
@click.option(
    "--data",
    multiple=True,
    type=file_option,
    help="JSONL test set whose rows, or whose format, say what is unsafe; repeatable.",
)
@click.option("--unsafe", multiple=True, type=file_option, help="JSONL of unsafe prompts; repeatable.")
@click.option("--benign", multiple=True, type=file_option, help="JSONL of benign prompts; repeatable.")
@click.option(
    "--format", "format_", type=click.Choice(FORMATS), help="Format of all files. Default: recognised by their fields."
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the images. Default: beside each file.",
)
@click.option("--text-only", is_flag=True, help="Drop the images of all rows.")
@click.option(
    "--exclude",
    multiple=True,
    type=file_option,
    help="Drop rows that are in this fit file, by text and pictures; repeatable.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first rows of each group.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest answer.")
@pieces_option
@judge_answers_option
@click.option("--max-tiles", type=click.IntRange(min=1), help="Cut a picture into at most this many tiles.  [no limit]")
@click.option(
    "--judge-command",
    help='Program that judges refusals. It reads {"prompt", "answer"} and writes {"refused": true|false}, one JSON '
    "object a line.",
)
@click.option(
    "--judge-timeout", type=float, default=60.0, show_default=True, help="Seconds that it may take for one answer."
)
@click.option(
    "--output", type=file_option, help="JSONL of every answer; the same command continues an interrupted run."
)
@click.option(
    "--variants",
    is_flag=True,
    help="Do not answer: measure what is flagged of every prompt, in 20 kinds of rewording (newlines, typos, "
    "role play, ...), among harmless questions in 4, and in 6 kinds of obfuscation (base64, ...), by kind.",
)
@click.option("--force", is_flag=True, help="Overwrite --output.")
@click.option("--rejudge", is_flag=True, help="Judge the answers in --output again, with another judge or newer rules.")
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Ask on the machines of a Ray cluster that requires tokens. HOST:PORT of its head; auto: the cluster of "
    "RAY_ADDRESS or of this machine; local: one on this machine, for this run.",
)
@click.option(
    "--engines",
    type=click.IntRange(min=1),
    help="Number of engines, with --ray. Each has --threads, or its share of the cores of its node.  "
    "[one on each node]",
)
@device_option
@threads_option
@json_option
@debug_option
@version_option
def evaluate(
    package: Path,
    data: tuple[Path, ...],
    unsafe: tuple[Path, ...],
    benign: tuple[Path, ...],
    format_: str | None,
    images: Path | None,
    text_only: bool,
    exclude: tuple[Path, ...],
    limit: int | None,
    max_tokens: int,
    pieces: bool,
    judge_answers: bool | None,
    max_tiles: int | None,
    judge_command: str | None,
    judge_timeout: float,
    output: Path | None,
    variants: bool,
    force: bool,
    rejudge: bool,
    address: str | None,
    engines: int | None,
    device: Any,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure the gate of PACKAGE: attack success, wrong refusals and accuracy, by group: without a gate, always
    steered, under `steer` and under `stop`.

    Rows: {"prompt": text, "images": [files], "unsafe": true|false, "group": name, "answer": gold text or null};
    "turns": [user, assistant, user, ...] instead of "prompt" for dialogues. Also VLSafe, ToViLaG, MMMU, RealWorldQA and
    {"turns": [text]} in their published formats (docs/evaluation.md).
    """
    labelled = [*((path, None) for path in data), *((p, True) for p in unsafe), *((p, False) for p in benign)]
    if not labelled:
        raise click.UsageError("give prompts: --data, --unsafe or --benign")
    if images and text_only:
        raise click.UsageError("--images and --text-only exclude each other")
    if output and output.resolve() in {path.resolve() for path in (*data, *unsafe, *benign, *exclude)}:
        raise click.UsageError(f"--output {output}: is one of the files to read")
    if rejudge and (force or not output):
        raise click.UsageError("--rejudge needs --output, and no --force")
    if judge_command is not None and not judge_command.strip():
        raise click.UsageError("--judge-command is empty")
    if variants and (output or judge_command or judge_answers):
        raise click.UsageError("--variants asks for verdicts on prompts: no --output, --judge-command, --judge-answers")
    if engines and not address:
        raise click.UsageError("--engines needs --ray")
    if address and device == "cuda":
        raise click.UsageError("--ray asks on CPUs: --device cuda cannot be given")
    from .refusals import CommandJudge, RuleJudge
    from .run import RunFacts, summarise
    from .run import rejudge as rejudge_file

    rows, dropped = read_prompts(labelled, exclude, format_, images, text_only, limit)
    check_images(package, rows)
    asking = asking_on(address, package, engines, device, threads, max_tiles)
    if variants:
        print_variants(asking, rows, as_json, pieces=pieces)
        return
    judge: Judge = CommandJudge(judge_command, timeout_s=judge_timeout) if judge_command else RuleJudge()
    with contextlib.closing(judge):
        facts = RunFacts.of(
            package, rows, judge, max_tokens=max_tokens, max_tiles=max_tiles, pieces=pieces, judge_answers=judge_answers
        )
        if rejudge and output and output.exists():
            rejudge_file(output, facts, judge)
        results = answer(rows, judge, facts, output, force, asking)
    groups = summarise(results)
    if as_json:
        for group in groups:
            excluded = dropped[group.group, group.unsafe]
            click.echo(dumps(dataclasses.asdict(group) | {"excluded": excluded, "judge": judge.name}))
    else:
        print_tables(groups)


def read_prompts(
    labelled: Sequence[tuple[Path, bool | None]],
    exclude: Sequence[Path],
    format_: str | None,
    images: Path | None,
    text_only: bool,
    limit: int | None,
) -> tuple[list[Row], Counter[tuple[str, bool]]]:
    """The rows of the files, each with whether all its rows are unsafe; and how many --exclude drops, by group and
    label.
    """
    from .datasets import DataSource, contradictions, drop_known, first_of_each_group, prompts_of, read_rows

    rows = read_rows([DataSource(p, label, format_) for p, label in labelled], images=images, text_only=text_only)
    dropped: Counter[tuple[str, bool]] = Counter()
    if exclude:
        rows, dropped = drop_known(rows, prompts_of(exclude, images=images, text_only=text_only))
        click.echo(f"left out, being in --exclude: {total(dropped)}", err=True)
    if limit:
        rows = first_of_each_group(rows, limit)
    if again := len(rows) - len({row.digest for row in rows}):
        click.echo(f"{again} rows are equal to others of their group; each counts, and narrows the intervals", err=True)
    if both := contradictions(rows):
        first = "; ".join(f"{unsafe.where} and {benign.where}" for unsafe, benign in both[:3])
        also = "" if len(both) <= 3 else "; ..."
        click.echo(f"prompts called both unsafe and benign: {len(both)} ({first}{also}); correct the labels", err=True)
    return rows, dropped


def check_images(package: Path, rows: Sequence[Row]) -> None:
    """Raise InputError, before the package is loaded, if rows have images and the package takes none."""
    from autosteer.runtime.manifest import Manifest

    with_image = sum(any(message.images for message in row.messages) for row in rows)
    if with_image and Manifest.load(package).image is None:
        raise InputError(
            f"{package}: takes no images, and {with_image} of {len(rows)} rows have one; --text-only asks their texts "
            "alone"
        )


def asking_on(
    address: str | None,
    package: Path,
    engines: int | None,
    device: Any,
    threads: int | None,
    max_tiles: int | None,
) -> Asking:
    """How rows are asked: in this process, or on a Ray cluster."""
    from .shards import alone

    if address is None:
        return partial(alone, lambda: load(package, device, threads, max_tiles=max_tiles))
    from .on_ray import Cluster, on_ray

    return partial(on_ray, Cluster(address, engines, threads, package, max_tiles), report=partial(click.echo, err=True))


def print_variants(asking: Asking, rows: Sequence[Row], as_json: bool, *, pieces: bool) -> None:
    """The verdicts on all rows, reworded, by kind: a table, or one JSON object a line."""
    from .variants import as_text, by_rewording, row_outcomes

    outcomes = []
    with asking(partial(row_outcomes, pieces=pieces), rows) as asked, progress("rewording", len(rows)) as advance:
        for found in asked:
            outcomes += found
            advance()
    rates = by_rewording(outcomes)
    if as_json:
        for one in rates:
            click.echo(dumps(dataclasses.asdict(one)))
    else:
        click.echo(as_text(rates))


def answer(
    rows: Sequence[Row], judge: Judge, facts: RunFacts, output: Path | None, force: bool, asking: Asking
) -> list[Result]:
    """Results of all rows: those already in `output`, and the others, which are answered now and appended to it."""
    from .run import ResultFile, ask, check_order, run_rows

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(ResultFile(output, facts, force=force)) if output else None
        results = list(file.done) if file else []
        if output:
            check_order(results, rows, output)
        left = rows[len(results) :]
        if results:
            click.echo(f"{output}: has {len(results)} of {len(rows)} rows; {len(left)} to go", err=True)
        if not left:
            return results
        how = partial(ask, max_tokens=facts.max_tokens, pieces=facts.pieces, judge_answers=facts.judge_answers)
        asked = stack.enter_context(asking(how, left))
        try:
            with progress("evaluating", len(left)) as advance:
                for result in run_rows(asked, left, judge):
                    results.append(result)
                    if file:
                        file.append(result)
                    advance()
        except (KeyboardInterrupt, SystemExit):
            kept = f"kept in {output}; the same command goes on from there" if output else "lost; --output keeps them"
            click.echo(f"\nstopped after {len(results)} of {len(rows)} rows, {kept}", err=True)
            raise
    return results


# --- tables ----------------------------------------------------------------------------------------------------------


def print_tables(groups: Sequence[Group]) -> None:
    """Rates with their 95 % intervals, then the paired tests."""
    from .run import POLICIES
    from .statistics import percent

    unsafe, benign = [g for g in groups if g.unsafe], [g for g in groups if not g.unsafe]
    graded = [g for g in groups if g.graded]
    seen = ("flagged", *(["stopped"] if groups[0].stopped else []))  # the prompt; the answer

    def caught(g: Group) -> list[str]:
        return [percent(g.flagged), *([percent(g.stopped)] if groups[0].stopped else [])]

    if unsafe:
        click.echo("Attack success, % [95 % interval]: the answer is not a refusal\n")
        cells = [(g.group, str(g.n), *(percent(g.not_refused[p]) for p in POLICIES), *caught(g)) for g in unsafe]
        click.echo(table(("unsafe prompts", "n", *POLICIES, *seen), cells) + "\n")
    if benign:
        click.echo("Wrongly refused, % [95 % interval]\n")
        cells = [
            (g.group, str(g.n), *(percent(g.not_refused[p].opposite()) for p in POLICIES), *caught(g)) for g in benign
        ]
        click.echo(table(("benign prompts", "n", *POLICIES, *seen), cells) + "\n")
    if graded:
        click.echo("Right answers, % [95 % interval]\n")
        cells = [(g.group, str(g.graded), *(percent(g.accuracy[p]) for p in POLICIES)) for g in graded]
        click.echo(table(("graded prompts", "n", *POLICIES), cells) + "\n")
    click.echo("Same prompts, two policies: how many have the outcome under the one only, and under the other only;")
    click.echo("p of McNemar's exact test\n")
    header = ("prompts", "outcome", *(f"{t.first} : {t.second}" for t in groups[0].tests[:3]))
    rows = []
    for group in groups:
        for outcome in dict.fromkeys(t.outcome for t in group.tests):
            named = f"{'unsafe' if group.unsafe else 'benign'}: {group.group}"
            rows.append((named, outcome, *(compared(t) for t in group.tests if t.outcome == outcome)))
    click.echo(table(header, rows))


def compared(test: PairedTest) -> str:
    """41 : 0, p 9e-13"""
    p = "p 1" if test.p_value == 1 else f"p {test.p_value:.2g}" if test.p_value >= 1e-4 else f"p {test.p_value:.0e}"
    return f"{test.only_first} : {test.only_second}, {p}"


def total(dropped: Counter[tuple[str, bool]]) -> str:
    """94 rows (vlsafe_test_500 94)"""
    groups = ", ".join(f"{one_line(name)} {n}" for (name, _), n in dropped.items())
    return f"{dropped.total()} rows" + (f" ({groups})" if groups else "")


def main() -> None:
    """Entry point of autosteer-eval."""
    run_command(evaluate, extra="eval")
