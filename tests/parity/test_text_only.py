"""Decoders without images, on tiny random checkpoints with the demo's tokenizer."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxruntime_matrix import numbers, oldest
from tiny_weights import TEMPLATE
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from version_matrix.environments import Interpreter

from autosteer.export.checkpoint.decoder_config import DecoderConfig, decoder_config
from autosteer.export.checkpoint.open import DEMO, open_checkpoint
from autosteer.export.cli import export
from autosteer.export.graphs.decoder import HEAD_NORMS
from autosteer.export.graphs.writer import GraphWriter
from autosteer.export.validation.dequantize import PackedWeights
from autosteer.export.validation.original import ANSWER_TOKENS
from autosteer.models import FAMILIES, Family, text_only
from autosteer.runtime.conversation import Conversation
from autosteer.runtime.engine import Engine
from autosteer.runtime.errors import CheckError, InputError
from autosteer.runtime.generation import Request
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.sampling import SamplingConfig
from autosteer.runtime.stats import Stats
from autosteer.runtime.text import Message

# Scaled rotary embeddings begin to differ at position 0; 32 is the length that the model was first trained for.
SCALED = {"factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED},
    "yarn": {"rope_type": "yarn", **SCALED},
}
BEYOND = 96  # positions: the validation's short prompts and their answers stay below, its long one is above
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.02 * i for i in range(8)],
    "long_factor": [1.5 + 0.7 * i for i in range(8)],
    "original_max_position_embeddings": BEYOND,
}
WINDOW = 9  # positions
GEMMA = {  # windows in two layers of three; the other has other frequencies
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
}
PART_ROTATED = {  # as Phi-4-mini's: 8 pairs of each head's 32 numbers
    "pad_token_id": 0,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, GEMMA),
    "gemma3, rope linear": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        GEMMA | {"rope_parameters": {"full_attention": ROPES["linear"]}},
    ),
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama, rope llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": ROPES["llama3"]}),
    "llama, rope linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": ROPES["linear"]}),
    "ministral": (
        MinistralConfig,
        MinistralForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "mistral, windows": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {"tie_word_embeddings": False}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"pad_token_id": 0}),
    "phi3, windows": (Phi3Config, Phi3ForCausalLM, {"pad_token_id": 0, "sliding_window": WINDOW}),
    "phi3, rope longrope": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "pad_token_id": 0,
            "max_position_embeddings": 1536,
            "original_max_position_embeddings": BEYOND,
            "rope_parameters": LONGROPE,
        },
    ),
    "phi3, part of each head": (Phi3Config, Phi3ForCausalLM, PART_ROTATED),
    "phi3, part of each head, rope longrope": (
        Phi3Config,
        Phi3ForCausalLM,
        PART_ROTATED
        | {
            "max_position_embeddings": 1536,
            "original_max_position_embeddings": BEYOND,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5},
        },
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen2, rope yarn": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": ROPES["yarn"]}),
    "qwen2, some windows": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of each kind, exported by the command: it fails unless tokens equal PyTorch's."""
    folder = tmp_path_factory.mktemp("package")
    save_checkpoint(request.param, folder / "checkpoint")
    export_fp32(folder / "checkpoint", folder / "package")
    return folder / "package"


