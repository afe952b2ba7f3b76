"""Fit a gate: from prompts to the contents of the safety folder.

hidden states of every layer        states.py, store.py       one forward pass per distinct prompt
SAS and a prober at every layer     sas.py, prober.py
choose the layer, calibrate         layers.py, calibrate.py
leave each data set out in turn     evidence.py               compared with the paper's prober and the words alone
train the Refusal Head, try it      refusal_head.py, answers.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from autosteer.export.checkpoint.renderer import frame_digests
from autosteer.export.safety_folder import FORMAT_VERSION, LayerScore, ProofPrompt, SafetyArtifact, SafetyFacts
from autosteer.runtime.errors import InputError
from autosteer.runtime.evaluation.variants import RewordingRates, as_text, by_rewording

from . import DEFAULT_THRESHOLD, DROPOUT_USED, PICTURES
from .arrange import Arranged, arrange, count_pictures, training_weights
from .batches import answer_tokens
from .calibrate import choose_threshold, fit_temperature, fold_temperature, heldout_facts
from .evidence import Evidence, Gate, Table, gather
from .head_fit import fit_refusal_head
from .layers import better_layer, choose_layer, layer_table
from .model import FitModel, open_fit_model
from .prober import balanced_accuracy, p_unsafe, train_on_folds, train_probers
from .progress import progress, warn
from .proof import make_proof
from .refusal_head import StrengthScore
from .sas import SasSum
from .states import (
    POOLINGS,
    Pooling,
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
    from .prober import Prober
    from .store import States

READ_PAIRS = 128  # differences in memory at a time
PROBER_IS_POOR, REFUSAL_IS_POOR = 0.75, 0.5  # warn below: balanced accuracy, share of complete refusals


@dataclass(frozen=True)
class FitOptions:
    """The options of autosteer-fit, without the data."""

    model: str
    layer: int | None  # None: `select` chooses
    select: Literal["sas", "prober"]
    pooling: Pooling | None  # the prober's input: the last token's state (the paper), or the turn's mean; None: choose
    augment: bool  # train on rewordings of the prompts, too
    threshold: float | None  # None: from target_fpr; if that is None, too: DEFAULT_THRESHOLD, or that of the old gate
    target_fpr: float | None
    strength: float | None  # None: train with the paper's, then use the best of STRENGTHS
    dropout: float  # share of the prober's inputs that is left out in training
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
    rewordings: tuple[RewordingRates, ...]  # what the gate makes of held-out prompts, reworded


@dataclass(frozen=True)
class Chosen:
    """What the gate reads, and the calibrated prober that reads it."""

    layer: int
    pooling: Pooling
    gate: Gate
    states: dict[Pooling, torch.Tensor]  # (n, d) of all prompts as they enter that layer, by position
    scores: np.ndarray  # (n,) p_unsafe of all prompts, as wholes
    read: np.ndarray  # (n,) the same as the runtime has it, with pieces
    layers: tuple[LayerScore, ...]  # every layer's, for the report
    pairs_without_difference: int


def fit(data: FitData, external: Sequence[Labelled], options: FitOptions, *, cache: Path, console: Console) -> Fitted:
    """Fit a gate on `data`. `external` prompts are only for the report. `cache`: folder for hidden states."""
    started = time.perf_counter()
    checkpoint, depth, fit_model = open_model(options)
    arranged = arrange(
        *(data, external, fit_model, console),
        augment=options.augment,
        target_fpr=options.target_fpr,
        seed=options.seed,
    )
    prompts, split, reworded = arranged.prompts, arranged.split, arranged.reworded
    everything, with_pictures = [item.prompt for item in arranged.items], count_pictures(prompts)
    answer = answer_tokens(fit_model, options.refusal_text)

    files = checkpoint_files(checkpoint)
    with progress(console, "checkpoint files", len(files)) as advance:
        identity = digests(files, advance=advance)
    with prompt_store(cache, identity, fit_model, fast=True) as store:
        with progress(console, "hidden states", len(everything)) as advance:
            states = prompt_states(fit_model, everything, store, advance=advance)
        pieces = [piece for _, piece, _ in arranged.pieces]
        with progress(console, "hidden states of pieces", len(pieces)) as advance:
            piece_states = prompt_states(fit_model, pieces, store, advance=advance)
        states_s = time.perf_counter() - started
        chosen = _choose(data, arranged, states, piece_states, options, console)
        gate, p = chosen.gate, chosen.scores
        rates = by_rewording(reworded.outcomes(chosen.read, arranged.first_reworded, gate.threshold))
        console.print(as_text(rates), soft_wrap=True, markup=False, highlight=False)
        with progress(console, "evidence", len(arranged.table.sources) + 2) as advance:
            evidence = gather(
                *(arranged.table, chosen.states, chosen.pooling, gate),
                seed=options.seed,
                dropout=options.dropout,
                advance=advance,
            )
    heldout = [prompts[row] for row in split.heldout]
    with prompt_store(cache, identity, fit_model) as store:
        proof, proof_images = make_proof(
            *(fit_model, store, heldout, p[split.heldout], gate, chosen.layer, chosen.pooling),
            published=options.publish_proof,
        )
    with answer_store(cache, identity, fit_model, answer, fast=True) as store:
        head, refusal_facts, strengths, strength = fit_refusal_head(
            *(fit_model, data, prompts, split, reworded, answer, store, console),
            wanted=options.strength,
            seed=options.seed,
        )
    calibration = gate.facts | evidence.facts() | {PICTURES: float(with_pictures)}
    warn_if_weak(console, chosen.layer, calibration, refusal_facts, proof)

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
            DROPOUT_USED: options.dropout,
            "pairs": float(len(data.pairs)),
            "pairs_without_difference": float(chosen.pairs_without_difference),
            "prompts": float(len(prompts)),
            **{f"{part}_prompts": float(len(rows)) for part, rows in split.parts.items()},
            "augmented_prompts": float(len(reworded.training)),
            **refusal_facts,
            "hidden_states_s": round(states_s, 1),
            "total_s": round(time.perf_counter() - started, 1),
        },
        selected_by="user" if options.layer else options.select,
        pooling=chosen.pooling,
        proof=proof,
        frame=frame_digests(fit_model.processor),
    )
    if better := better_layer(facts):
        warn(console, better)
    artifact = SafetyArtifact(facts, gate.prober, head)
    artifact.check(Path("the fitted gate"), hidden_size=states.shape[-1], num_hidden_layers=depth)
    return Fitted(artifact, proof_images, evidence, strengths, tuple(rates))


def open_model(options: FitOptions) -> tuple[Checkpoint, int, FitModel]:
    """The checkpoint, how many layers it has, and its model. Raises InputError if it cannot be split at --layer."""
    from autosteer.export.checkpoint.decoder_config import decoder_config
    from autosteer.export.checkpoint.hf_model import quiet_transformers
    from autosteer.export.checkpoint.open import open_checkpoint

    quiet_transformers()
    checkpoint = open_checkpoint(options.model)
    depth = decoder_config(checkpoint).num_hidden_layers
    if options.layer is not None and not 0 < options.layer < depth:
        raise InputError(f"--layer {options.layer}: {checkpoint.name} can be split at 1..{depth - 1}")
    return checkpoint, depth, open_fit_model(checkpoint, device=options.device)


def _choose(
    data: FitData, arranged: Arranged, states: States, piece_states: States, options: FitOptions, console: Console
) -> Chosen:
    """Choose layer and pooling, and calibrate the prober there.

    Every pooling has its own layer. Of these probers, the one is used that does best on rewordings.
    """
    poolings: Sequence[Pooling] = [options.pooling] if options.pooling else POOLINGS
    scores, dropped = _sas(data, arranged, states, poolings, options.seed, console)
    probers = {}
    with progress(console, "probers", len(poolings)) as advance:
        for name in poolings:
            probers[name] = _probers(arranged.table, states, name, options)
            scores[name] = _with_accuracy(scores[name], probers[name], arranged.table, states, name)
            advance(1)
    layer_of = {name: options.layer or choose_layer(scores[name], options.select) for name in poolings}
    found = {
        name: p_unsafe(probers[name][layer - 1], states.layer(layer - 1)[:, POOLINGS.index(name)])
        for name, layer in layer_of.items()
    }
    pooling: Pooling = arranged.reworded.choose(found, arranged.first_reworded)
    layer, layers = layer_of[pooling], scores[pooling]
    console.print(layer_table(layers, layer), soft_wrap=True, markup=False, highlight=False)
    pooled = {name: states.layer(layer - 1)[:, i] for i, name in enumerate(POOLINGS)}
    of_pieces = piece_states.layer(layer - 1)[:, POOLINGS.index(pooling)]
    gate, p, read = fit_gate(pooled[pooling], of_pieces, arranged, options)
    return Chosen(layer, pooling, gate, pooled, p, read, tuple(layers), dropped)


def _probers(t: Table, states: States, pooling: Pooling, options: FitOptions) -> list[Prober]:
    """A prober that reads `pooling` for every layer; entry 0 is layer 1."""
    position = POOLINGS.index(pooling)
    return train_probers(
        *(lambda rows: states[rows][:, :, position], t.unsafe, training_weights(t), t.taught.rotations[-1:]),
        seed=options.seed,
        dropout=options.dropout,
    )


def _with_accuracy(
    scores: Sequence[LayerScore], probers: Sequence[Prober], t: Table, states: States, pooling: Pooling
) -> list[LayerScore]:
    """`scores` with how well each layer's prober does."""
    rows, weight = t.split.validation, training_weights(t)

    def accuracy(index: int) -> float:
        p = p_unsafe(probers[index], states.layer(index, rows)[:, POOLINGS.index(pooling)])
        return balanced_accuracy(p, t.unsafe[rows], DEFAULT_THRESHOLD, weight[rows])

    return [replace(score, prober_accuracy=accuracy(index)) for index, score in enumerate(scores)]


