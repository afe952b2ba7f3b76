"""What autosteer-export says about the package that it wrote: in JSON, and for the terminal."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosteer.runtime.console import table
from autosteer.runtime.manifest import Check, Manifest

from .safety import PICTURES

if TYPE_CHECKING:
    from .checkpoint.open import Checkpoint
    from .footprint import Footprint
    from .graphs.quantize import Scheme
    from .package import ExportOptions
    from .safety_folder import SafetyArtifact

BLOCK_SIZES = {32, 64, 128}


@dataclass(frozen=True)
class Exported:
    """A package that was written, compared with PyTorch, and loaded."""

    manifest: Manifest
    checks: tuple[Check, ...]
    bytes: int
    needs: Footprint
    loaded: str  # how


def facts_of(
    exported: Exported,
    checkpoint: Checkpoint,
    safety: SafetyArtifact | None,
    options: ExportOptions,
    output: Path,
    *,
    seconds: float,
) -> dict[str, Any]:
    """What --json prints."""
    from .checkpoint.open import recommended_options
    from .footprint import peak_rss_bytes

    manifest, needs = exported.manifest, exported.needs
    return {
        "package": str(output),
        "split_layer": manifest.split_layer,
        "layers": manifest.dims.num_hidden_layers,
        "precision": options.precision,
        "guarded": manifest.guarded,
        "bytes": exported.bytes,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "footprint": dataclasses.asdict(needs) | {"fits_jetson": needs.fits()},
        "loaded": exported.loaded,
        "recommended_options": recommended_options(checkpoint),
        "notes": [
            *remarks(checkpoint, options.recipe.body),
            *blind_gate(manifest),
            *unproven(exported, checkpoint, safety),
        ],
        "checks": [dataclasses.asdict(check) for check in exported.checks],
    }


def summary(exported: Exported, facts: dict[str, Any]) -> list[str]:
    """The lines for the terminal, from the facts."""
    manifest = exported.manifest
    gate = "with its gate" if manifest.guarded else "WITHOUT A GATE (runs only with --policy off)"
    gate += " and a monitor of answers" if manifest.monitor else ""
    return [
        f"{facts['package']}: {manifest.source.repo} split at layer {manifest.split_layer} of {facts['layers']}, "
        f"{facts['precision']}, {exported.bytes / 2**20:.1f} MiB, {gate}, in {facts['seconds']} s, "
        f"at most {facts['peak_rss_bytes'] / 2**30:.1f} GiB of memory",
        needs_text(exported.needs),
        exported.loaded,
        *facts["notes"],
        *([f"uploaded: {facts['pushed']}"] if facts["pushed"] else []),
    ]


def remarks(checkpoint: Checkpoint, body: Scheme | None) -> list[str]:
    """Notes on the checkpoint's sampling settings and on its quantised matrices, a line each."""
    from .checkpoint.open import recommended_options

    notes = []
    if options := recommended_options(checkpoint):
        notes.append(
            f"the checkpoint's generation_config.json recommends `autosteer-run {' '.join(options)}`; without these, "
            "answers are greedy"
        )
    if checkpoint.packed and checkpoint.quantization:
        grids = [blocks for matrix in checkpoint.packed.values() if (blocks := matrix.blocks())]
        done = "copied unchanged" if body in grids else "dequantised and quantised again" if body else "dequantised"
        sizes = sorted({blocks.size for blocks in grids} & BLOCK_SIZES)
        better = f" (--precision int4 --block-size {sizes[0]} keeps them)" if sizes and body not in grids else ""
        notes.append(
            f"the checkpoint has {len(checkpoint.packed)} matrices in {checkpoint.quantization['quant_method']}: {done}"
            f"{better}; if the checkpoint's method also rounds activations, the package does not"
        )
    return notes


def blind_gate(manifest: Manifest) -> list[str]:
    """A warning, if the model takes pictures and its gate was fitted without any."""
    if manifest.image is None or manifest.prober is None:
        return []
    blind = manifest.prober.calibration.get(PICTURES) == 0
    return (
        [
            "WARNING: the gate was fitted without pictures and this model takes them: nothing is known about harm in "
            "pictures; fit it on pairs with images (autosteer-fit --pairs FILE --images DIR)"
        ]
        if blind
        else []
    )


def unproven(exported: Exported, checkpoint: Checkpoint, safety: SafetyArtifact | None) -> list[str]:
    """Warnings, if nothing in the package shows that its gate fires, or if it was fitted on a model of another name."""
    if safety is None:
        return []
    notes = []
    if not any(check.name == "unsafe prompts" for check in exported.checks):
        notes.append(
            "WARNING: nothing shows that this gate fires: the safety folder has no unsafe prompt that it should catch "
            "at this threshold, so neither this export nor autosteer-check tries one; measure it with autosteer-eval"
        )
    if safety.facts.model != checkpoint.name:
        notes.append(
            f"WARNING: the gate was fitted on {safety.facts.model}, and this model is {checkpoint.name}; a gate of "
            "another model catches nothing"
        )
    return notes


def needs_text(needs: Footprint) -> str:
    """The package's memory needs, for the terminal."""
    weights = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in needs.weights.items())
    fits = ", ".join(f"{size} {'yes' if fits else 'no'}" for size, fits in needs.fits().items())
    return (
        f"weights, MiB: {weights}\n"
        f"to run: about {needs.running / 2**30:.1f} GiB, KV caches at {needs.kv_per_1000_tokens / 2**20:.1f} MiB per "
        f"1,000 tokens among it; on a Jetson with {fits}"
    )


def checks_table(checks: tuple[Check, ...]) -> str:
    """The table of checks, for the terminal."""
    rows = [
        (c.name, f"{c.value:.3g}", "reported" if c.limit is None else f"<= {c.limit:g}", "ok" if c.passed else "FAILED")
        for c in checks
    ]
    return table(("against PyTorch", "worst", "limit", ""), rows)
