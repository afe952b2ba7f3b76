"""How many processors the threads are for, if nobody says how many."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cgroups import CASES, written

from autosteer.runtime import usable_cores as U


@pytest.mark.parametrize("name", CASES)
def test_the_cpu_limits_of_a_container_are_found(name: str, tmp_path: Path):
    membership, root, limits = written(tmp_path, name)
    assert list(U.cpu_limits(membership, root)) == limits


@pytest.mark.parametrize(("limits", "cores"), [([], 8), ([2.0], 2), ([1.5, 4.0], 2), ([0.1], 1), ([64.0], 8)])
def test_threads_are_for_whole_processors_and_for_one_at_least(
    limits: list[float], cores: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(U, "cpu_limits", lambda membership, root: iter(limits))
    assert U.usable_cores() == cores
