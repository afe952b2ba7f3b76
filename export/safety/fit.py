"""Fit a gate: from prompts to the contents of the safety folder.

hidden states of every layer        states.py, store.py       one forward pass per distinct prompt
SAS and a prober at every layer     sas.py, prober.py
choose the layer, calibrate         calibrate.py
leave each data set out in turn     evidence.py               compared with the paper's prober and the words alone
train the Refusal Head, try it      refusal_head.py, answers.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from autosteer.export.safety_folder import FORMAT_VERSION, LayerScore, ProofPrompt, SafetyArtifact, SafetyFacts
from autosteer.runtime.console import table
from autosteer.runtime.errors import InputError
from autosteer.runtime.evaluation.variants import FamilyRates, as_text, by_family, possible_families

from . import DEFAULT_THRESHOLD, PICTURES
from .batches import answer_tokens, check_text, takes_system
from .calibrate import allowed_false_positives, choose_threshold, fit_temperature, fold_temperature, heldout_facts
from .evidence import Evidence, Gate, Table, gather
from .head_fit import fit_refusal_head
from .model import open_fit_model
from .other_words import OtherWords, put_in_other_words
from .prober import balanced_accuracy, p_unsafe, prober_logits, row_weights, split_by_text, train_probers
from .progress import progress
from .proof import choose_proof
from .refusal_head import StrengthScore
from .sas import SasSum
from .states import (
    POSITIONS,
    answer_store,
    checkpoint_files,
    digests,
    prompt_states,
    prompt_store,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from autosteer.export.checkpoint.open import Checkpoint

    from .pairs import FitData, Labelled
    from .prober import Prober, Split
    from .sas import SasScores
    from .store import States

READ_PAIRS = 128  # differences in memory at a time
BLIND = (
    "NO PICTURE IS AMONG THE FIT'S PROMPTS, and this model takes pictures: nothing is known about what this gate does "
    "with a picture, and it will most likely let harm in pictures through; give pairs with images (--images)"
)
PROBER_IS_POOR, REFUSAL_IS_POOR = 0.75, 0.5  # warn below: balanced accuracy, share of complete refusals

Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class FitOptions:
    """The options of autosteer-fit, without the data."""

    model: str
    layer: int | None  # None: `select` chooses
    select: Literal["sas", "prober"]
    pooling: Pooling | None  # the prober's input: the last token's state (the paper), or the turn's mean; None: choose
    augment: bool  # train on rewordings of the prompts, too
    threshold: float | None  # None: from target_fpr
    target_fpr: float | None
    strength: float | None  # None: train with the paper's, then use the best of STRENGTHS
    refusal_text: str
    seed: int
    device: Literal["cpu", "cuda"]
    publish_proof: bool = False  # keep the words and images of the prompts in the proof


@dataclass(frozen=True)
class Fitted:
    """The fitted gate, and the contents of its report."""

    artifact: SafetyArtifact
    proof_images: dict[str, Path]  # images of the proof's prompts, by their names in the safety folder
    evidence: Evidence
    strengths: tuple[StrengthScore, ...]
    rewordings: tuple[FamilyRates, ...]  # what the gate makes of held-out prompts in other words


@dataclass(frozen=True)
class Chosen:
    """What the gate reads, and the calibrated prober that reads it."""

    layer: int
    pooling: Pooling
    gate: Gate
    states: dict[str, torch.Tensor]  # (n, d) of all prompts as they enter that layer, by position
    scores: np.ndarray  # (n,) p_unsafe of all prompts
    layers: tuple[LayerScore, ...]  # every layer's, for the report
    pairs_without_difference: int


def fit(
    data: FitData, external: Sequence[Labelled], options: FitOptions, *, features: Path, console: Console
) -> Fitted:
    """Fit a gate on `data`. `external` prompts are only for the report. `features`: folder for hidden states."""
    started = time.perf_counter()
    prompts = data.labelled()
    split = split_prompts(data, prompts, seed=options.seed)
    if options.target_fpr is not None:
        benign = sum(not prompts[row].unsafe for row in split.heldout)
        allowed_false_positives(benign, target_fpr=options.target_fpr)
    checkpoint, depth = _open(options)
    fit_model = open_fit_model(checkpoint, device=options.device)
    families = possible_families(system=takes_system(fit_model))
    words = put_in_other_words(prompts, split, families, augment=options.augment, seed=options.seed)
    items = [*prompts, *external, *words.everything]
    everything, reworded = [item.prompt for item in items], len(prompts) + len(external)
    check_text(fit_model, [*everything, *(item.prompt for item in data.refusal_only)])
    with_pictures = sum(bool(item.prompt.images) for item in prompts)
    if fit_model.image_token_id is not None and not with_pictures:
        warn(console, BLIND)
    answer = answer_tokens(fit_model, options.refusal_text)

    files = checkpoint_files(checkpoint)
    with progress(console, "checkpoint files", len(files)) as advance:
        identity = digests(files, advance=advance)
    with prompt_store(features, identity, fit_model) as store:
        with progress(console, "hidden states", len(everything)) as advance:
            states = prompt_states(fit_model, everything, store, advance=advance)
        states_s = time.perf_counter() - started
        table_ = _table(items, split, external=np.arange(len(prompts), reworded), taught=words.taught(split, reworded))
        chosen = _choose(data, prompts, table_, states, words, reworded, options, console)
        gate, p = chosen.gate, chosen.scores
        rewordings = by_family(words.outcomes(p, reworded, gate.threshold))
        console.print(as_text(rewordings), soft_wrap=True, markup=False, highlight=False)
        heldout = [prompts[row] for row in split.heldout]
        proof, proof_images = choose_proof(
            fit_model, heldout, p[split.heldout], gate.threshold, published=options.publish_proof
        )
        with progress(console, "evidence", len(table_.sources) + 2) as advance:
            evidence = gather(table_, chosen.states, chosen.pooling, gate, seed=options.seed, advance=advance)
    with answer_store(features, identity, fit_model, answer) as store:
        head, refusal_facts, strengths, strength = fit_refusal_head(
            *(fit_model, data, prompts, split, words, answer, store, console),
            wanted=options.strength,
            seed=options.seed,
        )
    calibration = gate.facts | evidence.facts() | {PICTURES: float(with_pictures)}
    _warn(console, chosen.layer, calibration, refusal_facts, proof)

    facts = SafetyFacts(
        format_version=FORMAT_VERSION,
        model=checkpoint.name,
        split_layer=chosen.layer,
        token_offset=fit_model.token_offset,
        threshold=gate.threshold,
        strength=strength,
        refusal_text=options.refusal_text,
        layers=chosen.layers,
        calibration=calibration,
        training={
            "seed": float(options.seed),
            "pairs": float(len(data.pairs)),
            "pairs_without_difference": float(chosen.pairs_without_difference),
            "prompts": float(len(prompts)),
            **{f"{part}_prompts": float(len(rows)) for part, rows in vars(split).items()},
            "augmented_prompts": float(len(words.training)),
            **refusal_facts,
            "hidden_states_s": round(states_s, 1),
            "total_s": round(time.perf_counter() - started, 1),
        },
        selected_by="user" if options.layer else options.select,
        pooling=chosen.pooling,
        proof=proof,
    )
    artifact = SafetyArtifact(facts, gate.prober, head)
    artifact.check(Path("the fitted gate"), hidden_size=states.shape[-1], num_hidden_layers=depth)
    return Fitted(artifact, proof_images, evidence, strengths, tuple(rewordings))


def _open(options: FitOptions) -> tuple[Checkpoint, int]:
    """The checkpoint, and how many layers it has. Raises InputError if it cannot be split at --layer."""
    from autosteer.export.checkpoint.decoder_config import decoder_config
    from autosteer.export.checkpoint.hf_model import quiet_transformers
    from autosteer.export.checkpoint.open import open_checkpoint

    quiet_transformers()
    checkpoint = open_checkpoint(options.model)
    depth = decoder_config(checkpoint).num_hidden_layers
    if options.layer is not None and not 0 < options.layer < depth:
        raise InputError(f"--layer {options.layer}: {checkpoint.name} can be split at 1..{depth - 1}")
    return checkpoint, depth


def split_prompts(data: FitData, prompts: list[Labelled], *, seed: int) -> Split:
    """Split such that the two prompts of a pair, equal texts and families stay in one part."""
    row = {item.prompt.identity: i for i, item in enumerate(prompts)}
    return split_by_text(
        [item.cluster for item in prompts],
        [(item.unsafe, item.group) for item in prompts],
        seed=seed,
        together=[(row[pair.unsafe.identity], row[pair.safe.identity]) for pair in data.pairs],
    )


def _choose(
    data: FitData,
    prompts: list[Labelled],
    t: Table,
    states: States,
    words: OtherWords,
    reworded: int,
    options: FitOptions,
    console: Console,
) -> Chosen:
    """Choose layer and position, and calibrate the prober there. `reworded`: the first row in other words."""
    layers, probers, dropped = _score_layers(data, prompts, t, states, options, console)
    layer = options.layer or choose_layer(layers, options.select)
    console.print(_layer_table(layers, layer), soft_wrap=True, markup=False, highlight=False)
    pooled = {name: states.layer(layer - 1)[:, i] for i, name in enumerate(POSITIONS)}
    found = {name: p_unsafe(of[layer - 1], pooled[name]) for name, of in probers.items()}
    pooling = cast(Pooling, words.choose(found, reworded))
    gate = _calibrate(probers[pooling][layer - 1], pooled[pooling], t, options)
    return Chosen(layer, pooling, gate, pooled, p_unsafe(gate.prober, pooled[pooling]), tuple(layers), dropped)


def _score_layers(
    data: FitData, prompts: list[Labelled], t: Table, states: States, options: FitOptions, console: Console
) -> tuple[list[LayerScore], dict[str, list[Prober]], int]:
    """SAS and, by pooling, a prober for every layer; entry 0 is layer 1. The last value counts pairs whose states are
    equal. The accuracy of a layer is its better prober's.
    """
    with progress(console, "SAS", len(data.pairs)) as advance:
        pooled, by_channel, dropped = _sas(data, prompts, states, options.seed, advance)
    used = np.concatenate(list(vars(t.taught).values()))
    weight = np.zeros(len(t.texts))
    weight[used] = row_weights(t.unsafe[used], [t.source_of[row] for row in used])
    probers = {}
    with progress(console, "probers", len(POSITIONS)) as advance:
        for name in [options.pooling] if options.pooling else POSITIONS:
            read = _reader(states, name)
            probers[name] = train_probers(read, t.unsafe, weight, t.taught, seed=options.seed)
            advance(1)
    rows = t.split.validation

    def accuracy(name: str, index: int) -> float:
        p = p_unsafe(probers[name][index], states.layer(index, rows)[:, POSITIONS.index(name)])
        return balanced_accuracy(p, t.unsafe[rows], DEFAULT_THRESHOLD, weight[rows])

    scores = [
        LayerScore(
            layer=index + 1,
            sas=float(pooled.sas[index]),
            sas_low=float(pooled.low[index]),
            sas_high=float(pooled.high[index]),
            prober_accuracy=max(accuracy(name, index) for name in probers),
            sas_by_channel={name: float(values[index]) for name, values in by_channel.items()} or None,
        )
        for index in range(len(pooled.sas))
    ]
    return scores, probers, dropped


def _reader(states: States, pooling: str) -> Callable[[np.ndarray], torch.Tensor]:
    position = POSITIONS.index(pooling)
    return lambda rows: states[rows][:, :, position]


def _sas(
    data: FitData, prompts: list[Labelled], states: States, seed: int, advance: Callable[[int], None]
) -> tuple[SasScores, dict[str, torch.Tensor], int]:
    """SAS of all pairs; SAS of each channel, if there are several; the number of pairs without a direction."""
    row = {item.prompt.identity: i for i, item in enumerate(prompts)}
    members: dict[str, list[int]] = {}
    for i, pair in enumerate(data.pairs):
        members.setdefault(pair.channel, []).append(i)
    whole, last = SasSum(len(data.pairs), seed=seed), POSITIONS.index("last")
    channels = {name: SasSum(len(m), seed=seed, resamples=1) for name, m in sorted(members.items())}
    for name, numbers in members.items():
        for start in range(0, len(numbers), READ_PAIRS):
            some = [data.pairs[i] for i in numbers[start : start + READ_PAIRS]]
            unsafe, safe = [row[p.unsafe.identity] for p in some], [row[p.safe.identity] for p in some]
            deltas = (states[unsafe] - states[safe])[:, :, last]
            whole.add(deltas)
            channels[name].add(deltas)
            advance(len(some))
    several = {name: channel.sas() for name, channel in channels.items() if channel.usable > 1 and len(channels) > 1}
    return whole.scores(), several, len(data.pairs) - whole.usable


def choose_layer(scores: list[LayerScore], select: Literal["sas", "prober"]) -> int:
    """The layer with the highest score; of equal ones the first, where a refused prompt stops soonest."""
    key = {"sas": lambda s: s.sas, "prober": lambda s: s.prober_accuracy}[select]
    return max(scores, key=key).layer


def _table(items: Sequence[Labelled], split: Split, *, external: np.ndarray, taught: Split) -> Table:
    return Table(
        texts=[item.prompt.text for item in items],
        unsafe=_labels(items),
        groups=[item.group for item in items],
        source_of=[item.source for item in items],
        split=split,
        external=external,
        taught=taught,
    )


def _calibrate(prober: Prober, states: torch.Tensor, t: Table, options: FitOptions) -> Gate:
    """Temperature from the validation part; threshold and facts from the held-out part of states (n, d)."""
    validation, heldout = t.split.validation, t.split.heldout
    temperature = fit_temperature(prober_logits(prober, states[validation]), t.unsafe[validation])
    prober = fold_temperature(prober, temperature)
    p, labels = p_unsafe(prober, states[heldout]), t.unsafe[heldout]
    threshold = options.threshold
    if threshold is None:
        assert options.target_fpr is not None
        threshold = choose_threshold(p, labels, target_fpr=options.target_fpr)
    facts = heldout_facts(p, labels, [t.groups[row] for row in heldout], threshold=threshold)
    return Gate(prober, threshold, facts | {"temperature": temperature})


def _labels(prompts: Sequence[Labelled]) -> np.ndarray:
    """(n,) bool: which prompts are unsafe."""
    return np.array([item.unsafe for item in prompts])


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
            "<- split here" if s.layer == chosen else "",
        )
        for s in scores
    ]
    return f"\n{table(header, rows)}\nSAS on all pairs; prober: balanced accuracy on the validation part.\n"


def _warn(
    console: Console,
    layer: int,
    calibration: dict[str, float],
    refusal: dict[str, float],
    proof: Sequence[ProofPrompt],
) -> None:
    """Warn if the gate is too weak to rely on."""
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
    if {prompt.unsafe for prompt in proof} != {True, False}:
        warnings.append(
            "packages with this gate cannot be checked on other machines: no held-out unsafe prompt, or no benign one, "
            "is both classified correctly and allowed to ship (prompts with images need --publish-proof)"
        )
    for warning in warnings:
        warn(console, warning)


def warn(console: Console, warning: str) -> None:
    """Print a warning."""
    console.print(f"warning: {warning}", soft_wrap=True, markup=False, highlight=False)
