"""autosteer-fit: checkpoint + safe/unsafe pairs -> safety/, the folder that autosteer-export reads (safety_folder.py).

    read and check the prompts      pairs.py
    fit                             fit.py        hidden states stay on disk beside --output until it is written
    write safety/, all or nothing   safety_folder.py, report.py

Progress, the table of layers, warnings and errors go to stderr; the summary, or with --json one object, to stdout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from autosteer.export.output import atomic_folder, check_output
from autosteer.runtime.console import debug_option, dumps, json_option, run_command, version_option
from autosteer.runtime.errors import ProviderError

from . import DEFAULT_THRESHOLD, DROPOUT, REFUSAL_TEXT, SAFETY_FILE

if TYPE_CHECKING:
    from rich.console import Console

    from autosteer.export.safety_folder import SafetyArtifact
    from autosteer.runtime.evaluation.shards import Asking

    from .fit import Fitted
    from .refit import Shipped


FIRST_FIT_ONLY = ("layer", "select", "prober", "dropout", "strength", "refusal_text", "refusal_only")
NOT_OF_THE_MONITOR = (
    *("threshold", "target_fpr", "augment", "publish_proof", "test_benign", "test_unsafe"),
    *("states_cache", "device"),
)
POOLING: dict[str, Literal["last", "mean"] | None] = {"auto": None, "pooled": "mean", "paper": "last"}


class Finite(click.FloatRange):
    """A number in a range; click's own takes "nan", which is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number. Fails for what is none."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


