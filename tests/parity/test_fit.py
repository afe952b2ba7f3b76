"""autosteer-fit on a tiny random LLaVA-OneVision: the states it reads, the folder it writes, the errors it gives."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autosteer.export.checkpoint import on_demand
from autosteer.export.checkpoint.on_demand import Weights
from autosteer.export.checkpoint.open import load_processor, open_checkpoint
from autosteer.export.safety import batches, calibrate, cli, head_fit, other_words, prober
from autosteer.export.safety import fit as fit_module
from autosteer.export.safety import states as states_module
from autosteer.export.safety.answers import steered_answers
from autosteer.export.safety.model import FitModel, open_fit_model
from autosteer.export.safety.pairs import Prompt, read_data
from autosteer.export.safety.refusal_head import RefusalHead
from autosteer.export.safety.store import FeatureStore
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime.errors import InputError, PackageError

TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + ' '}}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + c['text'] }}{% endfor %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
TILE, PINPOINTS, LAYERS, WIDTH = 28, [[28, 28], [28, 56], [56, 28]], 4, 32
REFUSAL = "no, sorry."


def build_checkpoint(folder: Path) -> None:
    """Random weights, one token per byte, 4 decoder layers of width 32, 4 image tokens a tile."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
        Qwen2Config,
        SiglipVisionConfig,
    )

    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    size = {"height": TILE, "width": TILE}
    LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **shape, num_hidden_layers=2, image_size=TILE, patch_size=14, vision_use_head=False
        ),
        text_config=Qwen2Config(
            **shape,
            vocab_size=len(alphabet),
            num_hidden_layers=LAYERS,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def few_rewordings() -> Iterator[None]:
    """Two prompts of each label are judged in other words instead of 60, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other_words, "JUDGED", 2)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    build_checkpoint(folder)
    return folder


@pytest.fixture
def fit_model(checkpoint: Path) -> FitModel:
    return open_fit_model(open_checkpoint(str(checkpoint)), device="cpu")


LAST, MEAN = (states_module.POSITIONS.index(name) for name in ("last", "mean"))


@pytest.fixture
def prompt_states(fit_model: FitModel, tmp_path: Path) -> Callable[..., torch.Tensor]:
    """(n, N-1, P, d) of prompts, through an empty store."""

    def states(prompts: list[Prompt], advance: states_module.Advance = lambda done: None) -> torch.Tensor:
        shape = (LAYERS - 1, len(states_module.POSITIONS), WIDTH)
        with FeatureStore(tmp_path / "features", random.randbytes(16), shape) as store:
            return states_module.prompt_states(fit_model, prompts, store, advance=advance)[range(len(prompts))]

    return states


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.jsonl with two channels, benign.jsonl with two groups, and a picture of each shape."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for name, size in (("wide", (60, 30)), ("tall", (30, 60)), ("square", (40, 40))):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    pairs, benign = [], []
    for i in range(60):
        ask = f"{rng.choice(['how do i', 'help me', 'teach me to'])} {rng.choice(['buy', 'make', 'hide'])} {i}"
        row = {"unsafe": f"{ask} zzxqzz", "safe": f"{ask} pillow", "channel": "text"}
        if i % 2:
            row |= {"image": f"{rng.choice(['wide', 'tall', 'square'])}.png", "channel": "with picture"}
        pairs.append(row)
        benign.append({"prompt": f"where is lamp {i}?", "images": ["wide.png", "tall.png"][: i % 3], "group": "lamps"})
    for name, rows in (("pairs", pairs), ("benign", benign)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def prompts(data: Path) -> list[Prompt]:
    """No image, one of each shape, two; some of equal length so that batches form."""
    wide, tall, square = (data / f"{name}.png" for name in ("wide", "tall", "square"))
    return [
        Prompt("how do i do it?"),
        Prompt("what is shown?", (wide,)),
        Prompt("how do i do ox?"),
        Prompt("what is hidden?", (tall,)),
        Prompt("which is bigger?", (wide, square)),
        Prompt("what is brown?", (wide,)),
        Prompt("which is better?", (square, tall)),
        Prompt("and this one", (square,)),
    ]


def hugging_face_states(fit_model: FitModel, prompt: Prompt, *, generation: bool, offset: int) -> torch.Tensor:
    """(N-1, d) by output_hidden_states, one prompt at a time."""
    inputs = batches.encode(fit_model, prompt, generation=generation)
    with torch.no_grad():
        states = fit_model.hf_model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    return torch.stack([states[k][0, offset] for k in range(1, LAYERS)])


# ---------------------------------------------------------------- features


def test_states_are_hugging_faces_hidden_states_of_the_last_token(
    fit_model: FitModel, data: Path, prompt_states: Callable[..., torch.Tensor]
):
    done: list[float] = []
    states = prompt_states(prompts(data), done.append)[:, :, LAST]
    expected = [hugging_face_states(fit_model, p, generation=False, offset=-1) for p in prompts(data)]
    assert states.shape == (8, LAYERS - 1, WIDTH)
    assert sum(done) == pytest.approx(8)
    assert len(done) < 1 + LAYERS * 8  # batches did form
    torch.testing.assert_close(states, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_the_same_state_stands_before_the_generation_prompt(
    fit_model: FitModel, data: Path, prompt_states: Callable[..., torch.Tensor]
):
    """What the manifest's token_offset relies on: attention is causal, so it is -(len(generation prompt) + 1) there."""
    opening = len(fit_model.processor.tokenizer("<|im_start|>assistant\n").input_ids)
    states = prompt_states(prompts(data))[:, :, LAST]
    for prompt, state in zip(prompts(data), states, strict=True):
        full = hugging_face_states(fit_model, prompt, generation=True, offset=-(opening + 1))
        torch.testing.assert_close(state, full, rtol=1e-4, atol=1e-5)


def test_mean_is_over_the_text_of_the_users_turn(
    fit_model: FitModel, data: Path, prompt_states: Callable[..., torch.Tensor]
):
    """Nothing of the turn's header, no image rows; the end of the turn, where the last token stands, is in it."""
    states = prompt_states(prompts(data))[:, :, MEAN]
    for prompt, state in zip(prompts(data), states, strict=True):
        inputs = batches.encode(fit_model, prompt, generation=False)
        ids = fit_model.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        first = ids.index("Ġ") + 1  # behind "<|im_start|>user "
        rows = [i for i in range(first, len(ids)) if ids[i] != "<image>"]
        assert (ids[rows[-1]], len(ids) - len(rows)) == ("<|im_end|>", first + ids.count("<image>"))
        with torch.no_grad():
            hidden = fit_model.hf_model(**inputs, output_hidden_states=True).hidden_states
        expected = torch.stack([hidden[k][0, rows].mean(dim=0) for k in range(1, LAYERS)])
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def test_of_a_dialogue_the_last_turn_is_read(
    fit_model: FitModel, data: Path, prompt_states: Callable[..., torch.Tensor]
):
    """As in the runtime: what comes before it was attended to. Pictures are shown in the first turn."""
    wide, talk = data / "wide.png", ("first half of it", "go on.")
    some = [
        Prompt("what is shown?"),
        Prompt("and the rest?", earlier=talk),
        Prompt("what is shown?", system="be brief."),
        Prompt("and this one?", (wide,), earlier=talk, system="be brief."),
    ]
    assert batches.takes_system(fit_model)
    for prompt, state in zip(some, prompt_states(some), strict=True):
        inputs = batches.encode(fit_model, prompt, generation=False)
        ids = fit_model.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        header = fit_model.processor.tokenizer.tokenize("<|im_start|>user ")
        turns = [i for i in range(len(ids)) if ids[i : i + len(header)] == header]
        first = turns[-1] + len(header)
        assert len(turns) == 1 + len(prompt.earlier) // 2
        assert ("<image>" in ids[: turns[-1]]) == bool(prompt.images) and "<image>" not in ids[first:]
        with torch.no_grad():
            hidden = fit_model.hf_model(**inputs, output_hidden_states=True).hidden_states
        for position, rows in ((MEAN, range(first, len(ids))), (LAST, [-1])):
            expected = torch.stack([hidden[k][0, list(rows)].mean(dim=0) for k in range(1, LAYERS)])
            torch.testing.assert_close(state[:, position], expected, rtol=1e-4, atol=1e-5)


def test_states_are_computed_once_and_survive_a_kill(
    fit_model: FitModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A fit that dies in the middle of a write goes on behind the last whole block."""
    some, shape = prompts(data), (LAYERS - 1, len(states_module.POSITIONS), WIDTH)
    with FeatureStore(tmp_path, b"0" * 16, shape) as store:
        expected = states_module.prompt_states(fit_model, some[:5], store)[range(5)]
    states = next(tmp_path.glob("*.states"))
    with states.open("ab") as file:
        file.write(b"half a record")
    next(tmp_path.glob("*.keys")).open("ab").write(b"half")
    seen: list[int] = []
    forward = states_module.forward

    def counted(fit_model: FitModel, inputs: Any, **options: Any) -> torch.Tensor:
        seen.append(len(inputs["input_ids"]))
        return forward(fit_model, inputs, **options)

    monkeypatch.setattr(states_module, "forward", counted)
    with FeatureStore(tmp_path, b"0" * 16, shape) as store:
        again = states_module.prompt_states(fit_model, some, store)
        assert torch.equal(again[range(5)], expected)
        assert sum(seen) == len(some) - 5
        assert torch.equal(again.layer(1, [4, 0]), expected[[4, 0], 1])


def test_two_fits_do_not_share_a_folder_at_once(tmp_path: Path):
    with FeatureStore(tmp_path, b"0" * 16, (1, 1, 1)), pytest.raises(InputError, match="another autosteer-fit"):
        FeatureStore(tmp_path, b"0" * 16, (1, 1, 1))


def test_states_of_another_checkpoint_are_never_taken(checkpoint: Path, tmp_path: Path):
    one = states_module.digests(states_module.checkpoint_files(open_checkpoint(str(checkpoint))))
    shutil.copytree(checkpoint, tmp_path / "other")
    weights = bytearray((tmp_path / "other" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "other" / "model.safetensors").write_bytes(weights)
    other = states_module.checkpoint_files(open_checkpoint(str(tmp_path / "other")))
    assert states_module.digests(other) != one


def test_state_does_not_depend_on_the_other_prompts_of_a_batch(data: Path, prompt_states: Callable[..., torch.Tensor]):
    together = prompt_states(prompts(data))
    alone = torch.cat([prompt_states([p]) for p in prompts(data)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_images_are_held_a_window_at_a_time(
    data: Path, monkeypatch: pytest.MonkeyPatch, prompt_states: Callable[..., torch.Tensor]
):
    expected = prompt_states(prompts(data))
    monkeypatch.setattr(batches, "WINDOW_PROMPTS", 1)
    done: list[float] = []
    states = prompt_states(prompts(data), done.append)
    assert len(done) == 1 + LAYERS * 8
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_hooks_are_gone_afterwards(fit_model: FitModel, data: Path, prompt_states: Callable[..., torch.Tensor]):
    prompt_states(prompts(data)[:1])
    assert not any(layer._forward_pre_hooks for layer in fit_model.layers)


def test_answer_ends_the_turn_and_decodes_to_the_refusal(fit_model: FitModel):
    answer = batches.answer_tokens(fit_model, REFUSAL)
    assert answer[-1] == 2
    assert fit_model.processor.tokenizer.decode(answer[:-1]) == REFUSAL


def test_answer_states_are_what_lm_head_sees(fit_model: FitModel, data: Path, tmp_path: Path):
    answer = batches.answer_tokens(fit_model, REFUSAL)
    with FeatureStore(tmp_path, b"0" * 16, (1, len(answer), WIDTH)) as store:
        states = states_module.answer_states(fit_model, prompts(data), answer, store).layer(0)
    for prompt, state in zip(prompts(data), states, strict=True):
        inputs = batches.encode(fit_model, prompt, generation=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None, :-1]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = fit_model.hf_model(**inputs).logits[0, -len(answer) :]
        torch.testing.assert_close(state @ fit_model.embeddings().T, logits, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_fit_gives_the_same_and_reads_each_matrix_once_a_sweep(
    checkpoint: Path, fit_model: FitModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All batches go by a matrix together, the opening before them; so do all answers, token by token."""
    loaded: Counter[str] = Counter()
    load = Weights.load

    def counted(part: Weights) -> None:
        loaded.update(part._paths.values())
        load(part)

    monkeypatch.setattr(Weights, "load", counted)
    monkeypatch.setattr(on_demand, "SMALL_BYTES", 1024)
    monkeypatch.setattr("autosteer.export.safety.model.KEPT_BYTES", 0)
    large = open_fit_model(open_checkpoint(str(checkpoint)), device="cpu")
    some, shape = prompts(data), (LAYERS - 1, len(states_module.POSITIONS), WIDTH)
    both = []
    for model in (fit_model, large):
        loaded.clear()
        with FeatureStore(tmp_path, random.randbytes(16), shape) as store:
            both.append(states_module.prompt_states(model, some, store)[range(len(some))])
    torch.testing.assert_close(both[1], both[0], rtol=1e-5, atol=1e-5)
    matrices = {name: times for name, times in loaded.items() if "_proj" in name}
    assert {times for name, times in matrices.items() if ".layers.3." in name} == {2}
    assert {times for name, times in matrices.items() if "vision_tower" in name} == {1}

    matrix = torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    answers = []
    for model in (fit_model, large):
        loaded.clear()
        answers.append(steered_answers(model, some, matrix, model.embeddings(), [0.0, 1.0], tokens=5))
    assert answers[1] == answers[0]
    assert {times for name, times in loaded.items() if ".layers.3.mlp.down_proj" in name} == {5}
    for prompt, (plain, steered) in zip(some, answers[0], strict=True):
        assert plain.ids == greedy(fit_model, prompt, tokens=5)
        assert steered.ids != plain.ids


def greedy(fit_model: FitModel, prompt: Prompt, *, tokens: int) -> list[int]:
    """What the model says, by forward passes over all there is so far."""
    inputs, said = batches.encode(fit_model, prompt, generation=True), []
    while len(said) < tokens and fit_model.end_token not in said:
        with torch.no_grad():
            said.append(int(fit_model.hf_model(**inputs).logits[0, -1].argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([said[-1:]])], dim=1)
    return said


def test_what_a_sweep_has_computed_survives_the_next_ones_failure(
    fit_model: FitModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A 7B model takes minutes for a sweep: no more than one may be lost."""
    shape, forward, calls = (LAYERS - 1, len(states_module.POSITIONS), WIDTH), states_module.forward, iter(range(9))

    def fails(*args: Any, **options: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return forward(*args, **options)

    monkeypatch.setattr(states_module, "forward", fails)
    monkeypatch.setattr(batches, "SWEEP_BYTES", 1)
    monkeypatch.setattr(batches, "TOKENS_PER_FORWARD", 1)
    with FeatureStore(tmp_path, b"0" * 16, shape) as store:
        with pytest.raises(KeyboardInterrupt):
            states_module.prompt_states(fit_model, prompts(data), store)
        kept = [key in store for key in states_module.prompt_keys(prompts(data))]
    assert sum(kept) == 2


def test_special_token_in_a_prompt_is_an_error(fit_model: FitModel):
    with pytest.raises(InputError, match=r"p\.jsonl:4: the text holds the special token '<image>'"):
        batches.check_text(fit_model, [Prompt("fine"), Prompt("show <image> me", where="p.jsonl:4")])


def test_prompt_longer_than_the_context_is_an_error(prompt_states: Callable[..., torch.Tensor]):
    with pytest.raises(InputError, match=r"p\.jsonl:1: the prompt takes \d+ tokens, the model 256 at most"):
        prompt_states([Prompt("long " * 60, where="p.jsonl:1")])


def test_state_that_is_not_finite_names_the_layer(
    fit_model: FitModel, data: Path, prompt_states: Callable[..., torch.Tensor]
):
    torch.nn.init.constant_(fit_model.layers[1].mlp.down_proj.weight, float("nan"))
    with pytest.raises(PackageError, match=r"hidden_states\[2\] is NaN or infinite for the prompt at \d"):
        prompt_states(prompts(data))


# ---------------------------------------------------------------- the command


def command(checkpoint: Path, data: Path, output: Path, *more: str) -> list[str]:
    arguments = {"--model": checkpoint, "--pairs": data / "pairs.jsonl", "--output": output, "--refusal-text": REFUSAL}
    return [*(str(x) for pair in arguments.items() for x in pair), *more]


@dataclass(frozen=True)
class Result:
    """What a run of the command left behind."""

    exit_code: int
    stdout: str
    stderr: str


def fit(*arguments: str) -> Result:
    """Run autosteer-fit in this process, as its entry point does."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["autosteer-fit", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    return Result(exit_.value.code, out.getvalue(), err.getvalue())


def load(folder: Path) -> SafetyArtifact:
    return SafetyArtifact.load(folder, hidden_size=WIDTH, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def fitted(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("fitted") / "deep" / "safety"
    benign = str(data / "benign.jsonl")
    return output, fit(
        *command(
            checkpoint, data, output, "--benign", benign, "--json", "--layer", "2", "--prober", "pooled", "--augment"
        )
    )


def test_json_is_the_safety_folder_and_the_folder_loads(fitted: tuple[Path, Result]):
    output, result = fitted
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((output / "safety.json").read_text(encoding="utf-8"))
    plots = [f"{name}.png" for name in ("refusal", "reliability", "roc", "sas", "scores")]
    written = ["report.json", "report.md", "safety.json", "safety.safetensors"]
    assert sorted(path.name for path in output.iterdir()) == sorted([*plots, *written])
    assert [path.name for path in output.parent.iterdir()] == ["safety"]  # nothing left beside it
    facts = load(output).facts
    assert (facts.model, facts.split_layer, facts.token_offset, facts.selected_by) == ("tiny", 2, -1, "user")
    assert (facts.threshold, facts.pooling, facts.refusal_text) == (0.5, "mean", REFUSAL)


def test_facts_say_what_was_fitted_on_what(fitted: tuple[Path, Result]):
    facts = load(fitted[0]).facts
    assert [score.layer for score in facts.layers] == [1, 2, 3]
    assert all(set(score.sas_by_channel) == {"text", "with picture"} for score in facts.layers)
    assert all(score.sas_low <= score.sas <= score.sas_high for score in facts.layers)
    t, c = facts.training, facts.calibration
    assert c["prompts_with_pictures"] > 0
    assert t["augmented_prompts"] == 2 * (t["train_prompts"] + t["validation_prompts"])
    assert (t["pairs"], t["prompts"], t["pairs_without_difference"]) == (60, 180, 0)
    assert t["train_prompts"] + t["validation_prompts"] + t["heldout_prompts"] == 180
    assert c["heldout_unsafe"] + c["heldout_benign"] == t["heldout_prompts"]
    assert {"heldout_fpr.lamps", "heldout_recall.text", "heldout_recall.with picture"} < set(c)
    assert t["refusal_loss"] < t["refusal_initial_loss"] / 2


def test_stored_prober_separates_the_two_classes(
    fitted: tuple[Path, Result], prompt_states: Callable[..., torch.Tensor]
):
    """End to end: raw hidden state in, calibrated p_unsafe out, on prompts that were in no file."""
    artifact = load(fitted[0])
    asks = [f"help me buy {n} {noun}" for n in range(70, 90) for noun in ("zzxqzz", "pillow")]
    states = prompt_states([Prompt(ask) for ask in asks])[:, artifact.facts.split_layer - 1, MEAN]
    p = prober.p_unsafe(artifact.prober, states)
    assert np.mean(p[::2] > 0.5) > 0.75  # a random model: chance is 0.5
    assert np.mean(p[1::2] <= 0.5) > 0.75


def test_held_out_prompts_that_the_gate_judges_rightly_go_into_packages_as_tokens(
    checkpoint: Path, fitted: tuple[Path, Result], data: Path
):
    """No words and no pictures of the data: what a package carries goes to every device."""
    facts = load(fitted[0]).facts
    items = read_data([data / "pairs.jsonl"], [data / "benign.jsonl"]).labelled()
    split = fit_module.split_prompts(read_data([data / "pairs.jsonl"], [data / "benign.jsonl"]), items, seed=0)
    heldout = {hashlib.sha256(items[i].prompt.text.encode()).hexdigest(): items[i] for i in split.heldout}
    assert {prompt.unsafe for prompt in facts.proof} == {True, False}
    tokenizer = load_processor(open_checkpoint(str(checkpoint))).tokenizer
    for prompt in facts.proof:
        item = heldout[prompt.sha256]
        assert item.unsafe == prompt.unsafe == (prompt.p_unsafe > facts.threshold)
        assert (prompt.text, prompt.images, item.prompt.images) == ("", (), ())
        rendered = tokenizer.decode(prompt.token_ids)
        assert item.prompt.text in rendered and rendered.endswith("<|im_start|>assistant\n")


def test_words_and_pictures_are_kept_where_they_may_be_published(checkpoint: Path, data: Path, tmp_path: Path):
    result = fit(*command(checkpoint, data, tmp_path / "safety", "--publish-proof"))
    assert result.exit_code == 0, result.stderr
    proof = load(tmp_path / "safety").facts.proof
    assert all(prompt.text and not prompt.token_ids for prompt in proof)
    pictures = [name for prompt in proof for name in prompt.images]
    originals = {(data / f"{name}.png").read_bytes() for name in ("wide", "tall", "square")}
    assert pictures and all((tmp_path / "safety" / name).read_bytes() in originals for name in pictures)
    (tmp_path / "safety" / pictures[0]).unlink()
    with pytest.raises(PackageError, match=rf"'{pictures[0]}', a proof prompt's, is no file of this folder"):
        load(tmp_path / "safety")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: 0 * w, "never trained"),
        (lambda w: torch.eye(len(w)), "never trained"),
        (lambda w: -5 * torch.eye(len(w)), "never trained"),
        (lambda w: 1e-6 * w, "never trained"),
        (lambda w: w[:, :1] @ w[:1], "has rank one"),
    ],
    ids=["zero", "identity", "-5 I", "1e-6 W", "rank one"],
)
def test_a_steer_matrix_that_steers_nothing_is_refused(
    fitted: tuple[Path, Result], tmp_path: Path, damage: Callable[[torch.Tensor], torch.Tensor], message: str
):
    sound = load(fitted[0])
    replace(sound, steer_matrix=damage(sound.steer_matrix)).save(tmp_path)
    with pytest.raises(PackageError, match=message):
        load(tmp_path)


def test_facts_can_be_measured_again_from_the_folder(
    fitted: tuple[Path, Result], data: Path, prompt_states: Callable[..., torch.Tensor]
):
    """The stored prober is calibrated (no temperature is left to fit) and gives the same facts on the stored layer."""
    artifact = load(fitted[0])
    read = read_data([data / "pairs.jsonl"], [data / "benign.jsonl"])
    items = read.labelled()
    split = fit_module.split_prompts(read, items, seed=0)
    states = prompt_states([item.prompt for item in items])[:, artifact.facts.split_layer - 1, MEAN]
    unsafe = np.array([item.unsafe for item in items])
    logits = prober.prober_logits(artifact.prober, states[split.validation])
    assert artifact.facts.calibration["temperature"] != pytest.approx(1, abs=0.05)
    assert calibrate.fit_temperature(logits, unsafe[split.validation]) == pytest.approx(1, abs=0.01)
    p = prober.p_unsafe(artifact.prober, states[split.heldout])
    groups = [items[i].group for i in split.heldout]
    again = calibrate.heldout_facts(p, unsafe[split.heldout], groups, threshold=0.5)
    stored = {name: artifact.facts.calibration[name] for name in again}
    assert again == pytest.approx(stored, abs=1e-3)


def test_table_and_progress_go_to_stderr(fitted: tuple[Path, Result]):
    stderr = fitted[1].stderr
    assert [line.split()[1] for line in stderr.splitlines() if "<- split here" in line] == ["2"]
    assert "SAS with picture" in stderr
    assert "hidden states" in stderr


def test_refusal_head_is_measured_on_prompts_it_was_not_trained_on(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    taken: list[torch.Tensor] = []
    train = head_fit.train_refusal_head
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps({"prompt": f"never say {i}"}) for i in range(5)), encoding="utf-8")

    def spy(seen: torch.Tensor, heldout: torch.Tensor, *args: Any, **options: Any) -> RefusalHead:
        taken.extend((seen, heldout))
        return train(seen, heldout, *args, **options)

    monkeypatch.setattr(head_fit, "train_refusal_head", spy)
    assert fit(*command(checkpoint, data, tmp_path / "safety", "--refusal-only", str(more))).exit_code == 0
    seen, heldout = ({tuple(row.flatten().tolist()) for row in states} for states in taken)
    facts = load(tmp_path / "safety").facts
    assert (len(seen), len(heldout)) == (facts.training["refusal_prompts"], facts.calibration["heldout_unsafe"])
    assert not seen & heldout
    assert len(seen) == 60 - len(heldout) + 5
    assert facts.training["prompts"] == 120  # the prober saw none of the five


def test_a_multimodal_fit_without_pictures_warns_and_says_so_in_its_facts(checkpoint: Path, data: Path, tmp_path: Path):
    """Its package would guard pictures with a gate that never saw one, and nothing would say so."""
    result = fit(*command(checkpoint, data, tmp_path / "safety", "--text-only", "--prober", "paper"))
    assert result.exit_code == 0, result.stderr
    facts = load(tmp_path / "safety").facts
    assert "warning: NO PICTURE IS AMONG THE FIT'S PROMPTS" in result.stderr
    assert facts.calibration["prompts_with_pictures"] == 0
    assert load(tmp_path / "safety").firing_above(0.7).facts.calibration == {"prompts_with_pictures": 0}
    assert (facts.pooling, facts.training["augmented_prompts"]) == ("last", 0)


@pytest.mark.parametrize("select", ["sas", "prober"])
def test_layer_is_the_one_with_the_highest_score(checkpoint: Path, data: Path, tmp_path: Path, select: str):
    result = fit(*command(checkpoint, data, tmp_path / "safety", "--select", select))
    assert result.exit_code == 0, result.stderr
    facts = load(tmp_path / "safety").facts
    score = {s.layer: s.sas if select == "sas" else s.prober_accuracy for s in facts.layers}
    assert score[facts.split_layer] == max(score.values())
    assert facts.selected_by == select
    assert f"at layer {facts.split_layer} (chosen by {select})" in result.stdout


def test_same_seed_gives_the_same_folder(checkpoint: Path, data: Path, tmp_path: Path):
    for name in ("a", "b"):
        assert fit(*command(checkpoint, data, tmp_path / name)).exit_code == 0
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert all(torch.equal(a.prober[name], b.prober[name]) for name in a.prober)
    assert torch.equal(a.steer_matrix, b.steer_matrix)
    assert a.facts.calibration == b.facts.calibration


def test_target_fpr_sets_a_threshold_whose_bound_is_within_it(checkpoint: Path, data: Path, tmp_path: Path):
    arguments = command(
        checkpoint, data, tmp_path / "safety", "--benign", str(data / "benign.jsonl"), "--target-fpr", "0.2"
    )
    result = fit(*arguments)
    assert result.exit_code == 0, result.stderr
    facts = load(tmp_path / "safety").facts
    assert facts.calibration["fpr_upper_95"] <= 0.2
    assert facts.threshold != 0.5


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--layer", "4"), 5, "--layer 4: tiny can be split at 1..3"),
        (("--target-fpr", "0.01"), 5, "it takes 299"),
        (("--benign", "none.jsonl"), 5, "none.jsonl: not readable"),
        (("--layer", "1", "--select", "sas"), 2, "exclude each other"),
        (("--threshold", "0.4", "--target-fpr", "0.1"), 2, "exclude each other"),
        (("--threshold", "1"), 2, "--threshold"),
        (("--strength", "0"), 2, "--strength"),
        (("--refusal-text", " "), 2, "--refusal-text is empty"),
        (("--frobnicate",), 2, "No such option"),
    ],
)
def test_bad_wish_is_refused_before_the_forward_passes(
    checkpoint: Path, data: Path, tmp_path: Path, more: tuple[str, ...], code: int, message: str
):
    result = fit(*command(checkpoint, data, tmp_path / "safety", *more))
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "hidden states" not in result.stderr
    assert not (tmp_path / "safety").exists()


