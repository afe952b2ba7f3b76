"""Compute hidden states of prompts, on which SAS, prober and Refusal Head are fitted.

    prompt_states   prompt without generation prompt          ->  residual entering each layer k = 1..N-1, at POOLINGS
    answer_states   prompt + generation prompt + the refusal  ->  final-norm output before each of its tokens

"Entering layer k" is Hugging Face's hidden_states[k]. [0] depends on the token alone, and [N] comes after the final
norm, where no package can be split; both are left out. Both functions keep their states in a store, sweep by sweep.

A fit keeps thousands of prompts in a `fast` store (model.fast_products), which moves a state by 0.4 % (design-notes.md,
"Time of a fit"). A score that others compare theirs with needs float32, the default.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from autosteer.runtime.errors import PackageError

from .batches import Batch, about_tokens, batches, sweep_groups, waiting_bytes
from .model import FitModel, common_opening, fast_products, forward
from .pairs import Prompt
from .store import States, StateStore, digest, file_digest

if TYPE_CHECKING:
    from autosteer.export.checkpoint.open import Checkpoint

Pooling = Literal["last", "mean"]  # what a prober reads: see `prompt_states`
POOLINGS: tuple[Pooling, ...] = ("last", "mean")

Advance = Callable[[float], None]  # told how many more prompts are done; a long one counts for several short ones
Compute = Callable[[Batch, Callable[[], None]], torch.Tensor]  # a batch -> its records; calls back at each layer


def checkpoint_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that hidden states depend on."""
    kinds = {".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"}
    return sorted(f for f in checkpoint.folder.iterdir() if f.suffix in kinds)


def digests(files: Sequence[Path], *, advance: Advance = lambda done: None) -> list[bytes]:
    """Names and digests of `files`, which are read."""
    parts = []
    for file in files:
        parts += [file.name.encode(), file_digest(file)]
        advance(1)
    return parts


def _versions() -> list[str]:
    """Of what decides how a prompt becomes states: pixels, tokens, products."""
    return [f"{name} {version(name)}" for name in ("autosteer-edge", "torch", "transformers", "pillow")]


def prompt_store(folder: Path, model: Sequence[bytes], fit_model: FitModel, *, fast: bool = False) -> StateStore:
    """The store in `folder` for prompt states, records (N-1, P, d). `model`: `digests` of its files. `fast`: computed
    with fast products.
    """
    shape = (len(fit_model.layers) - 1, len(POOLINGS), fit_model.decoder.hidden_size)
    positions = (fit_model.token_offset, fit_model.text_lead, fit_model.closing)
    what = repr((POOLINGS, positions, fast, _versions())).encode()
    return StateStore(folder, digest(what, *model), shape, fast=fast)


def answer_store(
    folder: Path, model: Sequence[bytes], fit_model: FitModel, answer: torch.Tensor, *, fast: bool = False
) -> StateStore:
    """As `prompt_store`, for answer states, records (1, T, d)."""
    what = repr(("answer", answer.tolist(), fast, _versions())).encode()
    shape = (1, len(answer), fit_model.decoder.hidden_size)
    return StateStore(folder, digest(what, *model), shape, fast=fast)


def prompt_keys(prompts: Sequence[Prompt]) -> list[bytes]:
    """A digest of each prompt's content: its text and its images' files."""
    seen: dict[Path, bytes] = {}
    for path in {path for prompt in prompts for path in prompt.images}:
        seen[path] = file_digest(path)
    return [
        digest(
            prompt.text.encode(),
            *(seen[path] for path in prompt.images),
            *([repr((prompt.earlier, prompt.system)).encode()] if prompt.earlier or prompt.system else []),
        )
        for prompt in prompts
    ]


def prompt_states(
    fit_model: FitModel, prompts: Sequence[Prompt], store: StateStore, *, advance: Advance = lambda done: None
) -> States:
    """n records (N-1, P, d): [:, k-1, p] is the residual entering layer k at POOLINGS[p]. Only records that `store`
    lacks are computed.

    "last" is the last prompt token (FitModel.token_offset); "mean" the mean over the text tokens of the user's turn up
    to that one, images and what precedes the turn left out. Raises InputError for an image that cannot be read,
    PackageError naming the layer where a state is not finite.
    """

    def compute(batch: Batch, passed: Callable[[], None]) -> torch.Tensor:
        taps, read = torch.empty(len(batch.rows), *store.shape), _tap(fit_model, batch)

        def keep(k: int, hidden: torch.Tensor) -> None:
            if k > 0:
                taps[:, k - 1] = read(hidden).float().cpu()
                finite = torch.isfinite(taps[:, k - 1]).flatten(1).all(dim=1)
                if not finite.all():
                    row = batch.rows[int((~finite).nonzero()[0])]
                    raise PackageError(
                        f"hidden_states[{k}] is NaN or infinite for the prompt at {prompts[row].where or row}: the "
                        "checkpoint's weights are damaged or overflow"
                    )
            passed()

        forward(fit_model, batch.inputs, watch=keep)
        return taps

    return _complete(fit_model, prompts, store, compute, generation=False, advance=advance)


