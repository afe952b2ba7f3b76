"""What pictures add to the output of the first decoder layers, pass by pass."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autosteer.runtime.deepstack import Deepstack
from autosteer.runtime.subgraph import find_device

LAYERS, WIDTH = 3, 2
CPU = find_device("cpu", 1)[0]


def rows(count: int, seed: int) -> np.ndarray:
    """Of a picture, (count, LAYERS * WIDTH)."""
    return np.random.default_rng(seed).normal(size=(count, LAYERS * WIDTH)).astype(np.float32)


PICTURES = {2: rows(5, 0), 7: rows(1, 1), 11: rows(4, 2)}  # two of them without a text between them
PROMPT = 20


@pytest.mark.parametrize(("count", "dtype"), itertools.product((1, 2, 3, 4, 7, PROMPT), ("float32", "float16")))
def test_each_position_has_its_rows_whatever_the_passes_are(count: int, dtype: str) -> None:
    expected = np.zeros((PROMPT, LAYERS, WIDTH), np.float32)
    for first, own in PICTURES.items():
        expected[first : first + len(own)] = own.reshape(-1, LAYERS, WIDTH)
    made = Deepstack(LAYERS, WIDTH, PICTURES, dtype, CPU)
    for first in range(0, PROMPT, count):
        n = min(count, PROMPT - first)
        given = made.inputs(range(1, 5), first, n)
        assert sorted(given) == ["deepstack.1", "deepstack.2"]
        for layer in (1, 2):
            found = given[f"deepstack.{layer}"].numpy()
            assert found.dtype == dtype and found.shape in ((1, n, WIDTH), (1, 1, WIDTH))
            there = expected[first : first + n, layer].astype(dtype)
            np.testing.assert_array_equal(np.broadcast_to(found[0], there.shape), there)


def test_a_pass_without_pictures_shares_one_row_of_zeros() -> None:
    made = Deepstack(LAYERS, WIDTH, PICTURES, "float32", CPU)
    for first, count in ((0, 2), (8, 3), (15, 100)):
        given = made.inputs(range(3), first, count).values()
        assert len({id(value) for value in given}) == 1
        assert not next(iter(given)).numpy().any()


def test_a_half_without_such_layers_has_no_such_input() -> None:
    assert Deepstack(LAYERS, WIDTH, PICTURES, "float32", CPU).inputs(range(3, 9), 2, 5) == {}
    assert Deepstack(0, WIDTH, {}, "float32", CPU).inputs(range(9), 0, 5) == {}
