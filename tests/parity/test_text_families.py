"""Tiny random text models with tokenizer and template of the hub's kind, compared with Hugging Face.

- `gemma3`: four norms a layer, whose weights count from 1; windows in most layers, which have frequencies of their own;
  scaled embeddings; GELU.
- `llama 3.2`: llama3's rope, and a dialogue that leaves the length for which the model was first trained.
- `ministral`: windows in some layers.
- `qwen3`: norms of queries and keys.
- `phi4 mini`: three quarters of each head rotated, by longrope; one end token more where no answer is to follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batched import Ask, together
from checkpoint_shapes.text_only import CHAT_TEMPLATE, GEMMA, PHI
from llama_tokenizer import gemma_tokenizer
from tiny_family import READ_IN_8_BITS, TinyFamily, randomise

from autosteer.export.checkpoint.decoder_config import DecoderConfig
from autosteer.export.checkpoint.open import DEMO
from autosteer.export.graphs.decoder import MLP_ACTIVATIONS
from autosteer.export.validation.original import ValidationPrompt
from autosteer.models import FAMILIES
from autosteer.models.text_only import AROUND
from autosteer.runtime.check import check_package
from autosteer.runtime.engine import Engine
from autosteer.runtime.errors import InputError
from autosteer.runtime.sampling import SamplingConfig
from autosteer.runtime.text import Message

LAYERS, WIDTH, WINDOW = 4, 64, 9
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
BEYOND = 160  # positions, that answers to short dialogues do not reach and long ones are behind


def gemma3() -> tuple[Any, Any, str]:
    import transformers as hf

    tokenizer = gemma_tokenizer()
    tokenizer.chat_template = GEMMA
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = hf.Gemma3TextConfig(
        vocab_size=len(tokenizer),
        **SIZES,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        rope_parameters=ropes,
    )
    return hf.Gemma3ForCausalLM(config), tokenizer, "<end_of_turn>"


def phi4_mini() -> tuple[Any, Any, str]:
    import transformers as hf

    names = {name: f"<|{name}|>" for name in ("system", "user", "assistant", "end")}
    tokenizer = hf.AutoTokenizer.from_pretrained(DEMO, extra_special_tokens=names)
    tokenizer.chat_template, tokenizer.eos_token = PHI, "<|endoftext|>"
    config = hf.Phi3Config(
        vocab_size=len(tokenizer),
        **SIZES | {"num_attention_heads": 1},
        num_key_value_heads=1,
        original_max_position_embeddings=BEYOND,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + 0.02 * i for i in range(24)],
            "long_factor": [1.5 + 0.7 * i for i in range(24)],
        },
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return hf.Phi3ForCausalLM(config), tokenizer, "<|end|>"


def llama3() -> tuple[Any, Any, str]:
    import transformers as hf

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    tokenizer = chatml()
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        **SIZES,
        num_key_value_heads=2,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
        tie_word_embeddings=True,
    )
    return hf.LlamaForCausalLM(config), tokenizer, "<|im_end|>"


def ministral() -> tuple[Any, Any, str]:
    import transformers as hf

    tokenizer = chatml()
    config = hf.MinistralConfig(
        vocab_size=len(tokenizer),
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["full_attention", *["sliding_attention"] * 3],
        tie_word_embeddings=True,
    )
    return hf.MinistralForCausalLM(config), tokenizer, "<|im_end|>"


def qwen3() -> tuple[Any, Any, str]:
    import transformers as hf

    tokenizer = chatml()
    config = hf.Qwen3Config(
        vocab_size=len(tokenizer), **SIZES, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True
    )
    return hf.Qwen3ForCausalLM(config), tokenizer, "<|im_end|>"


def chatml() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


MODELS = {"gemma3": gemma3, "llama 3.2": llama3, "ministral": ministral, "phi4 mini": phi4_mini, "qwen3": qwen3}
VARIANTS = tuple(MODELS)


def build_checkpoint(folder: Path, variant: str) -> None:
    """Random weights in Hugging Face's layout, bfloat16 as on the hub."""
    torch.manual_seed(0)
    model, tokenizer, end = MODELS[variant]()
    randomise(model, tokenizer.convert_tokens_to_ids(end))
    model.model.embed_tokens.weight.data /= WIDTH**0.5  # else a tied head would say the last token again
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


FAMILY = TinyFamily(build_checkpoint, width=WIDTH, split=2, prompts=12, pictures=False)


@pytest.fixture(scope="module", autouse=True)
def scratch() -> Iterator[None]:
    yield
    FAMILY.remove()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_answers_are_those_of_hugging_face(variant: str) -> None:
    FAMILY.check_answers(variant, 30)


