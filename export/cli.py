"""autosteer-export: checkpoint + safety/ -> package/."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from autosteer.runtime.console import debug_option, dumps, json_option, run_command, table
from autosteer.runtime.errors import CheckError, InputError, PackageError
from autosteer.runtime.manifest import MANIFEST_FILE, Check, Precision

from .output import atomic_folder, check_output

if TYPE_CHECKING:
    from .safety.artifact import SafetyArtifact


@click.command("autosteer-export", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="demo, llava-ov, chameleon, ..., a local folder, or a hub id.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The package folder to write.")
@click.option(
    "--safety",
    "safety_folder",
    type=click.Path(path_type=Path),
    help="Folder made by autosteer-fit. Default: safety/ inside the checkpoint.",
)
@click.option("--unguarded", is_flag=True, help="Export without a gate; such a package runs only with --policy off.")
@click.option("--layer", type=int, help="Split before this decoder layer. Default: the safety folder's (SAS) layer.")
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="fp32",
    show_default=True,
    help="How weights are stored.",
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
    unguarded: bool,
    layer: int | None,
    precision: str,
    context_length: int | None,
    revision: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export a multimodal LLM, split at its SAS layer, with its gate, to ONNX; validate it against PyTorch.

    Nothing is written unless the validation passes.
    """
    if unguarded and safety_folder:
        raise click.UsageError("--unguarded and --safety exclude each other")
    check_output(output, marker=MANIFEST_FILE, force=force)

    from rich.console import Console

    from .checkpoint import open_checkpoint
    from .package import ExportOptions, folder_sizes, with_results, write_package
    from .validate import validate_package

    console = Console(stderr=True)
    started = time.perf_counter()
    with console.status("opening the checkpoint") as status:
        quiet_transformers()
        checkpoint = open_checkpoint(model, revision=revision)
        safety = None if unguarded else find_safety(checkpoint, safety_folder, layer)
        options = ExportOptions(cast(Precision, precision), layer, context_length)
        with atomic_folder(output, marker=MANIFEST_FILE, force=force) as folder:
            manifest = write_package(
                folder, checkpoint, safety, options, lambda step: status.update(f"writing: {step}")
            )
            checks, golden = validate_package(
                folder, manifest, checkpoint, safety, lambda step: status.update(f"validating: {step}")
            )
            if not as_json:
                console.print(checks_table(checks), markup=False, highlight=False)
            if failed := [check.name for check in checks if not check.passed]:
                raise CheckError(f"the package differs from PyTorch ({', '.join(failed)}); nothing was written")
            manifest = with_results(folder, manifest, checks, golden)
            sizes = folder_sizes(folder)
    facts = {
        "package": str(output),
        "split_layer": manifest.split_layer,
        "layers": manifest.dims.num_hidden_layers,
        "precision": precision,
        "guarded": manifest.guarded,
        "bytes": sum(sizes.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    if as_json:
        click.echo(dumps(facts))
        return
    gate = "with its gate" if manifest.guarded else "WITHOUT A GATE (runs only with --policy off)"
    console.print(
        f"{output}: {manifest.source.repo} split at layer {manifest.split_layer} of {manifest.dims.num_hidden_layers}, "
        f"{precision}, {sum(sizes.values()) / 2**20:.1f} MiB, {gate}, in {facts['seconds']} s",
        highlight=False,
        soft_wrap=True,
    )


def find_safety(checkpoint: Any, folder: Path | None, layer: int | None) -> SafetyArtifact:
    """The safety folder that was named, or the one inside the checkpoint. Raises PackageError where there is none."""
    from .safety.artifact import SafetyArtifact

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


def checks_table(checks: tuple[Check, ...]) -> str:
    """The validation table."""
    rows = [
        (c.name, f"{c.value:.3g}", "reported" if c.limit is None else f"<= {c.limit:g}", "ok" if c.passed else "FAILED")
        for c in checks
    ]
    return table(("against PyTorch", "worst", "limit", ""), rows)


def quiet_transformers() -> None:
    """Its progress bars and notices are about loading files, not about our work."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Entry point of autosteer-export."""
    run_command(export)
