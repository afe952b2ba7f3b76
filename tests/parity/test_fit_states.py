"""The hidden states that autosteer-fit reads, on a tiny random LLaVA-OneVision: Hugging Face's, kept on disk."""

from __future__ import annotations

import functools
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_fit
import torch
from tiny_fit import LAYERS, REFUSAL, WIDTH

from autosteer.export.checkpoint import on_demand
from autosteer.export.checkpoint.on_demand import Weights
from autosteer.export.checkpoint.open import open_checkpoint
from autosteer.export.safety import batches
from autosteer.export.safety import states as states_module
from autosteer.export.safety.answers import steered_answers
from autosteer.export.safety.model import FitModel, open_fit_model
from autosteer.export.safety.pairs import Prompt
from autosteer.export.safety.store import StateStore
from autosteer.runtime.errors import InputError, PackageError

LAST, MEAN = (states_module.POOLINGS.index(name) for name in ("last", "mean"))


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return tiny_fit.checkpoint()


@pytest.fixture(scope="module")
def data() -> Path:
    return tiny_fit.data()


@pytest.fixture
def fit_model(checkpoint: Path) -> FitModel:
    return open_fit_model(open_checkpoint(str(checkpoint)), device="cpu")


@pytest.fixture
def prompt_states(fit_model: FitModel, tmp_path: Path) -> Callable[..., torch.Tensor]:
    return functools.partial(tiny_fit.states_of, fit_model, tmp_path)


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
    some, shape = prompts(data), (LAYERS - 1, len(states_module.POOLINGS), WIDTH)
    with StateStore(tmp_path, b"0" * 16, shape) as store:
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
    with StateStore(tmp_path, b"0" * 16, shape) as store:
        again = states_module.prompt_states(fit_model, some, store)
        assert torch.equal(again[range(5)], expected)
        assert sum(seen) == len(some) - 5
        assert torch.equal(again.layer(1, [4, 0]), expected[[4, 0], 1])


def test_fast_products_are_used_for_a_fast_store_alone_and_turned_off_again(
    fit_model: FitModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a machine without bfloat16 products the states are equal; elsewhere they are nearly."""
    seen: list[str] = []
    forward = states_module.forward

    def noting(fit_model: FitModel, inputs: Any, **options: Any) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return forward(fit_model, inputs, **options)

    def overflow(*args: Any, **options: Any) -> torch.Tensor:
        raise PackageError("not finite")

    monkeypatch.setattr(states_module, "forward", noting)
    some, found = prompts(data), list[torch.Tensor]()
    for fast, precision in ((False, "highest"), (True, "medium")):
        with states_module.prompt_store(tmp_path, [], fit_model, fast=fast) as store:
            found.append(states_module.prompt_states(fit_model, some, store)[range(len(some))])
        assert set(seen) == {precision}, "a fast store must not hand out exact states, nor the other way round"
        seen.clear()
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()
    monkeypatch.setattr(states_module, "forward", overflow)
    failing = states_module.prompt_store(tmp_path / "fails", [], fit_model, fast=True)
    with failing as store, pytest.raises(PackageError):
        states_module.prompt_states(fit_model, some, store)
    assert torch.get_float32_matmul_precision() == "highest"


def test_two_fits_do_not_share_a_folder_at_once(tmp_path: Path):
    with StateStore(tmp_path, b"0" * 16, (1, 1, 1)), pytest.raises(InputError, match="another autosteer-fit"):
        StateStore(tmp_path, b"0" * 16, (1, 1, 1))


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
    with StateStore(tmp_path, b"0" * 16, (1, len(answer), WIDTH)) as store:
        states = states_module.answer_states(fit_model, prompts(data), answer, store).layer(0)
    for prompt, state in zip(prompts(data), states, strict=True):
        inputs = batches.encode(fit_model, prompt, generation=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None, :-1]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = fit_model.hf_model(**inputs).logits[0, -len(answer) :]
        torch.testing.assert_close(state @ fit_model.lm_head().T, logits, rtol=1e-4, atol=1e-4)


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
    some, shape = prompts(data), (LAYERS - 1, len(states_module.POOLINGS), WIDTH)
    both = []
    for model in (fit_model, large):
        loaded.clear()
        with StateStore(tmp_path, random.randbytes(16), shape) as store:
            both.append(states_module.prompt_states(model, some, store)[range(len(some))])
    torch.testing.assert_close(both[1], both[0], rtol=1e-5, atol=1e-5)
    matrices = {name: times for name, times in loaded.items() if "_proj" in name}
    assert {times for name, times in matrices.items() if ".layers.3." in name} == {2}
    assert {times for name, times in matrices.items() if "vision_tower" in name} == {1}

    matrix = torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    answers = []
    for model in (fit_model, large):
        loaded.clear()
        answers.append(steered_answers(model, some, matrix, model.lm_head(), [0.0, 1.0], tokens=5))
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
    shape, forward, calls = (LAYERS - 1, len(states_module.POOLINGS), WIDTH), states_module.forward, iter(range(9))

    def fails(*args: Any, **options: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return forward(*args, **options)

    monkeypatch.setattr(states_module, "forward", fails)
    monkeypatch.setattr(batches, "SWEEP_BYTES", 1)
    monkeypatch.setattr(batches, "TOKENS_PER_FORWARD", 1)
    with StateStore(tmp_path, b"0" * 16, shape) as store:
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