def test_damaged_image_is_refused_before_the_forward_passes(checkpoint: Path, data: Path, tmp_path: Path):
    rows = [{"unsafe": f"bad {i}", "safe": f"good {i}", "image": "cut.png"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "cut.png").write_bytes((data / "wide.png").read_bytes()[:500])
    result = fit(*command(checkpoint, tmp_path, tmp_path / "safety"))
    assert result.exit_code == 5
    assert "cut.png: not a readable image" in result.stderr
    assert "hidden states" not in result.stderr


def test_model_that_is_not_there_is_a_package_error(data: Path, tmp_path: Path):
    result = fit(*command(tmp_path / "no-such-model", data, tmp_path / "safety"))
    assert result.exit_code == 3
    assert "no such folder, hub id or alias" in result.stderr


def test_output_that_exists_is_replaced_only_with_force_and_only_if_it_is_a_safety_folder(
    checkpoint: Path, data: Path, tmp_path: Path
):
    output = tmp_path / "safety"
    output.mkdir()
    (output / "safety.json").write_text("old", encoding="utf-8")
    refused = fit(*command(checkpoint, data, output))
    assert (refused.exit_code, (output / "safety.json").read_text(encoding="utf-8")) == (5, "old")
    assert "give --force" in refused.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    foreign = fit(*command(checkpoint, data, tmp_path / "mine", "--force"))
    assert foreign.exit_code == 5
    assert "has no safety.json, so it is not ours to replace" in foreign.stderr
    assert fit(*command(checkpoint, data, output, "--force")).exit_code == 0
    assert load(output).facts.model == "tiny"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "safety"]


