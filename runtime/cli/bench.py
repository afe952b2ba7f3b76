"""autosteer-bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..console import debug_option, dumps, json_option, run_command, table, version_option
from .options import device_option, load, package_argument, threads_option


@click.command("autosteer-bench", context_settings={"help_option_names": ["-h", "--help"]})
@package_argument
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="About how many tokens of text a prompt has.",
)
@click.option("--new-tokens", type=click.IntRange(3), default=64, show_default=True, help="Tokens of an answer.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Medians of this many are printed."
)
@device_option
@threads_option
@json_option
@debug_option
@version_option
def bench(
    package: Path, prompt_tokens: int, new_tokens: int, rounds: int, device: Any, threads: int | None, as_json: bool
) -> None:
    """Measure PACKAGE on this machine: the first token by stages, decoding, memory, and what the gate costs.

    PACKAGE is a folder made by autosteer-export, or hf:owner/name[@revision] on the Hugging Face hub. No answer is
    printed.
    """
    from ..bench import bench as measure

    engine = load(package, device, threads)
    found = measure(engine, package, tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    click.echo(dumps(found) if as_json else bench_text(found))


def bench_text(found: dict[str, Any]) -> str:
    """A table with a column for each prompt, and a line about the machine."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.3g} %"

    cases = found["cases"]
    rows = [("prompt, tokens", [str(case["prompt_tokens"]) for case in cases])]
    for stage in cases[0]["first_token_ms"]:
        name = "first token" if stage == "total" else f"  {stage}"
        rows.append((f"{name}, ms", [f"{case['first_token_ms'][stage]:.3g}" for case in cases]))
    rows += [
        ("gate, of the first token", [percent(case["gate_share"]) for case in cases]),
        (
            "pieces of the prompt add, ms",
            ["" if case["pieces_ms"] is None else f"{case['pieces_ms']:.3g}" for case in cases],
        ),
        ("decode, tok/s", [f"{1000 / case['decode_ms']:.3g}" for case in cases]),
        ("steering, of a step", [percent(case["steering_share"]) for case in cases]),
        ("memory bandwidth used", [percent(case["read_share"]) for case in cases]),
    ]
    rows += [
        (f"{together['answers']} together, tok/s", [f"{together['tok_s']:.3g}", *[""] * (len(cases) - 1)])
        for together in found["together"][1:]
    ]
    memory, machine = found["peak_memory_mib"], found["machine"]
    used = "" if memory is None else f", {memory:.0f} MiB at most"
    return "\n".join(
        [
            table(("", *(case["prompt"] for case in cases)), [(name, *values) for name, values in rows]),
            f"{found['precision']} on {found['device']}, {found['threads']} threads{used}; "
            f"{machine['cpu']}, {found['read_gb_s']:.3g} GB/s read; onnxruntime {machine['onnxruntime']}",
        ]
    )


def bench_main() -> None:
    """Entry point of autosteer-bench."""
    run_command(bench)
