"""autosteer-fit: checkpoint + safe/unsafe pairs -> safety/, the folder that autosteer-export reads (artifact.py).

    read and check the prompts          pairs.py
    hidden states of every layer        features.py       the slow part: one forward pass per distinct prompt
    SAS and a prober at every layer     sas.py, prober.py
    choose the layer, calibrate         calibrate.py
    train the Refusal Head              refusal_head.py   on the unsafe prompts
    write safety/, all or nothing       artifact.py

Progress, the table of layers, warnings and errors go to stderr; the summary, or with --json one object, to stdout.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from autosteer.export.output import atomic_folder, check_output
from autosteer.runtime.console import debug_option, dumps, json_option, run_command, table
from autosteer.runtime.errors import InputError, ProviderError

from . import SAFETY_FILE

if TYPE_CHECKING:
    import numpy as np
    import torch
    from rich.console import Console

    from .artifact import LayerScore, SafetyArtifact
    from .features import Reference
    from .pairs import FitData, Labelled
    from .prober import Prober, Split

DEFAULT_REFUSAL = "I'm sorry, but I can't assist with that."
DEFAULT_THRESHOLD = 0.5
REFUSAL_PROMPTS = 1000  # unsafe prompts the Refusal Head trains on at most; their states are (n, T, d) in memory
PROBER_IS_POOR, REFUSAL_IS_POOR = 0.75, 0.5  # balanced accuracy, share of whole refusals: a warning below


@dataclass(frozen=True)
class FitOptions:
    """What the command line asks for, beside the data."""

    model: str
    layer: int | None  # None: `select` chooses
    select: Literal["sas", "prober"]
    threshold: float | None  # None: from target_fpr
    target_fpr: float | None
    strength: float
    refusal_text: str
    seed: int
    device: Literal["cpu", "cuda"]


@click.command("autosteer-fit", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--model", required=True, help="demo, a checkpoint folder, a hub id or one of our aliases.")
@click.option(
    "--pairs",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL of unsafe/safe pairs; `builtin`: the pairs and benign prompts that come with the package.",
)
@click.option("--benign", multiple=True, type=click.Path(path_type=Path), help="JSONL of more benign prompts.")
@click.option("--unsafe", multiple=True, type=click.Path(path_type=Path), help="JSONL of more unsafe prompts.")
@click.option(
    "--images", type=click.Path(path_type=Path, file_okay=False), help="Folder of images named in the JSONL files."
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The safety folder to write.")
@click.option("--layer", type=int, help="Probe and cut at this layer, whatever the scores say.")
@click.option(
    "--select",
    type=click.Choice(["sas", "prober"]),
    help="Choose the layer by SAS (the paper; default) or by the best prober.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, max_open=True),
    help=f"The prober fires above this p_unsafe.  [default: {DEFAULT_THRESHOLD}]",
)
@click.option(
    "--target-fpr",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Choose the threshold so that at most this share of benign prompts fires (95 % bound, held-out data).",
)
@click.option(
    "--strength",
    type=click.FloatRange(min=0, min_open=True),
    default=0.1,
    show_default=True,
    help="The paper's epsilon.",
)
@click.option("--refusal-text", default=DEFAULT_REFUSAL, show_default=True, help="What the Refusal Head learns to say.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="For the model."
)
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
@json_option
@debug_option
def fit_command(
    model: str,
    pairs: tuple[Path, ...],
    benign: tuple[Path, ...],
    unsafe: tuple[Path, ...],
    images: Path | None,
    output: Path,
    layer: int | None,
    select: Literal["sas", "prober"] | None,
    threshold: float | None,
    target_fpr: float | None,
    strength: float,
    refusal_text: str,
    seed: int,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Fit a safety gate: find the layer where unsafe prompts stand apart, train and calibrate a prober there, train the
    Refusal Head. Writes the safety folder that autosteer-export takes."""
    if layer is not None and select is not None:
        raise click.UsageError("--layer and --select exclude each other")
    if threshold is not None and target_fpr is not None:
        raise click.UsageError("--threshold and --target-fpr exclude each other")
    if not refusal_text.strip():
        raise click.UsageError("--refusal-text is empty")
    check_output(output, marker=SAFETY_FILE, force=force)

    from rich.console import Console

    from .pairs import check_images, read_data

    console = Console(stderr=True)
    data = read_data(pairs, benign, unsafe, images=images)
    if count := len(data.images()):
        with _progress(console, "checking images", count) as advance:
            check_images(data, advance=advance)
    options = FitOptions(
        model=model,
        layer=layer,
        select=select or "sas",
        threshold=DEFAULT_THRESHOLD if threshold is None and target_fpr is None else threshold,
        target_fpr=target_fpr,
        strength=strength,
        refusal_text=refusal_text,
        seed=seed,
        device=_device(device),
    )
    with atomic_folder(output, marker=SAFETY_FILE, force=force) as folder:
        artifact = fit(data, options, console=console)
        artifact.save(folder)
    click.echo(dumps(dataclasses.asdict(artifact.facts)) if as_json else _summary(artifact, output))


