"""autosteer-export: checkpoint + safety/ -> package/."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from autosteer.runtime.console import debug_option, dumps, json_option, run_command, table
from autosteer.runtime.errors import CheckError, InputError, PackageError
from autosteer.runtime.manifest import MANIFEST_FILE, CacheType, Check, Precision

from .graphs.quantize import Target
from .output import atomic_folder, check_output

if TYPE_CHECKING:
    from .checkpoint.open import Checkpoint
    from .footprint import Footprint
    from .graphs.quantize import Scheme
    from .safety_folder import SafetyArtifact

CLOSER = {  # to the original, by what was chosen
    ("int4", "cpu", None): "; try --block-size 32, or int8",
    ("int4", "cuda", None): "; try --block-size 32, or int8",
    ("int8", "cpu", None): "; try --block-size 128",
}
BLOCK_SIZES = {32, 64, 128}
REFUSAL_TEXT = "I'm sorry, but I can't assist with that."  # the paper's


@click.command("autosteer-export", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="demo, llava-ov, chameleon, ..., a local folder, or a hub id.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The package folder to write.")
@click.option(
    "--safety",
    "safety_folder",
    type=click.Path(path_type=Path),
    help="Folder made by autosteer-fit. Default: safety/ inside the checkpoint.",
)
@click.option("--prober", type=click.Path(path_type=Path), help="The authors' prober (.pt), in place of --safety.")
@click.option("--steer-matrix", type=click.Path(path_type=Path), help="The authors' steer matrix, with --prober.")
@click.option(
    "--unsafe-class",
    type=click.IntRange(0, 1),
    help="With --prober: its row that means unsafe. Default: 0, the paper's; 1 in SafeSwitch's training.",
)
@click.option(
    "--token-offset",
    type=int,
    help="With --prober: the token it reads, from the end of the prompt without generation prompt. Default: the "
    "authors' (-1, the last; Chameleon -2, before the separator they do not write).",
)
@click.option("--strength", type=float, help="With --prober: the paper's epsilon.  [default: 0.1]")
@click.option("--refusal-text", help=f"With --prober: what --policy stop says.  [default: {REFUSAL_TEXT}]")
@click.option(
    "--threshold", type=float, help="The gate fires above this p_unsafe. Default: the fit's; with --prober 0.5."
)
@click.option("--unguarded", is_flag=True, help="Export without a gate; such a package runs only with --policy off.")
@click.option(
    "--layer",
    type=int,
    help="Split before this decoder layer. Default: the safety folder's (SAS) layer; --prober needs it.",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="fp32",
    show_default=True,
    help="How weights are stored.",
)
@click.option(
    "--block-size",
    type=click.Choice(["32", "64", "128"]),
    help="int8, int4: weights that share a scale. Smaller is closer to the original, and slower. Default: 128; at "
    "int8 on a CPU the decoder has a scale for each output instead, which reads prompts fastest.",
)
@click.option(
    "--head-bits",
    type=click.Choice(["4", "8"]),
    help="int4: of the projection to the vocabulary and the embedding. 4 is faster and smaller, and further from the "
    "original.  [default: 8]",
)
@click.option(
    "--prefill-precision",
    type=click.Choice(["int8"]),
    help="int4: prompts are read by a second copy of the decoder, in 8 bits: the first token comes 1.7 to 3 "
    "times sooner, if the prompt is not very long, and answers are closer to the original. The package takes that "
    "much more disk and memory. Default: no such copy.",
)
@click.option(
    "--image-precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="Of the image graph. Default: as --precision; int8 at int4.",
)
@click.option(
    "--target",
    type=click.Choice(get_args(Target)),
    default="cpu",
    show_default=True,
    help="What the package will run on. cuda: it computes in float16, and not in fp32 (docs/gpu.md).",
)
@click.option(
    "--kv-cache",
    type=click.Choice(get_args(CacheType)),
    help="What keys and values of earlier tokens are kept as. int8 takes a quarter of the memory, reads long prompts "
    "more slowly, and is close to the original, not equal. Default: float32; float16 for cuda, which has no other.",
)
@click.option("--context-length", type=click.IntRange(min=16), help="Tokens a dialogue may take. Default: the model's.")
@click.option("--revision", help="Commit, branch or tag on the hub.")
@click.option("--force", is_flag=True, help="Replace --output if it exists.")
@json_option
@debug_option
def export(
    model: str,
    output: Path,
    safety_folder: Path | None,
    threshold: float | None,
    unguarded: bool,
    layer: int | None,
    precision: str,
    block_size: str | None,
    head_bits: str | None,
    prefill_precision: str | None,
    image_precision: str | None,
    target: str,
    kv_cache: str | None,
    context_length: int | None,
    revision: str | None,
    force: bool,
    as_json: bool,
    **authors: Any,
) -> None:
    """Export a multimodal LLM, split at its SAS layer, with its gate, to ONNX; validate it against PyTorch.

    Nothing is written unless the validation passes.
    """
    if unguarded and safety_folder:
        raise click.UsageError("--unguarded and --safety exclude each other")
    if unguarded and threshold is not None:
        raise click.UsageError("--unguarded and --threshold exclude each other")
    authors = given_authors(authors, layer, excluded="--unguarded" if unguarded else safety_folder and "--safety")
    check_output(output, marker=MANIFEST_FILE, force=force)

    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    from .checkpoint.hf_model import quiet_transformers
    from .checkpoint.open import open_checkpoint, recommended_options
    from .footprint import check_space, count_weights, footprint, peak_rss_bytes
    from .package import ExportOptions, folder_sizes, with_results, write_package
    from .validation.reload import load_again
    from .validation.validate import validate_package

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
    )
    try:
        _ = options.recipe  # before minutes of work
    except InputError as err:
        raise click.UsageError(str(err)) from err
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("opening the checkpoint", total=None)
        quiet_transformers()
        checkpoint = open_checkpoint(model, revision=revision)
        if authors:
            safety = authors_safety(checkpoint, layer, authors)
        else:
            safety = None if unguarded else find_safety(checkpoint, safety_folder, layer)
        if safety and threshold is not None:
            safety = safety.firing_above(threshold)
        check_space(output, checkpoint, options.precision, *([options.prefill] if options.prefill else []))
        with atomic_folder(output, marker=MANIFEST_FILE, force=force) as folder:
            progress.update(task, total=count_weights(checkpoint))
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
            if not as_json:
                console.print(checks_table(results.checks), markup=False, highlight=False)
            if failed := [check.name for check in results.checks if not check.passed]:
                closer = CLOSER.get((precision, target, block_size), "")
                raise CheckError(f"the package differs from PyTorch ({', '.join(failed)}); nothing was written{closer}")
            manifest = with_results(folder, manifest, results)
            sizes = folder_sizes(folder)
            needs = footprint(folder, manifest)
            progress.update(task, description="loading it again")
            loaded = load_again(folder, needs.running)
    notes = remarks(checkpoint, options.recipe.body)
    facts = {
        "package": str(output),
        "split_layer": manifest.split_layer,
        "layers": manifest.dims.num_hidden_layers,
        "precision": precision,
        "guarded": manifest.guarded,
        "bytes": sum(sizes.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "footprint": dataclasses.asdict(needs) | {"fits_jetson": needs.fits()},
        "loaded": loaded,
        "recommended_options": recommended_options(checkpoint),
        "notes": notes,
        "checks": [dataclasses.asdict(check) for check in results.checks],
    }
    if as_json:
        click.echo(dumps(facts))
        return
    gate = "with its gate" if manifest.guarded else "WITHOUT A GATE (runs only with --policy off)"
    console.print(
        f"{output}: {manifest.source.repo} split at layer {manifest.split_layer} of {manifest.dims.num_hidden_layers}, "
        f"{precision}, {sum(sizes.values()) / 2**20:.1f} MiB, {gate}, in {facts['seconds']} s, "
        f"at most {peak_rss_bytes() / 2**30:.1f} GiB of memory",
        highlight=False,
        soft_wrap=True,
    )
    console.print(needs_text(needs), highlight=False, soft_wrap=True)
    for line in (loaded, *notes):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def remarks(checkpoint: Checkpoint, body: Scheme | None) -> list[str]:
    """What the checkpoint says that the package does not do by itself, a line each."""
    from .checkpoint.open import recommended_options

    said = []
    if options := recommended_options(checkpoint):
        said.append(
            f"the checkpoint's generation_config.json recommends `autosteer-run {' '.join(options)}`; without, answers "
            "are greedy"
        )
    if checkpoint.packed and checkpoint.quantization:
        grids = [blocks for matrix in checkpoint.packed.values() if (blocks := matrix.blocks())]
        done = "kept as they are" if body in grids else "unpacked and rounded again" if body else "unpacked"
        sizes = sorted({blocks.size for blocks in grids} & BLOCK_SIZES)
        better = f" (--precision int4 --block-size {sizes[0]} keeps them)" if sizes and body not in grids else ""
        said.append(
            f"the checkpoint has {len(checkpoint.packed)} matrices in {checkpoint.quantization['quant_method']}: {done}"
            f"{better}; activations that other runtimes would round for it are not rounded"
        )
    return said


def needs_text(needs: Footprint) -> str:
    """What the package takes, for people."""
    weights = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in needs.weights.items())
    fits = ", ".join(f"{size} {'yes' if fits else 'no'}" for size, fits in needs.fits().items())
    return (
        f"weights, MiB: {weights}\n"
        f"to run: about {needs.running / 2**30:.1f} GiB, KV caches at {needs.kv_per_1000_tokens / 2**20:.1f} MiB per "
        f"1,000 tokens among it; on a Jetson with {fits}"
    )


def find_safety(checkpoint: Any, folder: Path | None, layer: int | None) -> SafetyArtifact:
    """The safety folder that was named, or the one inside the checkpoint. Raises PackageError where there is none."""
    from .safety_folder import SafetyArtifact

    where = folder or checkpoint.folder / "safety"
    if not where.is_dir():
        raise PackageError(
            f"{where}: no safety folder; make one with `autosteer-fit --model {checkpoint.name} --pairs FILE "
            "--output DIR` and give it as --safety DIR, or ask for a package without a gate with --unguarded"
        )
    facts = checkpoint.facts
    safety = SafetyArtifact.load(where, hidden_size=facts.hidden_size, num_hidden_layers=facts.num_layers)
    if layer not in (None, safety.facts.split_layer):
        raise InputError(
            f"--layer {layer}: the prober in {where} was trained on layer {safety.facts.split_layer}; "
            f"fit one for layer {layer} with `autosteer-fit --layer {layer}`"
        )
    return safety


def given_authors(options: dict[str, Any], layer: int | None, *, excluded: str | None) -> dict[str, Any]:
    """Those of the options of --prober that were given; none without it. Raises UsageError where they do not fit."""
    given = {name: value for name, value in options.items() if value is not None}
    flags = ", ".join("--" + name.replace("_", "-") for name in given)
    if given and not {"prober", "steer_matrix"} <= set(given):
        raise click.UsageError(f"--prober and --steer-matrix belong together, and the rest to them (here: {flags})")
    if given and excluded:
        raise click.UsageError(f"--prober and {excluded} exclude each other")
    if given and layer is None:
        raise click.UsageError(
            "--prober needs --layer: the authors' files do not say which one it reads (paper: 20, 24)"
        )
    return given


def authors_safety(checkpoint: Any, layer: int | None, given: dict[str, Any]) -> SafetyArtifact:
    """The safety half from the authors' two files."""
    from .safety.authors import AuthorsFiles, load_authors

    unsaid = {
        "unsafe_class": 0,
        "token_offset": checkpoint.family.authors_token_offset,
        "threshold": 0.5,
        "strength": 0.1,
        "refusal_text": REFUSAL_TEXT,
    }
    files = AuthorsFiles(layer=cast(int, layer), **(unsaid | given))
    facts = checkpoint.facts
    return load_authors(files, model=checkpoint.name, hidden_size=facts.hidden_size, num_hidden_layers=facts.num_layers)


def checks_table(checks: tuple[Check, ...]) -> str:
    """The validation table."""
    rows = [
        (c.name, f"{c.value:.3g}", "reported" if c.limit is None else f"<= {c.limit:g}", "ok" if c.passed else "FAILED")
        for c in checks
    ]
    return table(("against PyTorch", "worst", "limit", ""), rows)


def main() -> None:
    """Entry point of autosteer-export."""
    run_command(export, extra="export")
