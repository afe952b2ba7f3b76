"""Fit the prober again on what a package computes: autosteer-fit --package.

Rounding to 8 or 4 bits, and fewer tiles of a picture, move the hidden states that the prober reads. What tells unsafe
from benign is still in them, but a prober that was fitted on the float32 model stands askew. Here the package's own
lower half computes the states; prober, temperature and threshold are fitted on these. The layer, the positions that the
prober reads, and the Refusal Head stay those of the safety folder with which the package was exported.

Only prompts of the proof run through the PyTorch model: an export compares its scores with that model's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime import Engine, Manifest, Message, Mode
from autosteer.runtime.console import table
from autosteer.runtime.errors import InputError
from autosteer.runtime.evaluation.datasets import Row
from autosteer.runtime.evaluation.variants import as_text, by_rewording
from autosteer.runtime.manifest import MANIFEST_FILE, sha256
from autosteer.runtime.self_test import PROBER_LIMIT, proof_states
from autosteer.runtime.stats import Stats

from . import DROPOUT, DROPOUT_USED, PICTURES
from .arrange import arrange, count_pictures
from .calibrate import heldout_facts
from .evidence import gather
from .fit import FitOptions, Fitted, fit_gate, open_model, warn_if_weak
from .pairs import Prompt
from .prober import p_unsafe
from .progress import progress
from .proof import make_proof
from .states import checkpoint_files, digests, prompt_keys, prompt_store
from .store import StateStore, digest

if TYPE_CHECKING:
    from rich.console import Console

    from autosteer.runtime.evaluation.shards import Asking

    from .pairs import FitData, Labelled
    from .states import Advance

AT_ONCE = 32  # prompts whose states are written to the disk together


@dataclass(frozen=True)
class Shipped:
    """A package, and the safety folder with which it was exported."""

    package: Path
    safety: Path
    max_tiles: int | None = None  # of a picture, as the package will be run


def refit(
    data: FitData,
    external: Sequence[Labelled],
    options: FitOptions,
    shipped: Shipped,
    asking: Asking,
    *,
    cache: Path,
    console: Console,
) -> Fitted:
    """Fit a prober on the states of `shipped`. `external` prompts are only for the report. `asking`: how engines of the
    package are asked, here or on a cluster. `cache`: folder for states.

    Raises InputError if the safety folder is not the package's, PackageError if one of the two is damaged.
    """
    started = time.perf_counter()
    checkpoint, depth, fit_model = open_model(options)
    width = fit_model.decoder.hidden_size
    old = SafetyArtifact.load(shipped.safety, hidden_size=width, num_hidden_layers=depth)
    manifest = Manifest.load(shipped.package)
    check_belongs(manifest, old, shipped, checkpoint.name)
    arranged = arrange(
        *(data, external, fit_model, console),
        augment=options.augment,
        target_fpr=options.target_fpr,
        seed=options.seed,
        package=manifest.dims.context_length - 1,  # one token is the answer's
    )
    t, heldout = arranged.table, arranged.split.heldout
    what = digest(sha256(shipped.package / MANIFEST_FILE).encode(), repr(shipped.max_tiles).encode())
    with StateStore(cache, what, (1, 1, width)) as store:
        prompts = [*(item.prompt for item in arranged.items), *(piece for _, piece, _ in arranged.pieces)]
        with progress(console, "hidden states", len(prompts)) as advance:
            found = _package_states(asking, prompts, store, advance)
        states, piece_states = found[: len(arranged.items)], found[len(arranged.items) :]
        states_s = time.perf_counter() - started
    options = replace(options, dropout=old.facts.training.get(DROPOUT_USED, DROPOUT))
    if options.threshold is None and options.target_fpr is None:
        options = replace(options, threshold=old.facts.threshold)
    gate, p, read = fit_gate(states, piece_states, arranged, options)
    before = heldout_facts(
        arranged.as_read(p_unsafe(old.prober, states), p_unsafe(old.prober, piece_states))[heldout],
        t.unsafe[heldout],
        [t.groups[row] for row in heldout],
        [t.clusters[row] for row in heldout],
        threshold=old.facts.threshold,
    )
    thresholds = (old.facts.threshold, gate.threshold)
    console.print(_compared(before, gate.facts, thresholds), soft_wrap=True, markup=False, highlight=False)
    rates = by_rewording(arranged.reworded.outcomes(read, arranged.first_reworded, gate.threshold))
    console.print(as_text(rates), soft_wrap=True, markup=False, highlight=False)
    with progress(console, "evidence", len(t.sources) + 2) as advance:
        evidence = gather(
            *(t, {old.facts.pooling: states}, old.facts.pooling, gate),
            seed=options.seed,
            dropout=options.dropout,
            advance=advance,
        )
    shown = [arranged.prompts[row] for row in heldout]
    with prompt_store(cache, digests(checkpoint_files(checkpoint)), fit_model) as store:
        proof, proof_images = make_proof(
            *(fit_model, store, shown, p[heldout], gate, old.facts.split_layer, old.facts.pooling),
            published=options.publish_proof,
        )
    calibration = gate.facts | evidence.facts() | {PICTURES: float(count_pictures(arranged.prompts))}
    training = old.facts.training | {
        "seed": float(options.seed),
        "pairs": float(len(data.pairs)),
        "prompts": float(len(arranged.prompts)),
        **{f"{part}_prompts": float(len(rows)) for part, rows in arranged.split.parts.items()},
        "augmented_prompts": float(len(arranged.reworded.training)),
        "hidden_states_s": round(states_s, 1),
        "total_s": round(time.perf_counter() - started, 1),
    }
    warn_if_weak(console, old.facts.split_layer, calibration, training, proof)
    facts = replace(
        old.facts,
        threshold=gate.threshold,
        calibration=calibration,
        training=training,
        proof=proof,
        monitor=old.facts.monitor and old.facts.monitor.beside_another_gate(),
    )
    artifact = SafetyArtifact(facts, gate.prober, old.steer_matrix, monitor=old.monitor)
    artifact = artifact.judging_above(facts.judge_threshold)  # at most the new threshold
    return Fitted(artifact, proof_images, evidence, (), tuple(rates))


def check_belongs(manifest: Manifest, old: SafetyArtifact, shipped: Shipped, model: str) -> None:
    """Raise InputError unless the package was exported from `model` with the safety folder: its prober gives the states
    of the package's proof the scores that they had at export.
    """
    facts, prober = old.facts, manifest.prober
    if prober is None:
        raise InputError(f"{shipped.package}: exported with --unguarded, so it has no prober to fit again")
    ours = (manifest.source.repo, manifest.split_layer, prober.pooling)
    theirs = (model, facts.split_layer, facts.pooling)
    if ours != theirs or facts.model != model:
        raise InputError(
            f"{shipped.safety} is of {facts.model} at layer {facts.split_layer} ({facts.pooling}), --model is {model}, "
            f"{shipped.package} of {ours[0]} at layer {ours[1]} ({ours[2]}): give the safety folder and the model that "
            "the package was exported from"
        )
    if manifest.proof:
        states, _, _ = proof_states(shipped.package, manifest, manifest.proof)
        scores = p_unsafe(old.prober, torch.from_numpy(states))
        if not np.abs(scores - manifest.proof.p_unsafe).max(initial=0.0) <= PROBER_LIMIT:
            raise InputError(
                f"{shipped.safety} has another prober than {shipped.package}: give the safety folder that the package "
                "was exported with"
            )


def _package_states(asking: Asking, prompts: Sequence[Prompt], store: StateStore, advance: Advance) -> torch.Tensor:
    """(n, d): what the package's prober reads of each prompt's last turn. Only what `store` lacks is computed.

    Raises InputError naming a prompt that the package refuses, or whose state is not finite.
    """
    keys = prompt_keys(prompts)
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in store}
    advance(len(prompts) - len(missing))
    if not missing:
        return store.view(keys).layer(0)[:, 0]
    with asking(package_state, [_as_row(prompt) for prompt in missing.values()]) as found:
        new = list(missing)
        for first in range(0, len(new), AT_ONCE):
            some, states = new[first : first + AT_ONCE], []
            for state in islice(found, len(some)):
                states.append(state)
                advance(1)
            store.append(some, torch.from_numpy(np.stack(states))[:, None])
    return store.view(keys).layer(0)[:, 0]


def package_state(engine: Engine, row: Row) -> np.ndarray:
    """(1, d) float32: as `_package_states`, of one prompt."""
    try:
        stats = Stats()
        request = engine.request(engine.encoder.prepare(row.messages, stats), 1, stats)
        request.prefill_lower(engine.policy(Mode.OFF))
        state = request.probed_mean()
    except (InputError, IndexError) as err:
        raise InputError(f"{row.where}: {err}") from err
    if not np.isfinite(state).all():
        raise InputError(f"{row.where}: the package's hidden state is NaN or infinite")
    return state


def _as_row(prompt: Prompt) -> Row:
    """The prompt as the runtime asks it."""
    return Row(tuple(as_messages(prompt)), unsafe=False, group="", gold=None, where=prompt.where)


def as_messages(prompt: Prompt) -> list[Message]:
    """The prompt as a dialogue for the runtime; pictures are shown in the first turn."""
    asked = (*prompt.earlier, prompt.text)
    turns = [
        Message.user(text) if i % 2 == 0 else Message.assistant(text, trusted=True) for i, text in enumerate(asked)
    ]
    turns[0] = Message.user(asked[0], prompt.images)
    return [*([Message.system(prompt.system, trusted=True)] if prompt.system else []), *turns]


def _compared(before: dict[str, float], after: dict[str, float], thresholds: tuple[float, float]) -> str:
    names = ("heldout_accuracy", "heldout_recall", "heldout_fpr", "ece")
    rows = [
        (title, f"{threshold:.3g}", *(f"{facts[name]:.3f}" for name in names))
        for title, facts, threshold in zip(("as it was", "fitted again"), (before, after), thresholds, strict=True)
    ]
    header = ("prober", "threshold", "balanced accuracy", "caught", "wrongly flagged", "calibration error")
    return f"\n{table(header, rows)}\nOn this package's hidden states of held-out prompts.\n"
