"""All hidden states that a gate may read of a prompt: one row for each text position of its last user turn.

states.py keeps what fits every layer; these are of the one layer at which the model will be split. What the prober
makes of them is poolings.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from autosteer.runtime.errors import PackageError

from .batches import Batch, about_tokens, batches, sweep_groups, waiting_bytes
from .model import FitModel, common_opening, forward, only_through
from .states import TOKEN_OFFSET, Advance, prompt_keys, read_positions
from .store import FeatureStore, digest

if TYPE_CHECKING:
    from .pairs import Prompt
    from .store import States


class TurnRows:
    """Rows of n prompts, on disk; prompt i has lengths[i] of them, in the order of their positions."""

    def __init__(self, states: States, lengths: Sequence[int]):
        self._states, self.lengths = states, np.array(lengths)
        self._first = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, prompts: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows (b, n, d) float32, zero where a prompt has fewer than n; which are real, (b, n) bool)."""
        chosen = np.asarray(prompts, dtype=np.int64)
        lengths = self.lengths[chosen]
        real = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
        at = np.concatenate([np.arange(self._first[i], self._first[i + 1]) for i in chosen])
        rows = torch.zeros(*real.shape, self._states.shape[-1])
        rows[real] = self._states[at][:, 0, 0]
        return rows, real


def rows_store(folder: Path, model: Sequence[bytes], fit_model: FitModel, layer: int) -> FeatureStore:
    """The store in `folder` for the rows entering `layer`, a record (1, 1, d) each. `model`: `digests` of its files."""
    what = repr(("rows", layer, TOKEN_OFFSET)).encode()
    return FeatureStore(folder, digest(what, *model), (1, 1, fit_model.decoder.hidden_size))


def turn_rows(
    fit_model: FitModel,
    prompts: Sequence[Prompt],
    layer: int,
    store: FeatureStore,
    *,
    advance: Advance = lambda done: None,
) -> TurnRows:
    """The rows of each prompt as they enter `layer`. Only those that `store` lacks are computed; layers above do not
    run.

    Raises InputError for an image that cannot be read, PackageError where a row is not finite.
    """
    keys = prompt_keys(prompts)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    wanted = [row for key, row in first.items() if _row_key(key, 0) not in store]
    advance(len(prompts) - len(wanted))
    if wanted:
        with only_through(fit_model, layer):
            _compute(fit_model, prompts, wanted, keys, layer, store, advance)
    found: list[bytes] = []
    lengths = []
    for key in keys:
        before = len(found)
        while (row := _row_key(key, len(found) - before)) in store:
            found.append(row)
        lengths.append(len(found) - before)
    return TurnRows(store.view(found), lengths)


def _row_key(prompt: bytes, number: int) -> bytes:
    return digest(prompt, number.to_bytes(4, "little"))


def _compute(
    fit_model: FitModel,
    prompts: Sequence[Prompt],
    wanted: Sequence[int],
    keys: Sequence[bytes],
    layer: int,
    store: FeatureStore,
    advance: Advance,
) -> None:
    """Store the rows of the prompts `wanted`: of each the first one last, so that it says that all are there."""
    about_tokens(fit_model, [prompts[row] for row in wanted], generation=False)  # refuses prompts that are too long

    def job(batch: Batch) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        skipped, inside = common_opening(fit_model, batch.inputs), read_positions(fit_model, batch)

        def keep(k: int, hidden: torch.Tensor) -> None:
            if k == layer:
                kept.extend(hidden[i, inside[i, skipped:]].float().cpu() for i in range(len(batch.rows)))

        forward(fit_model, batch.inputs, watch=keep)
        advance(len(batch.rows))
        return kept

    record = 4 * fit_model.decoder.hidden_size
    ready = batches(fit_model, prompts, wanted, generation=False)

    def size(batch: Batch) -> int:
        return waiting_bytes(fit_model, batch.inputs) + record * batch.inputs["input_ids"].numel()

    for group in sweep_groups(ready, size):
        jobs: list[Callable[[], list[torch.Tensor]]] = [lambda batch=batch: job(batch) for batch in group]  # type: ignore[misc]
        for batch, found in zip(group, fit_model.sweep.run(jobs), strict=True):
            for row, rows in zip(batch.rows, found, strict=True):
                if not torch.isfinite(rows).all() or not len(rows):
                    raise PackageError(
                        f"the hidden states entering layer {layer} are NaN or infinite for the prompt at "
                        f"{prompts[row].where or row}: the checkpoint's weights are damaged or overflow"
                    )
            flat = [(row, i, rows[i]) for row, rows in zip(batch.rows, found, strict=True) for i in range(len(rows))]
            flat.reverse()
            names = [_row_key(keys[row], i) for row, i, _ in flat]
            store.append(names, torch.stack([one for _, _, one in flat])[:, None, None])
