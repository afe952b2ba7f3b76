"""autosteer-export: checkpoint + safety/ -> package/."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import click

from autosteer.runtime.console import debug_option, dumps, json_option, run_command, version_option
from autosteer.runtime.errors import CheckError, InputError, PackageError
from autosteer.runtime.manifest import MANIFEST_FILE, CacheType, Precision

from .graphs.quantize import Target
from .output import atomic_folder, check_output
from .push import check_login, push
from .summary import Exported, checks_table, facts_of, summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from .checkpoint.open import Checkpoint
    from .package import ExportOptions
    from .safety_folder import SafetyArtifact

# What to try if a package differs too much, by --precision, --target and --block-size.
ADVICE: dict[tuple[str, str, int | None], str] = {
    ("int4", "cpu", None): "; try --block-size 32, or int8",
    ("int4", "cuda", None): "; try --block-size 32, or int8",
    ("int8", "cpu", None): "; try --block-size 128",
}


@click.command("autosteer-export", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="demo, a checkpoint folder, a hub id, or an alias (docs/families.md).")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The package folder to write.")
@click.option(
    "--safety",
    "safety_folder",
    type=click.Path(path_type=Path),
    help="Folder made by autosteer-fit or autosteer-import-authors. Default: safety/ inside the checkpoint.",
)
@click.option("--threshold", type=float, help="The gate fires above this p_unsafe. Default: the safety folder's.")
@click.option(
    "--monitor/--no-monitor",
    default=None,
    help="Whether the package watches answers, too, and stops unsafe ones. Default: if the safety folder has a monitor "
    "that stopped at most 0.5 % of held-out benign answers, and half of the unsafe ones that the gate let begin.",
)
@click.option(
    "--judge-answers/--no-judge-answers",
    default=None,
    help="Whether the package judges every answer before any of it is shown, unless a request says otherwise: it stops "
    "more, and nothing streams. Measure it first (autosteer-eval). Default: as the safety folder says.",
)
@click.option(
    "--judge-threshold",
    type=float,
    help="An answer that is judged is unsafe above this p_unsafe, too, which is at most --threshold. Default: the "
    "safety folder's, or else the same as for prompts.",
)
@click.option("--unguarded", is_flag=True, help="Export without a gate; such a package runs only with --policy off.")
@click.option(
    "--layer",
    type=int,
    help="With --unguarded: split before this decoder layer. Default: the middle. A gate has a layer of its own.",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="fp32",
    show_default=True,
    help="How decoder weights are stored.",
)
@click.option(
    "--block-size",
    type=click.Choice(["32", "64", "128"]),
    help="int8, int4: weights that share a scale. Smaller is closer to the original, and slower. Default: 128; at "
    "int8 on a CPU the decoder has one scale per output channel instead, which makes prefill fastest.",
)
@click.option(
    "--head-bits",
    type=click.Choice(["4", "8"]),
    help="int4: bits of the LM head and the embedding. 4 is faster and smaller, and further from the original.  "
    "[default: 8]",
)
@click.option(
    "--prefill-precision",
    type=click.Choice(["int8"]),
    help="int4: do prefill with a second, 8-bit copy of the decoder: 1.7 to 4 times as fast, about twice the memory. "
    "Answers are closer to the original. Default: no such copy.",
)
@click.option(
    "--calibrate",
    metavar="FILE|builtin",
    help="int4: round with GPTQ so that what the model computes on this text changes least; `builtin`: our text and "
    "prompts. Closer to the original and as fast, but the export takes longer. Default: no.",
)
@click.option(
    "--image-precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="Precision of the image graph. Default: that of --precision; int8 at int4.",
)
@click.option(
    "--target",
    type=click.Choice(get_args(Target)),
    default="cpu",
    show_default=True,
    help="The device that the package will run on. cuda packages compute in float16 (docs/gpu.md).",
)
@click.option(
    "--kv-cache",
    type=click.Choice(get_args(CacheType)),
    help="Type of the KV cache. int8 takes a quarter of the memory, makes prefill of long prompts slower, and changes "
    "answers slightly. Default: float32; cuda has float16 only.",
)
@click.option(
    "--context-length",
    type=click.IntRange(min=16),
    help="Largest number of tokens in a dialogue. Default: the model's.",
)
@click.option("--revision", help="Commit, branch or tag on the hub.")
@click.option("--force", is_flag=True, help="Replace --output if it exists.")
@click.option(
    "--push", "repo", help="Upload the package to this repository (owner/name) on the hub, with a model card."
)
@json_option
@debug_option
@version_option
def export(
    model: str,
    output: Path,
    safety_folder: Path | None,
    threshold: float | None,
    monitor: bool | None,
    judge_answers: bool | None,
    judge_threshold: float | None,
    unguarded: bool,
    layer: int | None,
    precision: str,
    block_size: str | None,
    head_bits: str | None,
    prefill_precision: str | None,
    calibrate: str | None,
    image_precision: str | None,
    target: str,
    kv_cache: str | None,
    context_length: int | None,
    revision: str | None,
    force: bool,
    repo: str | None,
    as_json: bool,
) -> None:
    """Export a multimodal LLM with its safety gate to ONNX, and validate it against PyTorch.

    Nothing is written unless the validation passes.
    """
    if unguarded and safety_folder:
        raise click.UsageError("--unguarded and --safety exclude each other")
    if unguarded and threshold is not None:
        raise click.UsageError("--unguarded and --threshold exclude each other")
    if unguarded and monitor:
        raise click.UsageError("--unguarded and --monitor exclude each other")
    if unguarded and judge_answers:
        raise click.UsageError("--unguarded and --judge-answers exclude each other")
    if unguarded and judge_threshold is not None:
        raise click.UsageError("--unguarded and --judge-threshold exclude each other")
    check_output(output, marker=MANIFEST_FILE, force=force)
    if repo:
        check_login(repo)

    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    from .checkpoint.hf_model import quiet_transformers
    from .checkpoint.open import open_checkpoint
    from .footprint import check_space
    from .graphs.gptq import read_text
    from .heartbeat import heartbeat
    from .package import ExportOptions

    console = Console(stderr=True)
    started = time.perf_counter()
    options = ExportOptions(
        precision=cast(Precision, precision),
        split_layer=layer,
        context_length=context_length,
        block_size=int(block_size) if block_size else None,
        head_bits=int(head_bits) if head_bits else None,
        image_precision=cast(Precision | None, image_precision),
        target=cast(Target, target),
        kv_cache=cast(CacheType | None, kv_cache),
        prefill=cast(Precision | None, prefill_precision),
        calibration_text=read_text(calibrate) if calibrate else None,
    )
    try:
        _ = options.recipe  # raises for options that do not go together, before minutes of work
    except InputError as err:
        raise click.UsageError(str(err)) from err
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress, heartbeat(console, progress):
        task = progress.add_task("opening the checkpoint", total=None)
        quiet_transformers()
        checkpoint = open_checkpoint(model, revision=revision)
        safety = None if unguarded else find_safety(checkpoint, safety_folder, layer)
        for warning in warnings_of(checkpoint, safety, context_length):
            console.print(warning, markup=False, highlight=False, soft_wrap=True)
        if safety and threshold is not None:
            safety = safety.firing_above(threshold)
        if safety and judge_threshold is not None:
            safety = safety.judging_above(judge_threshold)
        safety = safety and safety.watching(monitor)
        if safety and judge_answers is not None:
            safety = replace(safety, facts=replace(safety.facts, judge_answers=judge_answers))
        check_space(output, checkpoint, options.precision, *([options.prefill] if options.prefill else []))
        with atomic_folder(output, marker=MANIFEST_FILE, force=force) as folder:
            exported = write_and_validate(
                *(folder, checkpoint, safety, options, progress, task), show=None if as_json else console
            )
    facts = facts_of(exported, checkpoint, safety, options, output, seconds=time.perf_counter() - started)
    facts["pushed"] = None
    try:
        if repo:
            facts["pushed"] = push(output, repo)
    finally:  # the package is there all the same
        if as_json:
            click.echo(dumps(facts))
        for line in () if as_json else summary(exported, facts):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_and_validate(
    folder: Path,
    checkpoint: Checkpoint,
    safety: SafetyArtifact | None,
    options: ExportOptions,
    progress: Progress,
    task: TaskID,
    *,
    show: Console | None,
) -> Exported:
    """Write the package into `folder`, compare it with PyTorch, and load it. `show` gets the table of checks.

    Raises CheckError if a check fails.
    """
    from .footprint import footprint
    from .package import folder_bytes, with_results, write_package
    from .validation.reload import load_again
    from .validation.validate import validate_package

    progress.update(task, total=checkpoint.weights)
    manifest = write_package(
        *(folder, checkpoint, safety, options),
        report=lambda step: progress.update(task, description=f"writing: {step}"),
        advance=lambda name, numbers: progress.update(task, description=f"writing: {name}", advance=numbers),
    )
    progress.reset(task, total=None)
    results = validate_package(
        *(folder, manifest, checkpoint, safety),
        report=lambda step: progress.update(task, description=f"validating: {step}"),
    )
    if show:
        show.print(checks_table(results.checks), markup=False, highlight=False)
    if failed := [check.name for check in results.checks if not check.passed]:
        advice = ADVICE.get((options.precision, options.target, options.block_size), "")
        raise CheckError(f"the package differs from PyTorch ({', '.join(failed)}); nothing was written{advice}")
    manifest = with_results(folder, manifest, results)
    size, needs = folder_bytes(folder), footprint(folder, manifest)
    progress.update(task, description="loading the package")
    return Exported(manifest, results.checks, size, needs, loaded=load_again(folder, needs.running))


def warnings_of(checkpoint: Checkpoint, safety: SafetyArtifact | None, context_length: int | None) -> list[str]:
    """What to say before the export begins."""
    from .checkpoint.decoder_config import decoder_config

    found, most = [], decoder_config(checkpoint).context_length
    if context_length and context_length > most:
        found.append(f"--context-length {context_length}: the model holds {most} tokens, and so will the package")
    if safety and not safety.facts.files:
        found.append(
            f"{safety.folder}: safety.json has no hashes of its files, so damage to them is not noticed; autosteer-fit "
            "writes them"
        )
    return found


def find_safety(checkpoint: Checkpoint, folder: Path | None, layer: int | None) -> SafetyArtifact:
    """Load the safety folder that was named, or else the one inside the checkpoint. Raises PackageError without one."""
    from .checkpoint.decoder_config import decoder_config
    from .checkpoint.open import load_processor
    from .checkpoint.renderer import frame_digests, same_frame
    from .safety_folder import SafetyArtifact

    where = folder or checkpoint.folder / "safety"
    if not where.is_dir():
        raise PackageError(
            f"{where}: no safety folder; make one with `autosteer-fit --model {checkpoint.name} --pairs FILE "
            "--output DIR` and give it as --safety DIR, or export without a gate with --unguarded"
        )
    config = decoder_config(checkpoint)
    safety = SafetyArtifact.load(where, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers)
    if layer not in (None, safety.facts.split_layer):
        raise InputError(
            f"--layer {layer}: the prober in {where} was trained on layer {safety.facts.split_layer}; "
            f"fit one for layer {layer} with `autosteer-fit --layer {layer}`"
        )
    frame = safety.facts.frame
    if frame and not same_frame(frame, frame_digests(load_processor(checkpoint))):
        raise PackageError(
            f"{where}: fitted with another chat template or tokenizer, so the prober would read other tokens; "
            "fit it again on this checkpoint with autosteer-fit"
        )
    return safety


def main() -> None:
    """Entry point of autosteer-export."""
    run_command(export, extra="export")