def _sas(
    data: FitData,
    arranged: Arranged,
    states: States,
    poolings: Sequence[Pooling],
    seed: int,
    console: Console,
) -> tuple[dict[Pooling, list[LayerScore]], int]:
    """SAS of every layer by pooling, over the pairs of which nothing is held out and over those of each channel, if
    there are several; and the number of pairs whose states are equal. (Measured on prompts that had helped to choose
    the layer, a gate looks better than it is: 0.59 balanced accuracy on noise, with 40 pairs and 16 layers.)
    """
    row = {item.prompt.identity: i for i, item in enumerate(arranged.prompts)}
    heldout = {arranged.prompts[i].prompt.identity for i in arranged.split.heldout.tolist()}
    members: dict[str, list[int]] = {}
    for i, pair in enumerate(data.pairs):
        if not {pair.unsafe.identity, pair.safe.identity} & heldout:
            members.setdefault(pair.channel, []).append(i)
    count = sum(map(len, members.values()))
    whole = {name: SasSum(count, seed=seed) for name in poolings}
    channels = {
        name: {channel: SasSum(len(m), seed=seed, resamples=1) for channel, m in sorted(members.items())}
        for name in poolings
    }
    with progress(console, "SAS", count) as advance:
        for channel, numbers in members.items():
            for start in range(0, len(numbers), READ_PAIRS):
                some = [data.pairs[i] for i in numbers[start : start + READ_PAIRS]]
                unsafe, safe = [row[p.unsafe.identity] for p in some], [row[p.safe.identity] for p in some]
                deltas = states[unsafe] - states[safe]
                for name in poolings:
                    of_pooling = deltas[:, :, POOLINGS.index(name)]
                    whole[name].add(of_pooling)
                    channels[name][channel].add(of_pooling)
                advance(len(some))
    scores = {name: _layer_scores(whole[name], channels[name]) for name in poolings}
    return scores, count - min(sas.usable for sas in whole.values())


