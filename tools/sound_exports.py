"""Measure how large the errors of correct exports are in every check of the validation. The limits are set from this.

    python tools/sound_exports.py --model demo --model build/smollm2 > build/sound.md

Each row is a package that is written, compared with PyTorch and deleted. It has no gate, because these checks do not
concern the gate. The last row has the worst of each column.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from autosteer.export.checkpoint.hf_model import quiet_transformers
from autosteer.export.checkpoint.open import open_checkpoint
from autosteer.export.package import ExportOptions, write_package
from autosteer.export.validation.metrics import worse
from autosteer.export.validation.validate import validate_package

EXPORTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp32, int8 caches": {"precision": "fp32", "kv_cache": "int8"},
    "int8": {"precision": "int8"},
    "int8, blocks of 128": {"precision": "int8", "block_size": 128},
    "int4": {"precision": "int4"},
    "int4, head 4": {"precision": "int4", "head_bits": 4},
    "int4, blocks of 32, head 4": {"precision": "int4", "block_size": 32, "head_bits": 4},
    "int4, prefill copy, int8 caches": {"precision": "int4", "prefill": "int8", "kv_cache": "int8"},
    "fp16 for CUDA": {"precision": "fp16", "target": "cuda"},
    "int4 for CUDA": {"precision": "int4", "target": "cuda"},
}
COLUMNS = {  # of the table: the line's name
    "attention": "attention, each by itself",
    "MLP": "MLP, each by itself",
    "norm": "final norm, by itself",
    "head": "head, by itself",
    "attention lost": "attention, share lost",
    "MLP lost": "MLP, share lost",
    "head lost": "head, share lost",
    "image rows": "image rows, error to rounded",
    "hidden state": "hidden state, error to rounded",
    "KL to rounded": "logits, KL to rounded",
    "KL to original": "logits, KL to original",
    "rows": "quantised rows",
    "columns": "quantised columns",
    "scale": "quantised weights, scale",
    "8-bit steps": "8-bit weights, steps",
    "chunks": "chunked prefill",
    "chunks, attention": "chunked prefill, attention",
}


def measure(model: str, options: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The worst of each column, of reading and answering copies; and the lines that failed."""
    checkpoint = open_checkpoint(model)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_package(Path(folder), checkpoint, None, ExportOptions(**options), lambda _: None)
        checks = validate_package(Path(folder), manifest, checkpoint, None, lambda _: None).checks
    values: dict[str, float] = {}
    for column, line in COLUMNS.items():
        for check in checks:
            if check.name.partition(" (")[0] == line:
                values[column] = worse(values.get(column, 0.0), check.value)
    return values, [check.name for check in checks if not check.passed]


@click.command()
@click.option("--model", "models", multiple=True, required=True)
@click.option("--layer", type=int, help="Split layer.")
def main(models: tuple[str, ...], layer: int | None) -> None:
    """Export every model at every kind of precision, and print what validation gives."""
    quiet_transformers()
    click.echo(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    worst: dict[str, float] = {}
    for model in models:
        for name, options in EXPORTS.items():
            values, failed = measure(model, {**options, "split_layer": layer})
            worst |= {column: worse(worst.get(column, 0.0), value) for column, value in values.items()}
            click.echo(_row(f"{Path(model).name}, {name}", values) + (f" FAILED: {failed}" if failed else ""))
    click.echo(_row("worst", worst))


def _row(name: str, values: dict[str, float]) -> str:
    cells = (f"{values[column]:.2g}" if column in values else "" for column in COLUMNS)
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