def fit(data: FitData, options: FitOptions, *, console: Console) -> SafetyArtifact:
    """Everything between the prompts and the artifact. `console` gets progress and the table of layers."""
    from autosteer.export.checkpoint import open_checkpoint
    from autosteer.export.cli import quiet_transformers

    from .artifact import FORMAT_VERSION, SafetyArtifact, SafetyFacts
    from .calibrate import allowed_false_positives
    from .features import TOKEN_OFFSET, check_text, open_reference, prompt_states
    from .prober import split_by_text

    started = time.perf_counter()
    prompts = data.labelled()
    split = split_by_text(
        [item.cluster for item in prompts], [(item.unsafe, item.group) for item in prompts], seed=options.seed
    )
    if options.target_fpr is not None:
        benign = sum(not prompts[row].unsafe for row in split.heldout)
        allowed_false_positives(benign, target_fpr=options.target_fpr)
    quiet_transformers()
    checkpoint = open_checkpoint(options.model)
    depth = int(checkpoint.facts.num_layers)
    if options.layer is not None and not 0 < options.layer < depth:
        raise InputError(f"--layer {options.layer}: {checkpoint.name} has layers to cut at from 1 to {depth - 1}")
    reference = open_reference(checkpoint, device=options.device)
    check_text(reference, [item.prompt for item in prompts])

    with _progress(console, "hidden states", len(prompts)) as advance:
        states = prompt_states(reference, [item.prompt for item in prompts], advance=advance)
    states_s = time.perf_counter() - started
    probers, scores, dropped = _score_layers(data, prompts, states, split, options.seed, console)
    layer = options.layer or _choose_layer(scores, options.select)
    console.print(_layer_table(scores, layer), soft_wrap=True, markup=False, highlight=False)
    prober, threshold, calibration = _calibrate(probers[layer - 1], states[:, layer - 1], prompts, split, options)
    steer_matrix, refusal_facts = _refusal_head(reference, prompts, split, options, console)
    _warn(console, layer, calibration, refusal_facts)

    facts = SafetyFacts(
        format_version=FORMAT_VERSION,
        model=checkpoint.name,
        split_layer=layer,
        token_offset=TOKEN_OFFSET,
        threshold=threshold,
        strength=options.strength,
        refusal_text=options.refusal_text,
        layers=tuple(scores),
        calibration=calibration,
        training={
            "seed": float(options.seed),
            "pairs": float(len(data.pairs)),
            "pairs_without_difference": float(dropped),
            "prompts": float(len(prompts)),
            **{f"{part}_prompts": float(len(rows)) for part, rows in vars(split).items()},
            **refusal_facts,
            "hidden_states_s": round(states_s, 1),
            "total_s": round(time.perf_counter() - started, 1),
        },
        selected_by="user" if options.layer else options.select,
    )
    artifact = SafetyArtifact(facts, prober, steer_matrix)
    artifact.check(Path("the fitted gate"), hidden_size=states.shape[-1], num_hidden_layers=depth)
    return artifact


