"""Arrange the prompts of a fit: split them, reword some, and lay them out in one order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from autosteer.runtime.evaluation.variants import possible_rewordings
from autosteer.runtime.pieces import discounted

from .batches import check_lengths, check_text, takes_system
from .calibrate import allowed_false_positives, independent
from .evidence import Table
from .prober import row_weights, split_by_text
from .progress import warn
from .reworded import Reworded, reword_prompts

if TYPE_CHECKING:
    from rich.console import Console

    from .model import FitModel
    from .pairs import FitData, Labelled, Prompt
    from .prober import Split

BLIND = (
    "NO PICTURE IS AMONG THE FIT'S PROMPTS, and this model takes pictures: nothing is known about what this gate does "
    "with a picture, and it will most likely let harm in pictures through; give pairs with images (--images)"
)


@dataclass(frozen=True)
class Arranged:
    """Every prompt of a fit, in one order: its own, external ones, rewordings of its own."""

    prompts: list[Labelled]  # the fit's own
    split: Split  # of these
    reworded: Reworded
    items: list[Labelled]  # all
    first_reworded: int  # row of the first rewording
    table: Table

    @cached_property
    def pieces(self) -> list[tuple[int, Prompt, bool]]:
        """What the runtime also reads of held-out prompts and of their rewordings (`Prompt.pieces`): (row of the item,
        what is read, whether its score is discounted).
        """
        judged = range(len(self.items) - len(self.reworded.judging), len(self.items))
        return [
            (row, *piece) for row in (*self.split.heldout.tolist(), *judged) for piece in self.items[row].prompt.pieces
        ]

    def as_read(self, p: np.ndarray, of_pieces: np.ndarray) -> np.ndarray:
        """(n,) p_unsafe as the runtime has it: the worst of the whole's p (n,) and of its `pieces`' (m,), which are
        discounted.
        """
        read: np.ndarray = p.copy()
        for (row, _, is_discounted), of_piece in zip(self.pieces, of_pieces.tolist(), strict=True):
            read[row] = max(read[row], discounted(of_piece) if is_discounted else of_piece)
        return read


def arrange(
    data: FitData,
    external: Sequence[Labelled],
    fit_model: FitModel,
    console: Console,
    *,
    augment: bool,
    target_fpr: float | None,
    seed: int,
    package: int | None = None,
) -> Arranged:
    """Split the fit's prompts, reword some of them, and check that all of them can be used. `package`: the most tokens
    that the package takes which computes the states; None: the model does.

    Raises InputError for a text that holds a special token, a prompt that the runtime would refuse, one that is too
    long, or too few prompts to show --target-fpr. Warns if the model takes pictures, and no prompt has one.
    """
    prompts = data.labelled()
    split, clusters = split_prompts(data, prompts, seed=seed), clusters_of(prompts)
    if target_fpr is not None:
        benign = [clusters[row] for row in split.heldout if not prompts[row].unsafe]
        allowed_false_positives(independent(benign), target_fpr=target_fpr)
    rewordings = possible_rewordings(system=takes_system(fit_model))
    reworded = reword_prompts(prompts, split, rewordings, augment=augment, seed=seed)
    items, first_reworded = [*prompts, *external, *reworded.everything], len(prompts) + len(external)
    check_text(fit_model, [item.prompt for item in (*items, *data.refusal_only)])
    if fit_model.image_token_id is not None and not count_pictures(prompts):
        warn(console, BLIND)
    table = Table(
        texts=[item.prompt.text for item in items],
        unsafe=np.array([item.unsafe for item in items]),
        groups=[item.group for item in items],
        source_of=[item.source for item in items],
        split=split,
        clusters=[
            *clusters,
            *(item.cluster for item in external),
            *(clusters[one.of] for one in (*reworded.training, *reworded.choosing, *reworded.judging)),
        ],
        external=np.arange(len(prompts), first_reworded),
        taught=reworded.taught(split, first_reworded),
    )
    arranged = Arranged(prompts, split, reworded, items, first_reworded, table)
    pieces = [piece for _, piece, _ in arranged.pieces]  # made now: a prompt that the runtime refuses is named
    read = [*(item.prompt for item in items), *pieces]
    check_lengths(fit_model, read, generation=package is not None, package=package)
    if package is None:
        asked = [item.prompt for item in (*prompts, *data.refusal_only) if item.unsafe]
        check_lengths(fit_model, asked, generation=True)
    return arranged


def count_pictures(prompts: Sequence[Labelled]) -> int:
    """How many of the prompts have pictures."""
    return sum(bool(item.prompt.images) for item in prompts)


def split_prompts(data: FitData, prompts: list[Labelled], *, seed: int) -> Split:
    """Split such that the two prompts of a pair, equal texts and families stay in one fold."""
    row = {item.prompt.identity: i for i, item in enumerate(prompts)}
    return split_by_text(
        clusters_of(prompts),
        [(item.unsafe, item.group) for item in prompts],
        seed=seed,
        together=[(row[pair.unsafe.identity], row[pair.safe.identity]) for pair in data.pairs],
    )


def clusters_of(prompts: Sequence[Labelled]) -> list[str]:
    """What each prompt shares with those that stay on its side of a split: its family and its words. Families with a
    prompt in the same words are one.
    """
    joined: dict[str, str] = {}

    def first(name: str) -> str:
        while name != joined.setdefault(name, name):
            name = joined[name]
        return name

    for item in prompts:
        joined[first(item.prompt.words_key)] = first(item.cluster)
    return [first(item.cluster) for item in prompts]


def training_weights(t: Table) -> np.ndarray:
    """(n,) weights of all prompts: 0 for those that nothing is trained on."""
    used = np.concatenate(t.taught.folds)
    weight = np.zeros(len(t.texts))
    weight[used] = row_weights(t.unsafe[used], [t.source_of[row] for row in used])
    return weight
