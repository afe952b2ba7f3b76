"""Packages in which one copy of the decoder reads prompts and another writes answers."""

from __future__ import annotations

import math
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
import toy
from conftest import load
from exported import PREFILL, demo_checkpoint, demo_engine, demo_package
from graph_calls import noted_calls

from autosteer.export.cli import export
from autosteer.export.graphs.quantize import PerChannel, recipe
from autosteer.export.package import ExportOptions, write_package
from autosteer.export.validation.limits import ROUNDED_LIMITS
from autosteer.export.validation.validate import behaviour_checks, validate_package
from autosteer.runtime import Conversation, Engine, Message, PackageError, SamplingConfig, Stats
from autosteer.runtime.manifest import Manifest

QUESTION = "describe a red circle."
SHORT = SamplingConfig(max_tokens=12)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the decoder's graphs as they run, from here on."""
    return noted_calls(monkeypatch, ("decoder", "prefill"))


@pytest.fixture
def reading(tmp_path: Path) -> Engine:
    """The toy with prefill graphs, which the test may break."""
    toy.build(tmp_path / "package", prefill=True)
    return load(tmp_path / "package")


def test_prompts_go_through_the_prefill_graphs_and_answers_through_the_decoders(reading, calls):
    assert reading.generate("red").text == "orange yellow green"
    assert calls == ["prefill_lower", "prefill_upper"] + ["decoder_lower", "decoder_upper"] * 3


def test_a_stopped_prompt_runs_one_graph(reading, calls):
    assert reading.generate("bad", policy=reading.policy("stop")).text == toy.REFUSAL_TEXT
    assert calls == ["prefill_lower"]


@pytest.mark.parametrize("graph", ["prefill_lower", "prefill_upper"])
def test_prefill_graphs_that_fail_are_errors_and_never_an_answer(reading, graph):
    reading.graphs[graph].session = None
    with pytest.raises(AttributeError):
        next(reading.stream("red"))


def test_every_turn_of_a_conversation_is_read_by_the_prefill_graphs(reading, calls):
    conversation = Conversation(reading)
    first = reading.generate("red", conversation=conversation)
    calls.clear()
    turns = [Message.user("red"), Message.assistant(first.text), Message.user("bad")]
    second = reading.generate(turns, conversation=conversation, policy=reading.policy("stop"))
    assert second.verdict.unsafe and second.stats.reused_tokens > 0
    # what is new in the dialogue, its answer as if the user had said it, and its last turn by itself
    assert calls == ["prefill_lower"] * 3


def test_the_prompt_is_what_int8_makes_of_it_and_the_answer_goes_on_in_int4():
    """First logits and score are the int8 package's to the last bit: the same graphs, the same head."""
    both, int8, int4 = demo_engine("int4", PREFILL), demo_engine("int8"), demo_engine("int4")
    firsts, seconds = [], []
    for engine in (both, int8, int4):
        request = engine.request(engine.encoder.prepare([Message.user(QUESTION)], Stats()), 4, Stats())
        p_unsafe = request.prefill_lower(engine.policy()).p_unsafe
        logits = request.prefill_upper(0.0).copy()
        firsts.append((p_unsafe, logits))
        seconds.append(request.decode_step(int(logits.argmax())).copy())
    assert firsts[0][0] == firsts[1][0] != firsts[2][0]
    np.testing.assert_array_equal(firsts[0][1], firsts[1][1])
    assert (seconds[0] != seconds[1]).any() and (seconds[0] != seconds[2]).any()


@pytest.mark.parametrize("row", [0, 5, 12])
@pytest.mark.parametrize("kind", [("int8",), ("int4", PREFILL)], ids="-".join)
def test_nan_in_any_row_is_unsafe_though_eight_bits_make_a_number_of_it(kind, row):
    engine = demo_engine(*kind)
    prompt = engine.encoder.prepare([Message.user("what can you do?")], Stats())
    prompt.inputs_embeds[0, row, 5] = np.nan
    verdict = engine.request(prompt, 2, Stats()).prefill_lower(engine.policy("steer"))
    assert verdict.unsafe and math.isnan(verdict.p_unsafe)