@click.command("autosteer-fit", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--model", required=True, help="demo, a checkpoint folder, a hub id, or an alias (docs/families.md).")
@click.option(
    "--pairs",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL of unsafe/safe pairs; `builtin`: the pairs and benign prompts that come with AutoSteer; "
    "`builtin-brief`: one pair of each family of them, and the same benign prompts. Repeatable.",
)
@click.option(
    "--benign",
    multiple=True,
    type=click.Path(path_type=Path),
    help="JSONL of more benign prompts, as for autosteer-eval. Repeatable.",
)
@click.option(
    "--unsafe", multiple=True, type=click.Path(path_type=Path), help="JSONL of more unsafe prompts. Repeatable."
)
@click.option(
    "--refusal-only",
    multiple=True,
    type=click.Path(path_type=Path),
    help="JSONL of unsafe prompts on which only the Refusal Head is trained, beside the others. Repeatable.",
)
@click.option(
    "--test-benign",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Benign prompts for the report only; not used in the fit. Repeatable.",
)
@click.option(
    "--test-unsafe",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Unsafe prompts for the report only. Repeatable.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the images that the JSONL files name.",
)
@click.option("--text-only", is_flag=True, help="Ignore the images of all files, and fit on texts alone.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The safety folder to write.")
@click.option(
    "--states-cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep hidden states in this folder, for later fits.  [default: beside --output, deleted at the end]",
)
@click.option(
    "--prober",
    type=click.Choice(["auto", "pooled", "paper"]),
    default="auto",
    show_default=True,
    help="The prober reads the mean over the user's turn (pooled), its last token (paper), or whichever of these tells "
    "unsafe from benign better in kinds of rewording that it was not trained on (auto).",
)
@click.option(
    "--dropout",
    type=Finite(0, 1, max_open=True),
    default=DROPOUT,
    show_default=True,
    help="Share of the prober's inputs left out in training. Less fits the pairs more closely; more does better on "
    "prompts of another kind.",
)
@click.option(
    "--augment",
    is_flag=True,
    help="Train on rewordings of the prompts, too: newlines, thanks, typos, politeness and six other kinds.",
)
@click.option(
    "--package",
    type=click.Path(path_type=Path, file_okay=False),
    help="Fit the prober again, on the hidden states that this package computes; needs --safety.",
)
@click.option(
    "--safety",
    type=click.Path(path_type=Path, file_okay=False),
    help="The safety folder that --package was exported with. Its layer and Refusal Head are kept.",
)
@click.option(
    "--monitor",
    is_flag=True,
    help="Fit no prober, but a monitor, on what the model of --package answers to the prompts: it stops an answer that "
    "becomes unsafe.",
)
@click.option("--max-tiles", type=click.IntRange(min=1), help="Cut a picture into at most this many tiles (--package).")
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Compute the hidden states of --package on the machines of a Ray cluster, as autosteer-eval --ray asks there.",
)
@click.option("--engines", type=click.IntRange(min=1), help="Number of engines, with --ray.  [one on each node]")
@click.option("--layer", type=int, help="Use this layer instead of choosing one.")
@click.option(
    "--select",
    type=click.Choice(["sas", "prober"]),
    help="Choose the layer by SAS, as the paper does (default), or by the best prober.",
)
@click.option(
    "--threshold",
    type=Finite(0, 1, max_open=True),
    help=f"The prober fires above this p_unsafe.  [default: {DEFAULT_THRESHOLD}; with --package the safety folder's]",
)
@click.option(
    "--target-fpr",
    type=Finite(0, 1, min_open=True, max_open=True),
    help="Choose the threshold so that at most this share of benign prompts fires (95 % upper bound, held-out data).",
)
@click.option(
    "--strength",
    type=Finite(min=0, min_open=True),
    help="The paper's epsilon.  [default: train with 0.1, then try several: the middle of the best]",
)
@click.option("--refusal-text", default=REFUSAL_TEXT, show_default=True, help="What the Refusal Head learns to say.")
@click.option(
    "--publish-proof",
    is_flag=True,
    help="Every package carries a few held-out prompts, with which other machines check the gate. Keep their words and "
    "images; the default keeps only the token ids of prompts without images.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the split and of all training.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device that runs the model.",
)
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
@json_option
@debug_option
@version_option
def fit_command(
    model: str,
    pairs: tuple[Path, ...],
    benign: tuple[Path, ...],
    unsafe: tuple[Path, ...],
    refusal_only: tuple[Path, ...],
    test_benign: tuple[Path, ...],
    test_unsafe: tuple[Path, ...],
    images: Path | None,
    text_only: bool,
    output: Path,
    states_cache: Path | None,
    prober: Literal["auto", "pooled", "paper"],
    dropout: float,
    augment: bool,
    package: Path | None,
    safety: Path | None,
    monitor: bool,
    max_tiles: int | None,
    address: str | None,
    engines: int | None,
    layer: int | None,
    select: Literal["sas", "prober"] | None,
    threshold: float | None,
    target_fpr: float | None,
    strength: float | None,
    refusal_text: str,
    publish_proof: bool,
    seed: int,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Fit a safety gate: choose the layer that best tells safe prompts from unsafe ones, train and calibrate a prober
    there, and train the Refusal Head. Writes the safety folder that autosteer-export takes.

    With --package and --safety, fit the prober again on what an exported package computes, with its rounded weights;
    or, with --monitor, add a monitor of answers. Then export once more with the new safety folder."""
    if (package is None) != (safety is None):
        raise click.UsageError("--package and --safety belong together")
    if package is None and max_tiles is not None:
        raise click.UsageError("--max-tiles needs --package; without it the checkpoint's processor cuts the pictures")
    if package is None and address is not None:
        raise click.UsageError(
            "--ray needs --package: a first fit runs PyTorch here; fit on a sample, export, and fit again on everything"
        )
    if engines and not address:
        raise click.UsageError("--engines needs --ray")
    if package is not None and (settled := _given(FIRST_FIT_ONLY)):
        raise click.UsageError(f"{settled} and --package exclude each other: --safety has settled it")
    if monitor and package is None:
        raise click.UsageError("--monitor needs --package and --safety")
    if monitor and (other := "--ray" if address else _given(NOT_OF_THE_MONITOR)):
        raise click.UsageError(f"{other} and --monitor exclude each other")
    if layer is not None and select is not None:
        raise click.UsageError("--layer and --select exclude each other")
    if threshold is not None and target_fpr is not None:
        raise click.UsageError("--threshold and --target-fpr exclude each other")
    if images and text_only:
        raise click.UsageError("--images and --text-only exclude each other")
    if not refusal_text.strip():
        raise click.UsageError("--refusal-text is empty")
    check_output(output, marker=SAFETY_FILE, force=force)

    from rich.console import Console

    from .pairs import check_images, never_fitted, read_data, read_external

    console = Console(stderr=True)
    data = read_data(pairs, benign, unsafe, refusal_only, images=images, text_only=text_only)
    external = [
        *read_external(test_unsafe, unsafe=True, images=images, text_only=text_only),
        *read_external(test_benign, unsafe=False, images=images, text_only=text_only),
    ]
    if seen := len(external) - len(external := never_fitted(external, data)):
        console.print(f"{seen} of the test prompts are among the fit's: left out of the report", soft_wrap=True)
    everything = dataclasses.replace(data, extra=(*data.extra, *external))
    device_ = _device(device)

    from .fit import FitOptions, fit
    from .monitor import fit_monitor
    from .progress import progress
    from .refit import Shipped, refit
    from .report import write_report

    if count := len(everything.images()):
        with progress(console, "checking images", count) as advance:
            check_images(everything, advance=advance)
    if monitor and package and safety:
        with atomic_folder(output, marker=SAFETY_FILE, force=force) as folder:
            shipped = Shipped(package, safety, max_tiles)
            artifact = fit_monitor(data, shipped, model=model, seed=seed, console=console)
            shutil.copytree(safety, folder, dirs_exist_ok=True)  # its report, its proof's pictures
            facts = artifact.save(folder)
        click.echo(dumps(dataclasses.asdict(facts)) if as_json else _monitor_summary(artifact, output))
        return
    options = FitOptions(
        model=model,
        layer=layer,
        select=select or "sas",
        pooling=POOLING[prober],
        augment=augment,
        dropout=dropout,
        threshold=threshold,
        target_fpr=target_fpr,
        strength=strength,
        refusal_text=refusal_text,
        seed=seed,
        device=device_,
        publish_proof=publish_proof,
    )
    states = _states_folder(states_cache, output, console)
    with states as cache, atomic_folder(output, marker=SAFETY_FILE, force=force) as folder:
        if package and safety:
            shipped = Shipped(package, safety, max_tiles)
            asking = _asking(shipped, address, engines, console)
            fitted = refit(data, external, options, shipped, asking, cache=cache, console=console)
        else:
            fitted = fit(data, external, options, cache=cache, console=console)
        facts = fitted.artifact.save(folder, fitted.proof_images)
        write_report(folder, fitted)
    click.echo(dumps(dataclasses.asdict(facts)) if as_json else _summary(fitted, output))


def _asking(shipped: Shipped, address: str | None, engines: int | None, console: Console) -> Asking:
    """How the package's engines are asked: in this process, or on a Ray cluster."""
    if address is None:
        from autosteer.runtime import Engine
        from autosteer.runtime.evaluation.shards import alone

        return partial(alone, lambda: Engine.load(shipped.package, max_tiles=shipped.max_tiles))
    from autosteer.runtime.evaluation.on_ray import Cluster, on_ray

    cluster = Cluster(address, engines, None, shipped.package, shipped.max_tiles)
    return partial(on_ray, cluster, report=lambda line: console.print(line, soft_wrap=True, markup=False))


def _given(names: Sequence[str]) -> str | None:
    """The first of these options that is on the command line."""
    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return f"--{given[0].replace('_', '-')}" if given else None


@contextlib.contextmanager
def _states_folder(wanted: Path | None, output: Path, console: Console) -> Iterator[Path]:
    """The folder of the hidden states. One that was not asked for is deleted, unless the fit ended early."""
    cache = wanted or output.absolute().parent / f".{output.name}.states"
    try:
        yield cache
    except BaseException:  # SIGTERM is a SystemExit
        if any(cache.glob("*.keys")):
            console.print(f"hidden states are kept in {cache}; the same command continues from there", soft_wrap=True)
        raise
    if wanted is None:
        shutil.rmtree(cache, ignore_errors=True)


def _summary(fitted: Fitted, output: Path) -> str:
    facts = fitted.artifact.facts
    c, t = facts.calibration, facts.training
    return (
        f"{output}: gate for {facts.model} at layer {facts.split_layer} (chosen by {facts.selected_by}).\n"
        f"Held out, {c['heldout_unsafe']:.0f} unsafe and {c['heldout_benign']:.0f} benign prompts at threshold "
        f"{facts.threshold:.3g}: recall {c['heldout_recall']:.1%}, false positives {c['heldout_fpr']:.1%} (at most "
        f"{c['fpr_upper_95']:.1%} with 95 % confidence), calibration error {c['ece']:.3f}. Balanced accuracy "
        f"{c['heldout_accuracy']:.1%}; a prober that sees only the words: {c['words_only_accuracy']:.1%}.\n"
        f"{_refusal_summary(t, facts.strength)}"
        f"{t['total_s']:.0f} s. Full report, with plots: {output / 'report.md'}"
    )


def _refusal_summary(t: dict[str, float], strength: float) -> str:
    if "refusal_whole" not in t:  # the authors' own
        return ""
    return (
        f"Refusal Head: {t['refusal_tokens_right']:.1%} of the refusal's tokens are the first choice, "
        f"{t['refusal_whole']:.1%} of held-out unsafe prompts get it word for word (teacher-forced, trained at "
        f"strength {t['refusal_strength_trained']:g}); in generated answers at {strength:g}: "
        f"{t['refusal_answers_exact']:.0%} of {t['refusal_answers_tried']:.0f}.\n"
    )


def _monitor_summary(artifact: SafetyArtifact, output: Path) -> str:
    fitted = artifact.facts.monitor
    assert fitted is not None
    c = fitted.calibration
    return (
        f"{output}: the gate for {artifact.facts.model} with a monitor that reads {fitted.window} tokens and stops "
        f"above {fitted.threshold:.3g}.\n"
        f"Held out: it stops {c['false_stops']:.1%} of {c['benign_answers']:.0f} benign answers (at most "
        f"{c['false_stops_upper_95']:.1%} with 95 % confidence), {c['caught']:.1%} of {c['unsafe_answers']:.0f} unsafe "
        f"ones, and {c['caught_of_missed']:.1%} of the {c['missed_by_prober']:.0f} that the prober let begin."
    )


def _device(wanted: str) -> Literal["cpu", "cuda"]:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ProviderError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def main() -> None:
    """Entry point of autosteer-fit."""
    run_command(fit_command, extra="export")


if __name__ == "__main__":
    main()