def answer_states(
    fit_model: FitModel,
    prompts: Sequence[Prompt],
    answer: torch.Tensor,
    store: StateStore,
    *,
    advance: Advance = lambda done: None,
) -> States:
    """n records (1, T, d): the LM head's input before each of the T answer tokens, teacher-forced. answer (T,) ids.
    Only records that `store` lacks are computed. Raises PackageError if a state is not finite.
    """
    length = len(answer)

    def compute(batch: Batch, passed: Callable[[], None]) -> torch.Tensor:
        ids = torch.cat([batch.inputs["input_ids"], answer[:-1].expand(len(batch.rows), -1)], dim=1)
        places = batch.lengths[:, None] + torch.arange(-1, length - 1)  # (B, T): the token before each of the answer's
        ids.scatter_(1, places[:, 1:], answer[:-1].expand(len(batch.rows), -1))  # over the padding of shorter prompts
        hidden = forward(fit_model, batch.inputs | {"input_ids": ids}, watch=lambda k, hidden: passed()).float().cpu()
        places = (places - common_opening(fit_model, batch.inputs))[..., None].expand(-1, -1, hidden.shape[-1])
        states = hidden.gather(1, places)
        if not torch.isfinite(states).all():
            raise PackageError(
                "the final hidden states are NaN or infinite: the checkpoint's weights are damaged or overflow"
            )
        return states[:, None]

    return _complete(fit_model, prompts, store, compute, generation=True, advance=advance)


def _complete(
    fit_model: FitModel,
    prompts: Sequence[Prompt],
    store: StateStore,
    compute: Compute,
    *,
    generation: bool,
    advance: Advance,
) -> States:
    """Add the records that `store` lacks. Batches that share a sweep are stored when all of them are done."""
    keys = prompt_keys(prompts)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    wanted = [row for key, row in first.items() if key not in store]
    advance(len(prompts) - len(wanted))
    if not wanted:
        return store.view(keys)
    lengths = dict(
        zip(wanted, about_tokens(fit_model, [prompts[row] for row in wanted], generation=generation), strict=True)
    )
    share = len(wanted) / sum(lengths.values()) / len(fit_model.layers)
    fit_model.read_opening()

    def job(batch: Batch) -> torch.Tensor:
        done = share * sum(lengths[row] for row in batch.rows)
        return compute(batch, lambda: advance(done))

    ready = batches(fit_model, prompts, wanted, generation=generation)
    record = 4 * math.prod(store.shape)
    for group in sweep_groups(ready, lambda batch: waiting_bytes(fit_model, batch.inputs) + len(batch.rows) * record):
        with fast_products() if store.fast else nullcontext():
            found = fit_model.sweep.run([functools.partial(job, batch) for batch in group])
        for batch, records in zip(group, found, strict=True):
            store.append([keys[row] for row in batch.rows], records)
    return store.view(keys)


def read_positions(fit_model: FitModel, batch: Batch) -> torch.Tensor:
    """(B, S) bool: the text positions of each prompt's last user turn, through the token at token_offset."""
    place = torch.arange(batch.inputs["input_ids"].shape[1])
    inside = (place >= batch.starts[:, None]) & (place <= batch.lengths[:, None] + fit_model.token_offset)
    if fit_model.image_token_id is not None:
        inside &= batch.inputs["input_ids"] != fit_model.image_token_id
    return inside


def _tap(fit_model: FitModel, batch: Batch) -> Callable[[torch.Tensor], torch.Tensor]:
    """(B, S - O, d) -> (B, P, d): the states at POOLINGS."""
    device, skipped = fit_model.device, common_opening(fit_model, batch.inputs)
    ids, pooled = batch.inputs["input_ids"], read_positions(fit_model, batch)
    last = batch.lengths + fit_model.token_offset
    share = (pooled / pooled.sum(dim=1, keepdim=True))[:, skipped:].to(device)
    each, last = torch.arange(len(ids), device=device), (last - skipped).to(device)
    return lambda hidden: torch.stack([hidden[each, last], (share[:, None] @ hidden)[:, 0]], dim=1)