def _score_layers(
    data: FitData, prompts: list[Labelled], states: torch.Tensor, split: Split, seed: int, console: Console
) -> tuple[list[Prober], list[LayerScore], int]:
    """SAS and a prober for every layer; entry 0 is layer 1. The last value counts pairs whose prompts look the same."""
    import torch

    from .artifact import LayerScore
    from .prober import balanced_accuracy, p_unsafe, train_prober
    from .sas import sas, sas_with_interval, unit_deltas

    row = {item.prompt: i for i, item in enumerate(prompts)}
    deltas = states[[row[pair.unsafe] for pair in data.pairs]] - states[[row[pair.safe] for pair in data.pairs]]
    directions, kept = unit_deltas(deltas)
    pooled = sas_with_interval(directions, seed=seed)
    channel_of = [data.pairs[i].channel for i in kept.tolist()]
    channels = sorted(set(channel_of))
    members = {name: [i for i, channel in enumerate(channel_of) if channel == name] for name in channels}
    by_channel = {name: sas(directions[rows]) for name, rows in members.items() if len(rows) > 1 and len(channels) > 1}

    unsafe = _labels(prompts)
    probers, scores = [], []
    with _progress(console, "probers", states.shape[1]) as advance:
        for index in range(states.shape[1]):
            prober = train_prober(states[:, index], torch.from_numpy(unsafe), split, seed=seed)
            p = p_unsafe(prober, states[split.validation, index])
            probers.append(prober)
            scores.append(
                LayerScore(
                    layer=index + 1,
                    sas=float(pooled.sas[index]),
                    sas_low=float(pooled.low[index]),
                    sas_high=float(pooled.high[index]),
                    prober_accuracy=balanced_accuracy(p, unsafe[split.validation], DEFAULT_THRESHOLD),
                    sas_by_channel={name: float(values[index]) for name, values in by_channel.items()} or None,
                )
            )
            advance(1)
    return probers, scores, len(data.pairs) - len(kept)


def _choose_layer(scores: list[LayerScore], select: Literal["sas", "prober"]) -> int:
    """The layer with the highest score; of equal ones the first, because it stops a refused prompt soonest."""
    key = {"sas": lambda s: s.sas, "prober": lambda s: s.prober_accuracy}[select]
    return max(scores, key=key).layer


def _calibrate(
    prober: Prober, states: torch.Tensor, prompts: list[Labelled], split: Split, options: FitOptions
) -> tuple[Prober, float, dict[str, float]]:
    """(calibrated prober, threshold, facts) of the chosen layer's states (n, d)."""
    from .calibrate import choose_threshold, fit_temperature, fold_temperature, heldout_facts
    from .prober import p_unsafe, prober_logits, words_only_accuracy

    unsafe = _labels(prompts)
    temperature = fit_temperature(prober_logits(prober, states[split.validation]), unsafe[split.validation])
    prober = fold_temperature(prober, temperature)
    p, labels = p_unsafe(prober, states[split.heldout]), unsafe[split.heldout]
    threshold = options.threshold
    if threshold is None:
        assert options.target_fpr is not None
        threshold = choose_threshold(p, labels, target_fpr=options.target_fpr)
    groups = [prompts[row].group for row in split.heldout]
    texts = [item.prompt.text for item in prompts]
    return (
        prober,
        threshold,
        {
            **heldout_facts(p, labels, groups, threshold=threshold),
            "temperature": temperature,
            "words_only_accuracy": words_only_accuracy(texts, unsafe, split, seed=options.seed),
        },
    )


def _labels(prompts: list[Labelled]) -> np.ndarray:
    """(n,) bool: which prompts are unsafe."""
    import numpy as np

    return np.array([item.unsafe for item in prompts])