def long_dialogue(turns: int) -> tuple[Message, ...]:
    """Of some hundred tokens: behind windows, and behind longrope's boundary."""
    text = "Subject to the terms and conditions of this license, each contributor grants you a copyright license. "
    asked = [Message.user(text * (turn + 1)) for turn in range(turns)]
    answered = [Message.assistant(f"answer {turn}") for turn in range(turns)]
    return tuple(message for pair in zip(asked, answered, strict=True) for message in pair)[:-1]


@pytest.mark.parametrize("turns", [1, 4, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_long_answers_to_long_dialogues_are_those_of_hugging_face(variant: str, turns: int) -> None:
    theirs = FAMILY.original_model(variant)
    expected = theirs.generate(theirs.inputs(ValidationPrompt(long_dialogue(turns), ())), tokens=64)
    assert FAMILY.generate(variant, long_dialogue(turns), 64) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_verdicts_and_what_is_said_after_them_are_the_authors(variant: str) -> None:
    FAMILY.check_gate(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_that_a_fit_reads_is_the_one_that_the_runtime_reads(variant: str, tmp_path: Path) -> None:
    """Phi's template ends a dialogue with one token more where no answer is to follow."""
    FAMILY.check_probed(variant, tmp_path)


@pytest.mark.parametrize("split_layer", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_split_layer(variant: str, split_layer: int, tmp_path: Path) -> None:
    FAMILY.check_split(variant, split_layer, tmp_path, long_dialogue(2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_on_disk(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILY.check_weights_on_disk(variant, monkeypatch)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", READ_IN_8_BITS, "int4 --calibrate builtin"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_quantised_package_exports_and_its_table_says_how_good_it_is(
    variant: str, precision: str, record_property: Any
) -> None:
    checks = FAMILY.table(variant, precision)
    assert all(check.passed for check in checks.values())
    for check in checks.values():
        record_property(check.name, check.value)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cpp_runtime_answers_alike(variant: str, precision: str, built: Path, tmp_path: Path) -> None:
    FAMILY.check_cpp(variant, built, tmp_path, precision=precision)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_answers_replay(variant: str) -> None:
    assert all(check.passed for check in check_package(FAMILY.engine(variant), FAMILY.package(variant, "fp32")).checks)


def test_gemma_has_no_system_turns() -> None:
    """Its template writes them into the first turn of the user, where nothing judges them by themselves."""
    engine = FAMILY.engine("gemma3")
    with pytest.raises(InputError, match="system"):
        engine.generate([Message("system", ("be kind",)), Message.user("hi")], policy=engine.policy("off"))


def test_windows_read_their_own_tables() -> None:
    """So that the tests around this one would see others."""
    engine: Engine = FAMILY.engine("gemma3")
    rotary = engine.manifest.rotary
    assert rotary.windowed and rotary.windowed != rotary.frequencies
    inputs = {tensor.name for tensor in engine.manifest.graphs["decoder_lower"].inputs}
    assert {"cos_cache", "sin_cache", "windowed_cos_cache", "windowed_sin_cache"} <= inputs


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"norm_offset": 0.0}, "attention, each by itself"),
        ({"scaled_embedding": False}, "inputs_embeds"),
        ({"layer_norms": lambda config: (AROUND[0], AROUND[3], AROUND[2], AROUND[1])}, "attention, each by itself"),
    ],
)
def test_a_wrong_fact_of_gemma_is_refused(
    facts: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "gemma3_text", dataclasses.replace(FAMILIES["gemma3_text"], **facts))
    FAMILY.check_unequal("gemma3", line, tmp_path)


def test_another_activation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MLP_ACTIVATIONS, "gelu_pytorch_tanh", MLP_ACTIVATIONS["silu"])
    FAMILY.check_unequal("gemma3", "MLP, each by itself", tmp_path)


def test_windows_that_read_the_other_tables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecoderConfig, "rotary_table", lambda config, layer: "")
    FAMILY.check_unequal("gemma3", "attention, each by itself", tmp_path)


def test_gemmas_answers_in_one_pass_are_those_alone() -> None:
    """Several answers read the same two pairs of tables, at positions of their own."""
    engine = FAMILY.engine("gemma3")
    asks = [Ask(list(FAMILY.dialogue(i)), SamplingConfig(max_tokens=24)) for i in range(6)]
    together(engine, asks)
    assert [one.said() for one in asks] == [one.alone(engine).said() for one in asks]
