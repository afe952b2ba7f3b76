"""Measure a package's speed, memory and gate, beside other runtimes with the same weights.

    python tools/bench.py --package build/package
    python tools/bench.py --package build/package --checkpoint build/checkpoint --vs genai,llama.cpp,torch \\
        --peer-python build/peers/bin/python

So that the comparison is fair:

- Every configuration runs in its own process. Rounds alternate between configurations, each with another prompt, and
  the first round is dropped. Figures are medians. Ratios are taken within a round.
- Nothing is drafted unless asked for. Bits and block sizes are read back from the files that ran.
- Peers get the token ids that the package made of the prompt, and their own best documented settings. Their own tools
  make their weights from --checkpoint, at the package's bits.

With --image, llama.cpp is compared on SmolVLM, InternVL and Qwen3-VL (tools/benchmark/towers.py); the other peers read
texts only here. Run it on an idle machine: it says how much of the processor other programs took.
"""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
from benchmark import machine, peers, prompts, report, session, weights

from autosteer.runtime.console import debug_option, dumps, json_option, run_command
from autosteer.runtime.errors import PackageError
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.usable_cores import usable_cores

PEERS = tuple(peers.NEEDS)


def peer_names(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """--vs genai,llama.cpp"""
    names = tuple(filter(None, value.split(",")))
    if unknown := [name for name in names if name not in PEERS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(PEERS)}")
    return names


@click.command("bench", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--package", "packages", type=click.Path(path_type=Path), multiple=True, required=True, help="Repeatable."
)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Text tokens in the prompt."
)
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(path_type=Path, exists=True),
    help='JSONL of {"prompt": ...}: one round for each of these prompts instead.',
)
@click.option(
    "--each",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --prompts: ask each of them so many times; its middle round counts.",
)
@click.option("--tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Most tokens in an answer.")
@click.option("--image", type=click.Path(path_type=Path, exists=True), help="Add this image to the prompt.")
@click.option(
    "--rounds", type=click.IntRange(min=2), default=6, show_default=True, help="Rounds; the first is not counted."
)
@click.option(
    "--cold-starts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Starts in a new process; the first is not counted. 0: none.",
)
@click.option("--speculation", is_flag=True, help="Also measure with speculative decoding.")
@click.option("--one-graph", is_flag=True, help="Also measure each package as one graph, without a gate.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of every configuration.  [default: all cores]")
@click.option("--vs", default="", callback=peer_names, help=f"Peers, comma-separated: {', '.join(PEERS)}.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, exists=True),
    help="The checkpoint that the package was made of; for --vs.",
)
@click.option(
    "--gguf",
    "ggufs",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="A GGUF file of the same weights for llama.cpp, run as it is. Repeatable.",
)
@click.option(
    "--peer-python",
    envvar="AUTOSTEER_PEER_PYTHON",
    default=sys.executable,
    help="Interpreter that has the peers ($AUTOSTEER_PEER_PYTHON).  [default: this one]",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default="build/bench",
    show_default=True,
    help="Folder that keeps the peers' models.",
)
@click.option(
    "--without", metavar="NAME", multiple=True, help="Leave out a configuration, named as in the report. Repeatable."
)
@json_option
@debug_option
def bench(
    packages: tuple[Path, ...],
    prompt_tokens: int,
    prompt_file: Path | None,
    each: int,
    tokens: int,
    image: Path | None,
    rounds: int,
    cold_starts: int,
    speculation: bool,
    one_graph: bool,
    threads: int | None,
    vs: tuple[str, ...],
    checkpoint: Path | None,
    ggufs: tuple[Path, ...],
    peer_python: str,
    work: Path,
    without: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure packages, and peers beside them."""
    if ggufs and image:
        raise click.UsageError("--gguf and --image exclude each other: here a GGUF file reads texts only")
    if each > 1 and not prompt_file:
        raise click.UsageError("--each needs --prompts: other prompts are asked once, in --rounds")
    if vs and not checkpoint:
        raise click.UsageError("--vs needs --checkpoint: the weights that the package was made from")
    threads = threads or usable_cores()
    manifests = [Manifest.load(folder) for folder in packages]
    configurations = [
        ours(folder, manifest, speculate=speculate)
        for folder, manifest in zip(packages, manifests, strict=True)
        for speculate in ((False, True) if speculation else (False,))
    ]
    if one_graph:
        configurations += [unsplit(c, work.resolve()) for c in configurations if not c.drafts]
    missing = []
    makers: list[tuple[str, Callable[[], list[peers.Configuration]]]] = []
    if vs:
        assert checkpoint is not None and configurations[0].weights is not None
        given = (checkpoint.resolve(), configurations[0].weights.body, peer_python, threads, work.resolve())
        makers += [(name, partial(peers.configurations, name, *given, pictures=image is not None)) for name in vs]
    makers += [(str(file), partial(peers.gguf, file.resolve(), peer_python)) for file in ggufs]
    for name, make in makers:
        say(f"preparing {name}")
        try:
            theirs = make()
            configurations += [one for one in theirs if speculation or not one.drafts]
        except peers.PeerError as err:
            missing.append(str(err))
    names = [one.name for one in configurations]
    if twice := {name for name in names if names.count(name) > 1}:
        raise click.UsageError(f"two configurations are called {min(twice)!r}: give folders and files of other names")
    if unknown := set(without) - set(names):
        raise click.UsageError(f"--without {min(unknown)!r}: there are {'; '.join(names)}")
    configurations = [one for one in configurations if one.name not in without]
    if not configurations:
        raise click.UsageError("--without leaves nothing to measure")
    say("preparing prompts")
    if prompt_file:
        jobs = prompts.of_file(packages[0], manifests[0], prompt_file, tokens, threads, each)
    else:
        jobs = prompts.of_length(packages[0], manifests[0], prompt_tokens, tokens, rounds, image)
    say("reading memory")
    here = machine.describe_machine(threads)
    before, started = machine.others_cpu_seconds(), time.perf_counter()
    measured, failed = session.measure(
        configurations,
        jobs,
        threads=threads,
        max_tokens=max(len(job["token_ids"]) + job["new_tokens"] for job in jobs),
        cold_starts=cold_starts,
        report=say,
    )
    after, seconds = machine.others_cpu_seconds(), time.perf_counter() - started
    say("")
    if not measured:
        raise PackageError("; ".join(failed))
    measured = [session.middle_rounds(one, each) for one in measured]
    dims = manifests[0].dims
    shape = (dims.num_hidden_layers, dims.num_key_value_heads, dims.head_dim)
    workload = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "threads": threads,
        "rounds": (len(jobs) - 1) // each,
        "image": jobs[0]["image"],
        "seconds": round(seconds, 1),
        "others_cpu_share": None if after is None or before is None else (after - before) / seconds / here.cores,
    }
    rows = [report.row(m, shape, here) for m in measured]
    compared = [
        report.ratios(one, other)
        for number, one in enumerate(measured)
        if one.configuration.kind == "autosteer"
        for other in measured[number + 1 :]
    ]
    if as_json:
        click.echo(dumps(report.as_json(here, workload, rows, compared, missing + failed)))
    else:
        click.echo(report.text(here, workload, rows, compared))
        for line in missing + failed:
            click.echo(f"not measured: {line}", err=True)


def ours(folder: Path, manifest: Manifest, *, speculate: bool) -> peers.Configuration:
    """One of our packages."""
    folder = folder.resolve()
    read_back = weights.package_weights(folder, {name: graph.file for name, graph in manifest.graphs.items()})
    name = f"autosteer {folder.name}{', drafting' if speculate else ''}"
    options = {"speculate": speculate}
    return peers.Configuration(name, "autosteer", folder, sys.executable, read_back, options, drafts=speculate)


def unsplit(package: peers.Configuration, work: Path) -> peers.Configuration:
    """The same package's graphs as one."""
    options = {"work": str(work / f"{package.path.name}-one-graph")}
    return replace(package, name=f"{package.name}, one graph", kind="one graph", options=options)


def say(step: str) -> None:
    """Progress, on one line of a terminal."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{step}", nl=False, err=True)


if __name__ == "__main__":
    run_command(bench)
