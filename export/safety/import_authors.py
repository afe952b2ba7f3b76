"""autosteer-import-authors: the authors' two checkpoint files -> safety/, the folder that autosteer-export reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import click

from autosteer.export.output import atomic_folder, check_output
from autosteer.runtime.console import debug_option, run_command, version_option

from . import DEFAULT_THRESHOLD, REFUSAL_TEXT, SAFETY_FILE


@click.command(
    "autosteer-import-authors",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--model", required=True, help="demo, a checkpoint folder, a hub id, or an alias (docs/families.md).")
@click.option("--revision", help="Commit, branch or tag on the hub.")
@click.option("--prober", required=True, type=click.Path(path_type=Path), help="The authors' prober (.pt).")
@click.option("--steer-matrix", required=True, type=click.Path(path_type=Path), help="The authors' steer matrix (.pt).")
@click.option(
    "--layer",
    required=True,
    type=int,
    help="Decoder layer whose input the prober reads. The files do not say; the paper: 20 (LLaVA-OneVision-7B), 24 "
    "(Chameleon-7B).",
)
@click.option(
    "--unsafe-class",
    type=click.IntRange(0, 1),
    default=0,
    show_default=True,
    help="The prober's output that means unsafe: 0 in the paper's training, 1 in SafeSwitch's.",
)
@click.option(
    "--token-offset",
    type=int,
    help="The token that the prober reads, counted from the end of the prompt without generation prompt. Default: the "
    "authors' (-1, the last; Chameleon -2, before the separator, which their prompts lack).",
)
@click.option(
    "--threshold",
    type=float,
    default=DEFAULT_THRESHOLD,
    show_default=True,
    help="The gate fires above this p_unsafe.",
)
@click.option("--strength", type=float, default=0.1, show_default=True, help="The paper's epsilon.")
@click.option("--refusal-text", default=REFUSAL_TEXT, show_default=True, help="What --policy stop answers.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The safety folder to write.")
@click.option("--force", is_flag=True, help="Replace --output if it exists.")
@debug_option
@version_option
def import_authors(
    model: str,
    revision: str | None,
    prober: Path,
    steer_matrix: Path,
    layer: int,
    unsafe_class: int,
    token_offset: int | None,
    threshold: float,
    strength: float,
    refusal_text: str,
    output: Path,
    force: bool,
) -> None:
    """Write a safety folder from the files of the AutoSteer authors' code.

    Such a prober is not calibrated, and the folder has no held-out prompts: measure the gate with autosteer-eval.
    """
    check_output(output, marker=SAFETY_FILE, force=force)

    from autosteer.export.checkpoint.decoder_config import decoder_config
    from autosteer.export.checkpoint.hf_model import quiet_transformers
    from autosteer.export.checkpoint.open import open_checkpoint

    from .authors import AuthorsFiles, load_authors

    quiet_transformers()
    checkpoint = open_checkpoint(model, revision=revision)
    config = decoder_config(checkpoint)
    files = AuthorsFiles(
        prober=prober,
        steer_matrix=steer_matrix,
        layer=layer,
        unsafe_class=cast(Literal[0, 1], unsafe_class),
        token_offset=checkpoint.family.authors_token_offset if token_offset is None else token_offset,
        threshold=threshold,
        strength=strength,
        refusal_text=refusal_text,
    )
    artifact = load_authors(
        files,
        model=checkpoint.name,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
    )
    with atomic_folder(output, marker=SAFETY_FILE, force=force) as folder:
        artifact.save(folder)
    click.echo(f"{output}: gate for {checkpoint.name} at layer {layer}, threshold {threshold:g}, strength {strength:g}")


def main() -> None:
    """Entry point of autosteer-import-authors."""
    run_command(import_authors, extra="export")


if __name__ == "__main__":
    main()
