"""Where rows stand, and the tables made of that."""

from __future__ import annotations

import numpy as np
import pytest

from autosteer.runtime.manifest import RotarySpec
from autosteer.runtime.rotary import BLOCK, PositionCounter, RotaryTables, tables
from autosteer.runtime.subgraph import find_device

PLAIN = RotarySpec((1.0, 0.1, 0.01), 1.5, ())
GRIDS = RotarySpec((1.0, 0.1, 0.01), 1.5, (0, 1, 2))
CPU = find_device("cpu", 1)[0]


def counted(spec: RotarySpec) -> PositionCounter:
    """Two words, a picture of 2 x 3, a word, a picture without a grid, a picture of 4 x 1."""
    counter = PositionCounter(spec)
    counter.text(2)
    counter.picture(6, (2, 3))
    counter.text(1)
    counter.picture(2, None)
    counter.picture(4, (4, 1))
    return counter


def test_text_counts_on_behind_a_pictures_longer_side() -> None:
    time, row, column = counted(GRIDS).positions().tolist()
    assert time == [0, 1, *[2] * 6, 5, 6, 7, *[8] * 4]
    assert row == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9, 10, 11]
    assert column == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8]


def test_a_model_without_axes_counts_every_row() -> None:
    assert (counted(PLAIN).positions() == np.arange(15)).all()


@pytest.mark.parametrize("spec", [PLAIN, GRIDS])
@pytest.mark.parametrize("steps", [[1] * 300, [15, 16, 17, 300], [300]])
def test_rows_come_as_they_are_needed_and_an_answers_go_on_behind_the_largest_position(
    spec: RotarySpec, steps: list[int]
) -> None:
    prompt = counted(spec).positions()
    after = np.arange(300 - 15) + (12 if spec.axes else 15)
    whole = tables(spec, np.concatenate([prompt, np.stack([after] * 3)], axis=1))
    made = RotaryTables(spec, prompt, 300, "float32", CPU)
    total = 0
    for step in steps:
        total = step if len(steps) < 300 else total + step
        made.extend(total)
        for name, expected in zip(("cos_cache", "sin_cache"), whole, strict=True):
            np.testing.assert_array_equal(made.inputs[name].numpy()[:total], expected[:total])
    assert made.inputs["cos_cache"].shape() == [300, 3]


def test_few_rows_more_than_are_needed_are_computed_and_none_before_the_first() -> None:
    made = RotaryTables(PLAIN, np.stack([np.arange(4)] * 3), 1000, "float32", CPU, first=2)
    made.extend(3)
    filled = made.inputs["cos_cache"].numpy().any(axis=1)
    assert filled.tolist() == [False] * 2 + [True] * BLOCK + [False] * (998 - BLOCK)


def test_each_frequency_reads_its_axis() -> None:
    cos, sin = tables(GRIDS, np.array([[3], [5], [7]]))
    np.testing.assert_allclose(cos, 1.5 * np.cos([[3.0, 0.5, 0.07]]), rtol=1e-6)
    np.testing.assert_allclose(sin, 1.5 * np.sin([[3.0, 0.5, 0.07]]), rtol=1e-6)