def save_checkpoint(kind: str, folder: Path) -> None:
    config_class, model_class, extra = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128} | extra,
    )
    model = model_class(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # they begin at 1, where one taken for another does not show; sharp attention shows more
            torch.nn.init.uniform_(weight, *((2.0, 6.0) if "q_norm" in name else (0.5, 1.5)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export_fp32(checkpoint: Path, output: Path) -> None:
    arguments = ["--model", checkpoint, "--output", output, "--unguarded", "--layer", 1]
    export.main([str(a) for a in arguments], standalone_mode=False)


def test_the_export_compared_tokens_and_they_were_equal(package: Path) -> None:
    manifest = Manifest.load(package)
    table = {check.name: check.value for check in manifest.validation["CPUExecutionProvider"]}
    assert table["greedy tokens that differ"] == 0
    answer = manifest.golden[0].token_ids
    assert len(answer) == ANSWER_TOKENS or answer[-1] in manifest.prompt.end_token_ids


def test_such_a_package_has_no_image_graph_and_takes_no_image(package: Path) -> None:
    engine = Engine.load(package, device="cpu", threads=1)
    assert set(engine.graphs) == {"embed_tokens", "decoder_lower", "decoder_upper", "lm_head"}
    with pytest.raises(InputError, match="takes no images"):
        engine.generate([Message.user("hello", [DEMO / "examples" / "benign.png"])], policy=engine.policy("off"))


def test_windows_that_a_dialogue_can_leave_need_an_onnxruntime_that_cuts_them_right(package: Path) -> None:
    """1.23 let each query see one position more, and so the prober read another state: nothing said so."""
    config = json.loads((package.parent / "checkpoint" / "config.json").read_text())
    kinds = config.get("layer_types") or ["sliding_attention" if config.get("sliding_window") else "full_attention"]
    assert Manifest.load(package).onnxruntime == ("1.24" if "sliding_attention" in kinds else "1.20")


def test_on_the_oldest_onnxruntime_it_answers_as_recorded_or_is_refused(package: Path) -> None:
    """The matrix of versions asks the demo, which has no windows."""
    needed = Manifest.load(package).onnxruntime
    command = [sys.executable, "-c", "from autosteer.runtime.cli import check_main; check_main()", str(package)]
    done = subprocess.run(command, env=Interpreter().environ(oldest()), capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (numbers(needed) <= numbers(oldest())), done.stdout + done.stderr
    assert done.returncode == 0 or f"this package needs onnxruntime {needed} or newer" in done.stderr


@pytest.mark.parametrize(("kind", "code"), [("mistral, windows", 4), ("qwen3", 0)])
def test_the_cpp_runtime_refuses_windows_there_too(kind: str, code: int, built: Path, tmp_path: Path) -> None:
    save_checkpoint(kind, tmp_path / "checkpoint")
    export_fp32(tmp_path / "checkpoint", tmp_path / "package")
    command = [built / "autosteer-cli", tmp_path / "package", "--prompt", "hello", "--policy", "off"]
    environ = {**os.environ, "AUTOSTEER_ONNXRUNTIME": str(Interpreter().library(oldest()))}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("needs onnxruntime 1.24 or newer" in done.stderr) == (code != 0)


def test_a_context_as_long_as_the_window_needs_none(tmp_path: Path) -> None:
    save_checkpoint("mistral, windows", tmp_path / "checkpoint")
    checkpoint = open_checkpoint(str(tmp_path / "checkpoint"))
    assert [decoder_config(checkpoint, context).windowed for context in (WINDOW, WINDOW + 1)] == [False, True]


def test_untied_heads_are_stored_beside_the_embedding_and_tied_ones_once(package: Path) -> None:
    manifest = Manifest.load(package)
    (weights,) = (file for file in manifest.files if file.file == "weights.bin")
    table = manifest.dims.vocab_size * manifest.dims.hidden_size * 4
    checkpoint = open_checkpoint(str(package.parent / "checkpoint"))
    decoder = sum(math.prod(checkpoint.shape(name)) * 4 for name in checkpoint.tensor_files if ".layers." in name)
    tables = round((weights.bytes - decoder) / table)
    config = json.loads((package.parent / "checkpoint" / "config.json").read_text())
    assert tables == (1 if config["tie_word_embeddings"] else 2)


def norms_exchanged() -> Family:
    return dataclasses.replace(text_only.OLMO2, layer_norms=lambda config: text_only.AFTER[2:] + text_only.AFTER[:2])


def norms_before() -> Family:
    before = (text_only.AFTER[1], None, text_only.AFTER[3], None)
    return dataclasses.replace(text_only.OLMO2, layer_norms=lambda config: before)


@pytest.mark.parametrize("wrong", [norms_exchanged, norms_before])
def test_wrong_norms_of_a_layer_are_refused(
    wrong: Callable[[], Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint("olmo2", tmp_path / "checkpoint")
    monkeypatch.setitem(FAMILIES, "olmo2", wrong())
    with pytest.raises(CheckError, match="attention, each by itself"):
        export_fp32(tmp_path / "checkpoint", tmp_path / "package")


def test_queries_and_keys_normed_by_head_instead_of_across_heads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the right weights, so that stored numbers do not tell."""

    def by_head(g: GraphWriter, config: DecoderConfig, module: str, x: ir.Value, heads: int) -> ir.Value:
        split = g.op("Reshape", x, g.constant(f"split_{heads}", np.array([0, 0, heads, config.head_dim], np.int64)))
        ones = g.constant("ones", np.ones(config.head_dim, np.float32))
        normed = g.op("SimplifiedLayerNormalization", split, ones, axis=-1, epsilon=config.rms_norm_eps, stash_type=1)
        joined = g.op("Reshape", normed, g.constant("joined", np.array([0, 0, -1], np.int64)))
        return g.op("Mul", joined, g.vector(f"{module}.weight", shape=(heads * config.head_dim,)))

    save_checkpoint("olmo2", tmp_path / "checkpoint")
    monkeypatch.setitem(HEAD_NORMS, "rms_across_heads", by_head)
    with pytest.raises(CheckError, match="attention, each by itself"):
        export_fp32(tmp_path / "checkpoint", tmp_path / "package")


def test_a_four_bit_head_and_embedding_are_what_the_table_compares_with(package: Path, tmp_path: Path) -> None:
    """Tied (one blob with zero points for both) and untied; one block a row: half of each zero point byte is empty."""
    arguments = ["--model", package.parent / "checkpoint", "--output", tmp_path / "int4", "--unguarded", "--layer", 1]
    export.main([*map(str, arguments), "--precision", "int4", "--head-bits", "4"], standalone_mode=False)
    manifest, engine = Manifest.load(tmp_path / "int4"), Engine.load(tmp_path / "int4", device="cpu", threads=1)
    checkpoint = open_checkpoint(str(package.parent / "checkpoint"))
    packed = PackedWeights(tmp_path / "int4", manifest, checkpoint)
    table = packed.tensor(name := "model.embed_tokens.weight").numpy()
    embedded = engine.encoder.embed(list(range(len(table)))) / checkpoint.embedding_scale
    np.testing.assert_allclose(embedded, table, atol=1e-6)
    original = checkpoint.tensor(name).numpy()
    assert 0.01 < np.linalg.norm(table - original) / np.linalg.norm(original) < 0.2


# --- other frequencies for long prompts ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Any]:
    """The package, and Hugging Face's model, whose answers do not end early."""
    folder = tmp_path_factory.mktemp("longrope")
    save_checkpoint("phi3, rope longrope", folder / "checkpoint")
    export_fp32(folder / "checkpoint", folder / "package")
    model = Phi3ForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32).eval()
    return Engine.load(folder / "package", device="cpu", threads=1), model


def prompt_of(engine: Engine, length: int) -> list[Message]:
    """A prompt of so many tokens."""
    words, frame = "where is the red circle and what colour has it now ", engine.encoder
    for count in range(1, length):
        messages = [Message.user(" ".join((words * length).split()[:count]))]
        if frame.prepare(messages, Stats()).inputs_embeds.shape[1] == length:
            return messages
    raise AssertionError(length)


def theirs(model: Any, engine: Engine, messages: list[Message], tokens: int) -> list[int]:
    ids = torch.tensor([engine.encoder.prepare(messages, Stats()).token_ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return list(map(int, out[0, ids.shape[1] :]))


@pytest.mark.parametrize("length", [BEYOND - 60, BEYOND - 20, BEYOND - 1, BEYOND, BEYOND + 1, BEYOND + 40, 1200])
def test_answers_on_both_sides_of_the_boundary_are_generates(longrope: tuple[Engine, Any], length: int) -> None:
    """An answer that begins before it ends where generate would turn every key anew."""
    engine, model = longrope
    messages = prompt_of(engine, length)
    answer = engine.generate(messages, policy=engine.policy("off"), sampling=SamplingConfig(max_tokens=48))
    room = 48 if length > BEYOND else min(48, BEYOND + 1 - length)
    expected = theirs(model, engine, messages, 48)[:room]
    assert list(answer.token_ids) == expected
    assert answer.finish_reason == ("stop" if expected[-1] == engine.manifest.prompt.end_token_ids[0] else "length")


def test_the_long_frequencies_change_what_is_computed(longrope: tuple[Engine, Any]) -> None:
    """So that the tests around this one would see others."""
    engine, _ = longrope
    assert engine.manifest.rotary.long is not None and engine.manifest.rotary.long.beyond == BEYOND
    short = dataclasses.replace(engine.manifest, rotary=dataclasses.replace(engine.manifest.rotary, long=None))
    messages = prompt_of(engine, BEYOND + 40)
    prompt = engine.encoder.prepare(messages, Stats())
    rows = [Request(m, engine.graphs, engine.device, prompt, 1, Stats()) for m in (engine.manifest, short)]
    logits = [(r.prefill_lower(engine.policy("off")), r.prefill_upper(0.0))[1].copy() for r in rows]
    assert np.abs(logits[0] - logits[1]).max() > 0.05


def test_a_conversation_that_crosses_the_boundary_is_computed_anew_once(longrope: tuple[Engine, Any]) -> None:
    engine, model = longrope
    conversation, dialogue, reused = Conversation(engine), prompt_of(engine, BEYOND - 40), list[int]()
    for _ in range(4):
        answer = engine.generate(
            dialogue, conversation=conversation, policy=engine.policy("off"), sampling=SamplingConfig(max_tokens=24)
        )
        length = engine.encoder.prepare(dialogue, Stats()).inputs_embeds.shape[1]
        room = 24 if length > BEYOND else BEYOND + 1 - length
        assert list(answer.token_ids) == theirs(model, engine, dialogue, 24)[:room]
        reused.append(answer.stats.reused_tokens)
        dialogue = [*dialogue, Message.assistant(answer.text), Message.user("and where is the blue one?")]
    assert reused[0] == reused[1] == 0 < reused[2] < reused[3]


@pytest.mark.parametrize("options", [["--precision", "int8"], ["--precision", "int4", "--prefill-precision", "int8"]])
def test_stacked_matrices_are_rounded_as_others(options: list[str], tmp_path: Path) -> None:
    save_checkpoint("phi3, rope longrope", tmp_path / "checkpoint")
    arguments = ["--model", tmp_path / "checkpoint", "--output", tmp_path / "x", "--unguarded", "--layer", 1, *options]
    export.main([*map(str, arguments), "--kv-cache", "int8"], standalone_mode=False)
    checks = Manifest.load(tmp_path / "x").validation["CPUExecutionProvider"]
    assert all(check.passed for check in checks)