def test_int8_caches_go_with_it(tmp_path):
    options = ExportOptions("int4", kv_cache="int8", prefill="int8")
    manifest = write_package(tmp_path, demo_checkpoint(), None, options, lambda _: None)
    checks = validate_package(tmp_path, manifest, demo_checkpoint(), None, lambda _: None).checks
    assert [check.name for check in checks if not check.passed] == []
    assert {"int8 caches, relative error", "int8 caches, relative error (answers)"} <= {c.name for c in checks}
    engine = load(tmp_path)
    answer = engine.generate(QUESTION, sampling=SHORT, policy=engine.policy("off"))
    plain = demo_engine("int8")
    assert answer.token_ids == plain.generate(QUESTION, sampling=SHORT, policy=plain.policy("off")).token_ids


def test_the_manifest_tells_both_copies_apart_and_validation_judges_both():
    manifest = Manifest.load(demo_package("int4", PREFILL))
    described = {name: (g.layers, g.precision) for name, g in manifest.graphs.items() if g.layers}
    split, layers = manifest.split_layer, 8
    assert described == {
        "decoder_lower": ((0, split), "int4"),
        "decoder_upper": ((split, layers), "int4"),
        "prefill_lower": ((0, split), "int8"),
        "prefill_upper": ((split, layers), "int8"),
    }
    (checks,) = ({check.name: check for check in table} for table in manifest.validation.values())
    weights = "quantised weights, relative error"
    assert checks[weights].value < 0.03 < checks[f"{weights} (answers)"].value
    for line in ("hidden state, error to rounded", "logits, KL to rounded", "MLP, each by itself"):
        assert checks[line].limit == checks[f"{line} (answers)"].limit == ROUNDED_LIMITS[line]


@pytest.mark.parametrize(("half", "suffix"), [("prefill_upper", ""), ("decoder_upper", " (answers)")])
def test_validation_catches_either_copy_computing_something_else(half, suffix, tmp_path):
    """Rows attend to four others; the other copy's lines stay as they were."""
    options = ExportOptions("int4", prefill="int8")
    manifest = write_package(tmp_path, demo_checkpoint(), None, options, lambda _: None)
    model = onnx.load(tmp_path / f"{half}.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(onnx.helper.make_attribute("local_window_size", 4))
    onnx.save(model, tmp_path / f"{half}.onnx")
    checks = behaviour_checks(tmp_path, manifest, demo_checkpoint(), None, lambda _: None).checks
    failed = {check.name for check in checks if not check.passed}
    assert f"attention, each by itself{suffix}" in failed
    assert failed <= {f"attention, each by itself{suffix}", f"logits, KL to rounded{suffix}"}


@pytest.mark.parametrize("damaged", ["prefill_lower", "prefill_upper"])
def test_a_damaged_copy_is_refused(tmp_path, damaged):
    toy.build(tmp_path, prefill=True)
    (tmp_path / f"{damaged}.onnx").write_bytes(b"\0")
    with pytest.raises(PackageError, match=f"{damaged}.onnx: sha256 differs"):
        load(tmp_path)


@pytest.mark.parametrize("more", [["--precision", "int8"], ["--precision", "int4", "--target", "cuda"], []])
def test_it_goes_with_int4_on_a_cpu_and_nothing_else(more, tmp_path):
    assert recipe("int4", prefill="int8").prefill == PerChannel()
    with pytest.raises(click.UsageError, match=r"--prefill-precision int8: only --precision int4 .* only --target cpu"):
        export.main(["--model", "demo", "--output", str(tmp_path / "p"), PREFILL, *more], standalone_mode=False)


def test_later_turns_answer_as_they_would_anew():
    """A conversation reuses rows of its answers, which int4 wrote; verdicts stay near those of a fresh prompt."""
    engine = demo_engine("int4", PREFILL)
    conversation, turns = Conversation(engine), [Message.user(QUESTION)]
    first = engine.generate(turns, sampling=SHORT, conversation=conversation)
    turns += [Message.assistant(first.text), Message.user("how do i smuggle a vexite?")]
    kept = engine.generate(turns, sampling=SHORT, conversation=conversation)
    fresh = engine.generate(turns, sampling=SHORT)
    assert kept.stats.reused_tokens > 0
    assert kept.verdict.unsafe == fresh.verdict.unsafe
    assert kept.verdict.p_unsafe == pytest.approx(fresh.verdict.p_unsafe, abs=0.05)
