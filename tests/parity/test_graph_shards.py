"""Graphs larger than memory run in pieces: what is loaded when, and that the pieces compute the whole."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from exported import demo_checkpoint

from autosteer.export.checkpoint.layer_sweep import LayerSweep, grouped
from autosteer.export.package import ExportOptions, write_package
from autosteer.export.validation import answers, graph_shards
from autosteer.export.validation.graph_shards import ShardedGraph
from autosteer.export.validation.prompts import make_validation_prompts
from autosteer.runtime.subgraph import OrtValue, find_device


class Part:
    """Of 10 bytes; writes into `log` when it comes and goes."""

    bytes = 10

    def __init__(self, name: str, log: list[str]):
        self.name, self._log = name, log

    def load(self) -> None:
        self._log.append(f"+{self.name}")

    def unload(self) -> None:
        self._log.append(f"-{self.name}")


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (29, ["+a", "-a", "+b", "-b", "+c", "-c", "+a", "-a", "+b", "-b", "+c"]),
        (30, ["+a", "+b", "+c"]),
    ],
)
def test_parts_come_and_go_and_serve_all_who_wait_unless_all_of_them_may_stay(budget: int, expected: list[str]) -> None:
    """Three jobs through three parts: a sweep loads each part once."""
    log: list[str] = []
    parts, sweep = [Part(name, log) for name in "abc"], LayerSweep(budget)
    for part in parts:
        sweep.add(part)

    def job(number: int) -> list[str]:
        said = []
        for _ in range(2):
            for part in parts[number % 2 :]:  # some skip the first part
                sweep.wait_for(part)
                said.append(part.name)
        return said

    said_by_each = sweep.run([partial(job, number) for number in range(3)])
    assert ["".join(said) for said in said_by_each] == ["abcabc", "bcbc", "abcabc"]
    assert log == expected


def test_an_error_in_one_job_ends_them_all() -> None:
    """Those that waited used to wait for ever, with all that they held."""
    before = threading.active_count()
    part, sweep = SimpleNamespace(bytes=1, load=lambda: None, unload=lambda: None), LayerSweep(0)
    sweep.add(part)

    def fails() -> None:
        sweep.wait_for(part)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep.run([lambda: sweep.wait_for(part), fails, lambda: (sweep.wait_for(part), sweep.wait_for(part))])
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert sweep.run([lambda: sweep.wait_for(part)]) == [None]


@pytest.mark.parametrize("kind", [("fp32",), ("fp16",), ("int8",), ("int4",), ("fp32", "int8")], ids="-".join)
def test_graphs_of_every_kind_can_be_cut_anywhere(kind: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    """At fp16 the embedding's rows crossed a cut as float32, which no demo is large enough to meet."""
    monkeypatch.setattr(graph_shards, "SHARD_BYTES", 1)
    options = ExportOptions(**dict(zip(("precision", "kv_cache"), kind, strict=False)))
    manifest = write_package(tmp_path, demo_checkpoint(), None, options, lambda _: None)
    cases = make_validation_prompts(tmp_path, manifest, None)[:3]
    _, cut = answers.run_package(tmp_path, manifest, cases, tokens=4)
    monkeypatch.setattr(graph_shards, "SHARD_BYTES", 1 << 40)
    _, whole = answers.run_package(tmp_path, manifest, cases, tokens=4)
    for ours, expected in zip(cut, whole, strict=True):
        assert ours.plain.tokens == expected.plain.tokens
        np.testing.assert_allclose(
            ours.plain.logits, expected.plain.logits, atol=1e-4 * np.abs(expected.plain.logits).max()
        )


def test_answers_that_are_under_way_together_are_within_a_size() -> None:
    assert list(grouped([4, 4, 9, 1, 1], lambda size: size, 8)) == [[4, 4], [9], [1, 1]]
    assert list(grouped([], lambda size: size, 8)) == []


def test_what_a_piece_of_a_graph_has_computed_does_not_keep_it_in_memory(tmp_path: Path, monkeypatch) -> None:
    """An output that onnxruntime allocates holds its session: a 7B validation grew by every shard it passed."""
    monkeypatch.setattr(graph_shards, "SHARD_BYTES", 100_000)
    manifest = write_package(tmp_path, demo_checkpoint(), None, ExportOptions(), lambda _: None)
    device, _ = find_device("cpu", 1)
    sweep = LayerSweep(0)
    graph = ShardedGraph(tmp_path / "vision_encoder.onnx", manifest.graphs["vision_encoder"], device, sweep=sweep)
    sessions: list[weakref.ref[object]] = []
    load = graph_shards.GraphShard.load

    def remember(self) -> None:
        load(self)
        sessions.append(weakref.ref(self.session._sess))

    monkeypatch.setattr(graph_shards.GraphShard, "load", remember)
    size = manifest.image.tile_size if manifest.image else 0
    values = graph._run({"pixel_values": OrtValue.ortvalue_from_numpy(np.zeros((1, 3, size, size), np.float32))}, {})
    sweep.clear()
    gc.collect()
    assert len(sessions) > 3 and values
    assert [session() for session in sessions] == [None] * len(sessions)