def _refusal_head(
    reference: Reference, prompts: list[Labelled], split: Split, options: FitOptions, console: Console
) -> tuple[torch.Tensor, dict[str, float]]:
    """Train on unsafe prompts of the train and validation parts, measure on the held-out ones."""
    import numpy as np

    from .features import answer_states, answer_tokens
    from .refusal_head import STEPS, train_refusal_head

    seen = [prompts[i].prompt for i in (*split.train, *split.validation) if prompts[i].unsafe]
    if len(seen) > REFUSAL_PROMPTS:
        chosen = np.random.default_rng(options.seed).choice(len(seen), REFUSAL_PROMPTS, replace=False)
        seen = [seen[i] for i in chosen]
    heldout = [prompts[i].prompt for i in split.heldout if prompts[i].unsafe]
    answer = answer_tokens(reference, options.refusal_text)
    with _progress(console, "refusal states", len(seen) + len(heldout)) as advance:
        states = answer_states(reference, [*seen, *heldout], answer, advance=advance)
    with _progress(console, "refusal head", STEPS) as advance:
        head = train_refusal_head(
            states[: len(seen)],
            states[len(seen) :],
            answer,
            reference.embeddings,
            strength=options.strength,
            seed=options.seed,
            advance=advance,
        )
    return head.steer_matrix, {
        "refusal_prompts": float(len(seen)),
        "refusal_steps": float(STEPS),
        "refusal_initial_loss": head.initial_loss,
        "refusal_loss": head.loss,
        "refusal_tokens_right": head.argmax_share,
        "refusal_whole": head.whole_share,
    }


def _layer_table(scores: list[LayerScore], chosen: int) -> str:
    channels = list(scores[0].sas_by_channel or {})
    header = ("layer", "SAS", "95 % interval", *(f"SAS {name}" for name in channels), "prober", "")
    rows = [
        (
            str(s.layer),
            f"{s.sas:.3f}",
            f"{s.sas_low:.3f} .. {s.sas_high:.3f}",
            *(f"{(s.sas_by_channel or {})[name]:.3f}" for name in channels),
            f"{s.prober_accuracy:.3f}",
            "<- cut here" if s.layer == chosen else "",
        )
        for s in scores
    ]
    return f"\n{table(header, rows)}\nSAS on all pairs; prober: balanced accuracy on the validation part.\n"


def _summary(artifact: SafetyArtifact, output: Path) -> str:
    facts, c, t = artifact.facts, artifact.facts.calibration, artifact.facts.training
    return (
        f"{output}: gate for {facts.model} at layer {facts.split_layer} (chosen by {facts.selected_by}).\n"
        f"Held out, {c['heldout_unsafe']:.0f} unsafe and {c['heldout_benign']:.0f} benign prompts at threshold "
        f"{facts.threshold:.3g}: recall {c['heldout_recall']:.1%}, false positives {c['heldout_fpr']:.1%} (at most "
        f"{c['fpr_upper_95']:.1%} with 95 % confidence), calibration error {c['ece']:.3f}. Balanced accuracy "
        f"{c['heldout_accuracy']:.1%}; a prober that sees the words alone: {c['words_only_accuracy']:.1%}.\n"
        f"Refusal Head at strength {facts.strength:g}: {t['refusal_tokens_right']:.1%} of the refusal's tokens are the "
        f"first choice, {t['refusal_whole']:.1%} of held-out unsafe prompts get it word for word (teacher-forced).\n"
        f"{t['total_s']:.0f} s."
    )


def _device(wanted: str) -> Literal["cpu", "cuda"]:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ProviderError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _warn(console: Console, layer: int, calibration: dict[str, float], refusal: dict[str, float]) -> None:
    """Say where the gate came out too weak to rely on."""
    warnings = []
    if calibration["heldout_accuracy"] < PROBER_IS_POOR:
        warnings.append(
            f"held-out balanced accuracy is {calibration['heldout_accuracy']:.1%}: this prober hardly tells unsafe "
            f"from benign at layer {layer}; try --select prober, or more prompts"
        )
    if refusal["refusal_whole"] < REFUSAL_IS_POOR:
        warnings.append(
            f"the Refusal Head completes only {refusal['refusal_whole']:.1%} of refusals; try a higher --strength, "
            "or a --refusal-text in words the model itself would use"
        )
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; yields a function that is told how many more are done."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total)
        yield lambda done: bars.advance(task, done)


def main() -> None:
    """Entry point of autosteer-fit."""
    run_command(fit_command)


if __name__ == "__main__":
    main()