def _layer_scores(whole: SasSum, channels: dict[str, SasSum]) -> list[LayerScore]:
    pooled = whole.scores()
    several = {name: sas.sas() for name, sas in channels.items() if sas.usable > 1 and len(channels) > 1}
    return [
        LayerScore(
            layer=index + 1,
            sas=float(pooled.sas[index]),
            sas_low=float(pooled.low[index]),
            sas_high=float(pooled.high[index]),
            sas_by_channel={name: float(values[index]) for name, values in several.items()} or None,
        )
        for index in range(len(pooled.sas))
    ]


def fit_gate(
    states: torch.Tensor, piece_states: torch.Tensor, arranged: Arranged, options: FitOptions
) -> tuple[Gate, np.ndarray, np.ndarray]:
    """The gate, and its p_unsafe of states (n, d) of all prompts: as wholes, and as the runtime reads them, with
    piece_states (m, d) of `arranged.pieces`; both (n,).

    The temperature is from the prompts that are not held out, each by the members that have not trained on it;
    threshold and facts are from the held-out fold, as it is read.
    """
    t = arranged.table
    used, heldout = t.split.used, t.split.heldout
    prober, logits = train_on_folds(
        *(states, t.unsafe, t.taught), seed=options.seed, weight=training_weights(t), dropout=options.dropout
    )
    temperature = fit_temperature(logits[used], t.unsafe[used])
    prober = fold_temperature(prober, temperature)
    p = p_unsafe(prober, states)
    read = arranged.as_read(p, p_unsafe(prober, piece_states))
    scores, labels, clusters = read[heldout], t.unsafe[heldout], [t.clusters[row] for row in heldout]
    threshold = DEFAULT_THRESHOLD if options.threshold is None else options.threshold
    if options.threshold is None and options.target_fpr is not None:
        threshold = choose_threshold(scores, labels, clusters, target_fpr=options.target_fpr)
    facts = heldout_facts(scores, labels, [t.groups[row] for row in heldout], clusters, threshold=threshold)
    return Gate(prober, threshold, facts | {"temperature": temperature}), p, read


def warn_if_weak(
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
    if refusal.get("refusal_whole", 1.0) < REFUSAL_IS_POOR:  # of the authors' Refusal Head nothing is known
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
