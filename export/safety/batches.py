"""Render prompts, encode them, and group them into batches.

Prompts are padded on the right. Attention is causal, so no token sees the padding, and the rest of a batch changes a
hidden state only by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image

from autosteer.export.checkpoint.chat_template import Renderer
from autosteer.export.checkpoint.layer_sweep import grouped
from autosteer.runtime.errors import InputError
from autosteer.runtime.image import open_image

from .model import Encoded, FitModel
from .pairs import Prompt

T = TypeVar("T")

TOKENS_PER_FORWARD = 2048  # bounds activations, not quality
WINDOW_BYTES = 256 << 20  # preprocessed images held at a time
WINDOW_PROMPTS = 512
SWEEP_BYTES = 512 << 20  # activations of forward passes that share a sweep
IMAGE_ACTIVATIONS = (
    16  # times the bytes of an image's pixels: a SigLIP patch of 3 x 14 x 14 has d 1152 and an MLP of 4304
)


@dataclass(frozen=True)
class Batch:
    """Prompts of one forward pass."""

    rows: list[int]  # indices of the prompts
    inputs: Encoded  # input_ids (B, S), padded on the right; images
    lengths: torch.Tensor  # (B,) tokens of each prompt


def check_text(fit_model: FitModel, prompts: Sequence[Prompt]) -> None:
    """Raise InputError for a prompt whose text holds a special token: Hugging Face would read `<image>` as an image."""
    special = fit_model.processor.tokenizer.get_added_vocab()
    for prompt in prompts:
        if found := [token for token in special if token in prompt.text]:
            raise InputError(f"{prompt.where}: the text holds the special token {found[0]!r}; take it out")


def render(fit_model: FitModel, prompt: Prompt, *, generation: bool) -> str:
    """The checkpoint's chat template around one user turn, images first."""
    content = [*({"type": "image"} for _ in prompt.images), {"type": "text", "text": prompt.text}]
    text: str = fit_model.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=generation, tokenize=False
    )
    return text


def encode(fit_model: FitModel, prompt: Prompt, *, generation: bool) -> Encoded:
    """Model inputs of one prompt, batch dimension 1. Raises InputError for one longer than the model's context."""
    images = [[Image.fromarray(open_image(path)) for path in prompt.images]] if prompt.images else None
    text = render(fit_model, prompt, generation=generation)
    encoded = dict(fit_model.processor(text=[text], images=images, return_tensors="pt"))
    encoded.pop("attention_mask", None)  # nothing to hide: padding comes last, and attention is causal
    _check_length(fit_model, prompt, encoded["input_ids"].shape[1])
    return encoded


def _check_length(fit_model: FitModel, prompt: Prompt, tokens: int) -> None:
    if tokens > (limit := fit_model.decoder.context_length):
        raise InputError(f"{prompt.where}: the prompt takes {tokens} tokens, the model {limit} at most; shorten it")


def about_tokens(fit_model: FitModel, prompts: Sequence[Prompt], *, generation: bool) -> list[int]:
    """Estimate how many tokens each prompt takes; images are assumed to take as many as in the first such prompt.

    Raises InputError for a text longer than the model's context, before the first forward pass.
    """
    texts = [render(fit_model, prompt, generation=generation) for prompt in prompts]
    lengths = [len(ids) for ids in fit_model.processor.tokenizer(texts, add_special_tokens=False).input_ids]
    pictures = {0: 0}  # tokens, by how many there are
    for prompt, length in zip(prompts, lengths, strict=True):
        _check_length(fit_model, prompt, length)
        if len(prompt.images) not in pictures:
            whole = encode(fit_model, prompt, generation=generation)["input_ids"].shape[1]
            pictures[len(prompt.images)] = whole - length
    return [length + pictures[len(prompt.images)] for prompt, length in zip(prompts, lengths, strict=True)]


def answer_tokens(fit_model: FitModel, answer: str) -> torch.Tensor:
    """Ids (T,) of `answer` as it continues the generation prompt, closed by the end-of-turn token."""
    tokenizer = fit_model.processor.tokenizer
    opening = Renderer(fit_model.processor).turns(("user", "x"), generation=True)
    before = tokenizer(opening, add_special_tokens=False).input_ids
    after = tokenizer(opening + answer, add_special_tokens=False).input_ids
    if (
        after[: len(before)] != before
    ):  # the tokenizer merged template and answer into one token, which generation cannot do
        after = before + tokenizer(answer, add_special_tokens=False).input_ids
    return torch.tensor([*after[len(before) :], fit_model.end_token])


def batches(
    fit_model: FitModel, prompts: Sequence[Prompt], wanted: Sequence[int], *, generation: bool
) -> Iterator[Batch]:
    """Batches of the prompts `wanted`, each once. Prompts of like length are batched together."""
    order = sorted(wanted, key=lambda row: (len(prompts[row].images), len(prompts[row].text)))
    window: list[tuple[int, Encoded]] = []
    held = 0
    for row in order:
        encoded = encode(fit_model, prompts[row], generation=generation)
        window.append((row, encoded))
        held += sum(t.nbytes for t in encoded.values())
        if held > WINDOW_BYTES or len(window) == WINDOW_PROMPTS:
            yield from _padded(window)
            window, held = [], 0
    yield from _padded(window)


def _padded(window: list[tuple[int, Encoded]]) -> Iterator[Batch]:
    """Cut a window into batches of equal image tensors and like length; input_ids are padded on the right."""
    groups: dict[tuple[Any, ...], list[tuple[int, Encoded]]] = {}
    for row, encoded in window:
        shapes = tuple((name, tuple(t.shape)) for name, t in sorted(encoded.items()) if name != "input_ids")
        groups.setdefault(shapes, []).append((row, encoded))
    for group in groups.values():
        group.sort(key=lambda one: one[1]["input_ids"].shape[1])
        while group:
            size = len(group)
            while size > 1 and size * group[size - 1][1]["input_ids"].shape[1] > TOKENS_PER_FORWARD:
                size -= 1
            rows, inputs = zip(*group[:size], strict=True)
            del group[:size]
            lengths = torch.tensor([one["input_ids"].shape[1] for one in inputs])
            longest = int(lengths.max())
            ids = torch.stack([_pad(one["input_ids"][0], longest) for one in inputs])
            images = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0] if name != "input_ids"}
            yield Batch(list(rows), {**images, "input_ids": ids}, lengths)


def _pad(ids: torch.Tensor, length: int) -> torch.Tensor:
    """ids (S,) -> (length,), padded with the last one: it closes a turn, so it is no image placeholder."""
    return torch.cat([ids, ids[-1:].expand(length - len(ids))])


def waiting_bytes(fit_model: FitModel, inputs: Encoded) -> int:
    """About the most bytes that a forward pass over `inputs` holds while it waits, in an MLP or the image tower."""
    config = fit_model.decoder
    token = 4 * (config.intermediate_size + 4 * config.hidden_size)
    images = sum(t.nbytes for t in inputs.values() if t.is_floating_point())
    return max(inputs["input_ids"].numel() * token, IMAGE_ACTIVATIONS * images) + images


def sweep_groups(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut `items` into lists of at most SWEEP_BYTES by `size`, each with at least one item."""
    return grouped(items, size, SWEEP_BYTES)