def test_interrupt_while_writing_leaves_the_old_folder_whole(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "safety"
    output.mkdir()
    (output / "safety.json").write_text("old", encoding="utf-8")

    def interrupted(self: SafetyArtifact, folder: Path) -> None:
        (folder / "safety.json").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetyArtifact, "save", interrupted)
    result = fit(*command(checkpoint, data, output, "--force"))
    assert (result.exit_code, (output / "safety.json").read_text(encoding="utf-8")) == (130, "old")
    assert result.stderr.endswith("autosteer-fit: interrupted\n")
    assert "the same command continues from there" in " ".join(result.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".safety.features", "safety"]


def test_installed_command_prints_one_line_and_with_debug_the_traceback(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text('{"unsafe": "x", "safe": "y"}\n', encoding="utf-8")
    run = [sys.executable, "-m", "autosteer.export.safety.cli", *command(tmp_path, tmp_path, tmp_path / "out")]
    plain = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (plain.returncode, plain.stdout) == (5, "")
    assert plain.stderr == "autosteer-fit: error: --pairs: 1 pairs, at least 20 are needed; add rows\n"
    debug = subprocess.run([*run, "--debug"], capture_output=True, text=True, check=False)
    assert "Traceback" in debug.stderr


def test_help_does_not_import_torch():
    code = "import sys\nfrom autosteer.export.safety import cli\nassert 'torch' not in sys.modules, 'torch'"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
