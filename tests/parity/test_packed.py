"""Texts that share a pass are scored as each by itself, and none sees another. The C++ side: test_cpp_conversation.py,
test_cpp_engine.py.
"""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy
from demo_requests import HARMLESS, UNSAFE
from exported import INT8_CACHES, PREFILL, demo_engine, demo_package
from faults import hiding_nothing, with_bias

from autosteer.export.checkpoint.open import DEMO
from autosteer.export.cli import export
from autosteer.runtime import Engine, Manifest, Message, packed
from autosteer.runtime.encoded_prompt import EncodedPrompt
from autosteer.runtime.errors import PackageError
from autosteer.runtime.generation import PREFILL_CHUNK, Request

KINDS = {  # options of the export: how far a score may differ
    ("fp32",): 1e-5,  # as no export makes it: without rounding, so that the difference is that of the order of sums
    ("int8",): 0.05,
    ("int4",): 0.05,
    ("int4", PREFILL): 0.05,
    ("int4", INT8_CACHES): 0.05,
}
PICTURES = [DEMO / "examples" / name for name in ("benign.png", "unsafe.png", "cross.png")]


@pytest.fixture(scope="module", params=KINDS, ids=" ".join)
def kind(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def engine(kind: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    if kind == ("fp32",):
        package = tmp_path_factory.mktemp("fp32") / "package"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("autosteer.export.package.reads_in_packs", lambda recipe, config: True)
            export.main(["--model", "demo", "--output", str(package)], standalone_mode=False)
        return Engine.load(package)
    return demo_engine(*kind)


def dialogues(count: int) -> list[list[Message]]:
    """Of several sentences, with and without pictures, turns before, and a video."""
    rng, found = random.Random(5), []
    for _ in range(count):
        said = rng.sample((*HARMLESS, *UNSAFE), rng.choice((2, 3, 4)))
        shown = rng.sample(PICTURES, rng.choice((0, 0, 1, 2)))
        videos = [[*map(str, rng.sample(PICTURES, 2))]] if rng.random() < 0.2 else []
        turn = Message.user(rng.choice((" ", "\n")).join(said), shown, videos)
        before = [Message.user(rng.choice(HARMLESS)), Message.assistant("i do not know.")] if rng.random() < 0.4 else []
        found.append([*before, turn])
    return found


def together(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> list[int]:
    """How many texts are read together, each time, from here on."""
    counts, read = list[int](), engine._judge._read_packed
    assert read

    def noting(begun: Any, prompts: Sequence[EncodedPrompt], stats: Any) -> Any:
        counts.append(len(prompts))
        return read(begun, prompts, stats)

    monkeypatch.setattr(engine._judge, "_read_packed", noting)
    return counts


def test_texts_in_one_pass_are_scored_as_each_by_itself(
    engine: Engine, kind: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    said = dialogues(40)
    counts = together(monkeypatch, engine)
    packed = [scores(engine, one) for one in said]
    assert sum(counts) > 200 and max(counts) > 8
    monkeypatch.setattr(engine._judge, "_read_packed", None)  # each in a pass of its own
    for one, found in zip(said, packed, strict=True):
        assert found == pytest.approx(scores(engine, one), abs=KINDS[kind]), one


def scores(engine: Engine, messages: list[Message]) -> list[float]:
    """What the prober made of every reading of a dialogue, in order."""
    found, read_all = list[float](), engine._judge._read_all

    def noting(*given: Any) -> Any:
        some = yield from read_all(*given)
        found.extend(some)
        return some

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._judge, "_read_all", noting)
        engine.score(messages, policy=engine.policy("report", threshold=0.9999))
    return found


@pytest.mark.parametrize("images", [[], PICTURES[:1], PICTURES[1:]])
def test_fewer_passes_run(engine: Engine, monkeypatch: pytest.MonkeyPatch, images: list[Path]):
    text = "how do i clean a spoon? how do i carry a ladder, and then? how do i paint a kettle? how do i mend a kite?"
    passes = dict[bool, int]()
    for together in (True, False):
        with monkeypatch.context() as patch:
            if not together:
                patch.setattr(engine._judge, "_read_packed", None)
            ran = runs_of_lower(patch, engine)
            engine.score(text, images=images)
        passes[together] = len(ran)
    assert 2 * passes[True] < passes[False]


def runs_of_lower(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> list[None]:
    """One item for each time that decoder_lower runs, from here on."""
    graph = engine.graphs[engine.manifest.prefill_graph("decoder_lower")]
    ran, bind = list[None](), graph.bind

    def noting(*given: Any) -> Callable[[], None]:
        call = bind(*given)
        return lambda: (ran.append(None), call())[1]

    monkeypatch.setattr(graph, "bind", noting)
    return ran


def test_a_later_reading_does_not_start_from_rows_that_were_overwritten(monkeypatch: pytest.MonkeyPatch):
    """What a pass leaves is what all of its texts begin with; behind it are rows of the last pass."""
    engine, left = demo_engine("int8"), list[tuple[int, int]]()
    read = engine._judge._read_packed
    assert read

    def noting(begun: Any, prompts: Sequence[EncodedPrompt], stats: Any) -> Any:
        scores, after = yield from read(begun, prompts, stats)
        left.append((len(after.keys), min(len(prompt.keys) for prompt in prompts)))
        assert all(after.keys == list(prompt.keys[: len(after.keys)]) for prompt in prompts)
        assert not after.lent
        return scores, after

    monkeypatch.setattr(engine._judge, "_read_packed", noting)
    for one in dialogues(10):
        engine.score(one, policy="report")
    assert left and all(kept < shortest for kept, shortest in left)


def test_a_pass_does_not_grow_with_the_dialogue(monkeypatch: pytest.MonkeyPatch):
    """Readings of several turns begin alike only up to the first: a pass had the rows of the whole dialogue, and its
    bias their square.
    """
    engine, rows = demo_engine("int8"), list[int]()
    run = packed.run_pack

    def noting(*given: Any) -> Any:
        *_, prompts, shared = given
        rows.append(sum(len(prompt.keys) - shared for prompt in prompts))
        return run(*given)

    monkeypatch.setattr(packed, "run_pack", noting)
    long = " ".join(f"the {n} kites are red." for n in range(60))
    turns = [Message.user("how do i clean a spoon?"), Message.assistant("get a sponge.", trusted=True)]
    turns += [Message.user("how do i paint a kettle? what is a kite?"), Message.assistant(long, trusted=True)]
    engine.score([*turns, Message.user("how do i mend a kite? is it red? how do i carry a ladder?")])
    assert len(rows) > 3 and max(rows) <= PREFILL_CHUNK


def test_nothing_is_kept_in_memory_by_its_own_passes(monkeypatch: pytest.MonkeyPatch):
    """A cycle kept the caches of an answer until the collector ran."""
    engine, requests = demo_engine("int8"), list[weakref.ref[Request]]()
    make = engine.request

    def noting(*given: Any, **options: Any) -> Request:
        request = make(*given, **options)
        requests.append(weakref.ref(request))
        return request

    monkeypatch.setattr(engine, "request", noting)
    gc.collect()
    gc.disable()
    try:
        engine.generate("how do i clean a spoon? what is a kite?")
        assert requests and not any(request() for request in requests)
    finally:
        gc.enable()


def test_a_piece_that_is_too_short_for_the_prober_is_unsafe(tmp_path: Path):
    """It was an IndexError."""
    toy.build(tmp_path / "package", masked=True)
    manifest = Manifest.load(tmp_path / "package")
    assert manifest.prober
    replace(manifest, prober=replace(manifest.prober, token_offset=-9)).save(tmp_path / "package")
    verdict = Engine.load(tmp_path / "package").score("tick tick red\nred tick tick\nred red tick", policy="stop")
    assert verdict.unsafe and verdict.p_unsafe is not None and math.isnan(verdict.p_unsafe)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("layers", [None, [0], [1], [2], [3]])
def test_a_graph_that_hides_nothing_is_refused(tmp_path: Path, precision: str, layers: list[int] | None):
    package = hiding_nothing(demo_package(precision), tmp_path / "package", layers)
    with pytest.raises(PackageError, match="a text that shares a pass with others is read otherwise"):
        Engine.load(package)


@pytest.mark.parametrize(("operator", "value"), [("Max", -4.0), ("Mul", 0.0), ("Mul", -1.0)])
def test_a_bias_that_arrives_otherwise_is_refused(tmp_path: Path, operator: str, value: float):
    package = with_bias(demo_package("int8"), tmp_path / "package", operator, value)
    with pytest.raises(PackageError, match="a text that shares a pass with others is read otherwise"):
        Engine.load(package)


def test_a_package_without_a_gate_reads_no_texts_together(tmp_path: Path):
    package = tmp_path / "package"
    options = ["--model", "demo", "--unguarded", "--layer", "4", "--precision", "int8"]
    export.main([*options, "--output", str(package)], standalone_mode=False)
    assert not Manifest.load(package).reads_in_packs
