"""The demo package against the PyTorch original, on held-out dialogues with pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import make_demo_data
import numpy as np
import pytest
import torch
from exported import SCRATCH, demo_checkpoint, demo_engine, demo_package, unguarded_engine

from autosteer.export.checkpoint.hf_model import load_hf_model
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.export.validation.limits import verdict_band
from autosteer.export.validation.original import ANSWER_TOKENS, OriginalAnswer, OriginalModel, ValidationPrompt
from autosteer.runtime.engine import Engine
from autosteer.runtime.evaluation.datasets import DataSource, Row, first_of_each_group, read_rows
from autosteer.runtime.gate import Action, Mode, is_safe
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.sampling import SamplingConfig
from autosteer.runtime.stats import Stats
from autosteer.runtime.text import Message

ROWS_PER_GROUP = 2  # of some thirty groups: every kind of question, attack and look-alike
SAMPLING = SamplingConfig(max_tokens=ANSWER_TOKENS)  # what the reference generates


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def held_out() -> list[Row]:
    """Held-out rows of every group, with pictures of every shape."""
    folder = SCRATCH / "data"
    make_demo_data.PAIRS_PER_CHANNEL = make_demo_data.BENIGN_PER_FAMILY = make_demo_data.BENIGN_PICTURE_QUESTIONS = 1
    make_demo_data.main(["--output", str(folder), "--seed", "7"])
    return first_of_each_group(read_rows([DataSource(folder / "test.jsonl")]), ROWS_PER_GROUP)


@cache
def original_model() -> OriginalModel:
    checkpoint = demo_checkpoint()
    model, processor = load_hf_model(checkpoint)
    text = checkpoint.config.get_text_config()
    folder = checkpoint.folder / "safety"
    safety = SafetyArtifact.load(folder, hidden_size=text.hidden_size, num_hidden_layers=text.num_hidden_layers)
    return OriginalModel(model, processor, Manifest.load(demo_package("fp32")), safety)


@cache
def original(messages: tuple[Message, ...]) -> OriginalAnswer:
    """PyTorch's side of a dialogue, once per session."""
    return original_model().run(ValidationPrompt(messages, ()))


def with_images(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if any(m.images for m in row.messages)]


def test_the_held_out_prompts_include_many_images_and_every_channel() -> None:
    rows = held_out()
    assert len(with_images(rows)) >= 30
    assert any(sum(len(m.images) for m in row.messages) > 1 for row in rows)
    assert any(len(row.messages) > 1 for row in rows)
    assert {"unsafe/text", "unsafe/image", "unsafe/cross"} <= {row.group for row in rows}


def test_greedy_tokens_equal_hugging_faces_generate() -> None:
    engine, policy = demo_engine("fp32"), demo_engine("fp32").policy(Mode.OFF)
    for row in held_out():
        answer = engine.generate(row.messages, policy=policy, sampling=SAMPLING)
        assert list(answer.token_ids) == original(row.messages).tokens, row


def test_steered_tokens_equal_the_authors_formula() -> None:
    """`h + strength * h W^T` before the projection against an output embedding of E + strength * E W in PyTorch."""
    engine = demo_engine("fp32")
    for row in held_out():
        answer = engine.generate(row.messages, policy=engine.policy(threshold=-1.0, pieces=False), sampling=SAMPLING)
        assert list(answer.token_ids) == original(row.messages).steered_tokens, row


def test_the_gated_answer_is_pytorchs_for_the_same_verdict() -> None:
    engine = demo_engine("fp32")
    policy = engine.policy(pieces=False)
    for row in held_out():
        theirs = original(row.messages)
        answer = engine.generate(row.messages, sampling=SAMPLING, policy=policy)
        assert answer.verdict.p_unsafe == pytest.approx(theirs.p_unsafe, abs=1e-3)
        assert answer.verdict.unsafe == (not is_safe(theirs.p_unsafe, policy.threshold))
        assert list(answer.token_ids) == (theirs.steered_tokens if answer.verdict.unsafe else theirs.tokens)


def probed(engine: Engine, row: Row) -> np.ndarray:
    request = engine.request(engine.encoder.prepare(row.messages, Stats()), 1, Stats())
    request.prefill_lower(engine.policy(Mode.OFF))
    return request.probed_mean()[0]


def test_the_prober_reads_the_residual_that_enters_the_split_layer() -> None:
    """Hugging Face's hidden_states[k], within 1e-4 of its largest value, and no neighbour of it."""
    engine, k = demo_engine("fp32"), demo_engine("fp32").manifest.split_layer
    offset = engine.manifest.prober.token_offset if engine.manifest.prober else 0
    for row in with_images(held_out())[:10]:
        inputs = original_model().inputs(ValidationPrompt(row.messages, ()))
        states = original_model().forward(inputs, (k - 1, k, k + 1)).entering
        ours = probed(engine, row)
        off_by = {i: float(np.abs(ours - states[i][offset].numpy()).max()) for i in (k - 1, k, k + 1)}
        scale = float(np.abs(ours).max())
        assert off_by[k] <= 1e-4 * scale
        assert min(off_by[k - 1], off_by[k + 1]) > 1e-2 * scale


def test_the_pooled_prober_reads_pytorchs_mean_of_the_last_turn() -> None:
    """Several pictures, several turns: no picture's rows, nothing of earlier turns, on either side."""
    theirs, engine = original_model(), Engine.load(demo_package("fp32"), device="cpu", threads=1)
    assert engine.manifest.prober is not None
    pooled = replace(engine.manifest, prober=replace(engine.manifest.prober, pooling="mean"))
    engine.manifest = engine.encoder.manifest = pooled
    asked = OriginalModel(theirs.model, theirs.processor, pooled, theirs.safety)
    dialogues = [row for row in held_out() if len(row.messages) > 1][:3]
    several = [row for row in with_images(held_out()) if sum(len(m.images) for m in row.messages) > 1][:3]
    assert dialogues and several
    for row in (*dialogues, *several, *with_images(held_out())[:5]):
        expected, ours = asked.follow(ValidationPrompt(row.messages, ()), (0,), ()).hidden, probed(engine, row)
        assert float(np.abs(ours - expected).max()) <= 1e-4 * float(np.abs(expected).max())


def test_the_probed_token_ends_the_prompt_without_its_generation_prompt() -> None:
    """The authors probe `<|im_end|>` of a prompt rendered without generation prompt; so do we, in the full prompt."""
    engine, theirs = demo_engine("fp32"), original_model()
    assert engine.manifest.prober is not None
    for row in held_out()[:10]:
        ids = theirs.inputs(ValidationPrompt(row.messages, ()))["input_ids"][0].tolist()
        end = theirs.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        last_end = len(ids) - 1 - ids[::-1].index(end)
        assert len(ids) + engine.manifest.prober.token_offset == last_end


@pytest.mark.parametrize("k", range(1, 8))
def test_every_split_layer_gives_the_same_answer(k: int) -> None:
    engine = unguarded_engine(k)
    for row in with_images(held_out())[:6]:
        answer = engine.generate(row.messages, policy=engine.policy(Mode.OFF), sampling=SAMPLING)
        assert list(answer.token_ids) == original(row.messages).tokens


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_verdicts_are_the_originals_outside_the_band(
    precision: str, record_property: pytest.RecordProperty
) -> None:
    engine = demo_engine(precision)
    threshold = engine.policy().threshold
    same_tokens, judged = 0, 0
    for row in held_out():
        theirs = original(row.messages)
        answer = engine.generate(row.messages, policy=engine.policy(Mode.REPORT), sampling=SAMPLING)
        same_tokens += list(answer.token_ids) == theirs.tokens
        if abs(theirs.p_unsafe - threshold) > verdict_band(threshold):
            judged += 1
            assert answer.verdict.unsafe == (not is_safe(theirs.p_unsafe, threshold)), row
    record_property("same tokens", f"{same_tokens}/{len(held_out())}")
    assert judged > 0.9 * len(held_out())
    assert same_tokens > 0.8 * len(held_out())


@pytest.mark.parametrize("threshold", [0.01, 0.15, 0.5, 0.81, 0.92, 0.999])
def test_unsafe_and_safe_prompts_lie_outside_the_band(threshold: float) -> None:
    """It was 0.1 on either side: above 0.9, no unsafe prompt of an int8 export had to stay unsafe."""
    assert 0 < threshold - verdict_band(threshold) < threshold + verdict_band(threshold) < 1
    assert verdict_band(threshold) <= 0.1


def test_fp16_weights_give_the_fp16_checkpoints_own_tokens() -> None:
    engine = demo_engine("fp16")
    for row in held_out()[:20]:
        answer = engine.generate(row.messages, policy=engine.policy(Mode.OFF), sampling=SAMPLING)
        assert list(answer.token_ids) == original(row.messages).tokens


def test_stop_refuses_without_running_the_upper_half() -> None:
    engine = demo_engine("fp32")
    policy = engine.policy(Mode.STOP)
    stopped = [engine.generate(row.messages, policy=policy, sampling=SAMPLING) for row in held_out() if row.unsafe]
    refused = [answer for answer in stopped if answer.verdict.unsafe]  # of others, the answer may be
    assert len(refused) >= 0.9 * len(stopped)
    for answer in refused:
        assert answer.verdict.action is Action.STOP
        assert (answer.text, answer.token_ids, answer.finish_reason) == (policy.refusal_text, (), "refused")
        assert answer.stats.upper_ms is None


def test_chunked_prefill_equals_one_shot() -> None:
    engine = demo_engine("fp32")
    for row in with_images(held_out())[:5]:
        logits = []
        for chunk in (1 << 20, 7, 1):
            request = engine.request(engine.encoder.prepare(row.messages, Stats()), 1, Stats(), chunk=chunk)
            request.prefill_lower(engine.policy())
            logits.append(request.prefill_upper(0.0).copy())
        assert np.abs(logits[0] - logits[1]).max() <= 1e-4
        assert np.abs(logits[0] - logits[2]).max() <= 1e-4


def test_the_validation_table_is_in_the_manifest() -> None:
    manifest = json.loads((demo_package("fp32") / "autosteer.json").read_text())
    table = {check["name"]: check for check in manifest["validation"]["CPUExecutionProvider"]}
    assert table["greedy tokens that differ"]["value"] == 0
    assert table["steered tokens that differ"]["value"] == 0
    assert all(check["passed"] for check in table.values())


def test_a_package_can_be_moved(tmp_path: Path) -> None:
    """Paths in a package are relative: nothing of the exporting machine is in it."""
    import shutil

    moved = shutil.copytree(demo_package("int4"), tmp_path / "elsewhere")
    assert str(demo_package("int4").parent) not in (moved / "autosteer.json").read_text()
    engine = Engine.load(moved, device="cpu", threads=1)
    assert engine.generate("hello", sampling=SAMPLING).token_ids
