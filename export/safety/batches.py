"""Render prompts, encode them, and group them into batches.

Prompts are padded on the right. Attention is causal, so no token sees the padding, and the rest of a batch changes a
hidden state only by rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import torch
from PIL import Image

from autosteer.export.checkpoint.layer_sweep import grouped
from autosteer.export.checkpoint.renderer import FIRST, Renderer
from autosteer.runtime.errors import InputError
from autosteer.runtime.picture_file import open_image

from .model import Encoded, FitModel, common_opening
from .pairs import Prompt

T = TypeVar("T")

TOKENS_PER_FORWARD = 1024  # bounds activations, not quality
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
    starts: torch.Tensor  # (B,) tokens before its last user turn's content


def special_tokens(processor: Any) -> list[str]:
    """What neither runtime reads as text: not the added tokens that are plain, such as Gemma's "\\n"."""
    added = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    return added + [token for kind in ("image", "video") if (token := getattr(processor, f"{kind}_token", None))]


def check_text(fit_model: FitModel, prompts: Sequence[Prompt]) -> None:
    """Raise InputError for a prompt whose text holds a special token: Hugging Face would read `<image>` as an image."""
    special = special_tokens(fit_model.processor)
    for prompt in prompts:
        if found := [token for token in special if any(token in text for text in prompt.texts)]:
            raise InputError(f"{prompt.where}: the text holds the special token {found[0]!r}; take it out")


def render(fit_model: FitModel, prompt: Prompt, *, generation: bool) -> str:
    """The checkpoint's chat template around the prompt's turns, images first."""
    turns = [("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate((*prompt.earlier, prompt.text))]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"][:0] = [{"type": "image"} for _ in prompt.images]  # type: ignore[index]
    if prompt.system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.system}]})
    text = fit_model.processor.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
    return str(text)


def takes_system(fit_model: FitModel) -> bool:
    """Whether the chat template has a place for a system prompt."""
    try:
        return FIRST in render(fit_model, Prompt("x", system=FIRST), generation=False)
    except (jinja2.TemplateError, TypeError):
        return False


def encode(fit_model: FitModel, prompt: Prompt, *, generation: bool) -> Encoded:
    """Model inputs of one prompt, batch dimension 1. Raises InputError for one longer than the model's context."""
    encoded = _encoded(fit_model, render(fit_model, prompt, generation=generation), prompt.images)
    _check_length(fit_model, prompt, encoded["input_ids"].shape[1])
    return encoded


def _encoded(fit_model: FitModel, text: str, images: Sequence[Path]) -> Encoded:
    pictures = [[Image.fromarray(open_image(path)) for path in images]] if images else None
    encoded = dict(fit_model.processor(text=[text], images=pictures, return_tensors="pt"))
    encoded.pop("attention_mask", None)  # nothing to hide: padding comes last, and attention is causal
    encoded.pop("mm_token_type_ids", None)  # the token ids say it: see hf_model.placed
    return encoded


def turn_start(fit_model: FitModel, prompt: Prompt) -> int:
    """How many tokens come before the content of the prompt's last user turn."""
    if not prompt.earlier and not prompt.system:
        return len(fit_model.opening)
    marked = replace(prompt, text=FIRST, images=prompt.images if prompt.earlier else ())
    before = render(fit_model, marked, generation=False).split(FIRST)[0]
    encoded = _encoded(fit_model, before.removesuffix(fit_model.text_lead), marked.images)
    return encoded["input_ids"].shape[1] - fit_model.closing


def _check_length(fit_model: FitModel, prompt: Prompt, tokens: int) -> None:
    if tokens > (limit := fit_model.decoder.context_length):
        raise _too_long(prompt, tokens, f"the model {limit}")


def _too_long(prompt: Prompt, tokens: int, limit: str) -> InputError:
    return InputError(f"{prompt.where}: the prompt takes {tokens} tokens, {limit} at most; shorten it")


def check_lengths(
    fit_model: FitModel, prompts: Sequence[Prompt], *, generation: bool, package: int | None = None
) -> None:
    """Raise InputError, with its line, for a prompt longer than the context, before any state is computed. Pictures of
    one size take as many tokens, so one prompt for each combination of sizes is encoded.

    `package`: the most tokens that a package takes, which may cut pictures in another way: only texts are counted.
    """
    lengths = _text_tokens(fit_model, prompts, generation=generation)
    of_pictures: dict[tuple[object, ...], int] = {(): 0}
    for prompt, length in zip(prompts, lengths, strict=True):
        if package is not None:
            if length > package:
                raise _too_long(prompt, length, f"the package {package}")
            continue
        shown = tuple(_size(path) for path in prompt.images)
        if shown not in of_pictures:
            rendered = render(fit_model, prompt, generation=generation)
            of_pictures[shown] = _encoded(fit_model, rendered, prompt.images)["input_ids"].shape[1] - length
        _check_length(fit_model, prompt, length + of_pictures[shown])


@functools.cache
def _size(path: Path) -> tuple[int, ...]:
    return open_image(path).shape


def about_tokens(fit_model: FitModel, prompts: Sequence[Prompt], *, generation: bool) -> list[int]:
    """Estimate how many tokens each prompt takes; images are assumed to take as many as in the first such prompt.

    Raises InputError for a text longer than the model's context, before the first forward pass.
    """
    lengths = _text_tokens(fit_model, prompts, generation=generation)
    pictures = {0: 0}  # tokens, by how many there are
    for prompt, length in zip(prompts, lengths, strict=True):
        _check_length(fit_model, prompt, length)
        if len(prompt.images) not in pictures:
            whole = encode(fit_model, prompt, generation=generation)["input_ids"].shape[1]
            pictures[len(prompt.images)] = whole - length
    return [length + pictures[len(prompt.images)] for prompt, length in zip(prompts, lengths, strict=True)]


def _text_tokens(fit_model: FitModel, prompts: Sequence[Prompt], *, generation: bool) -> list[int]:
    """How many tokens each rendered prompt takes, with one for a picture."""
    texts = [render(fit_model, prompt, generation=generation) for prompt in prompts]
    return (
        [len(ids) for ids in fit_model.processor.tokenizer(texts, add_special_tokens=False).input_ids] if texts else []
    )


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
    starts: dict[int, int] = {}
    held = 0
    for row in order:
        encoded = encode(fit_model, prompts[row], generation=generation)
        starts[row] = turn_start(fit_model, prompts[row])
        window.append((row, encoded))
        held += sum(t.nbytes for t in encoded.values())
        if held > WINDOW_BYTES or len(window) == WINDOW_PROMPTS:
            yield from _padded(fit_model, window, starts)
            window, held = [], 0
    yield from _padded(fit_model, window, starts)


def _padded(fit_model: FitModel, window: list[tuple[int, Encoded]], starts: Mapping[int, int]) -> Iterator[Batch]:
    """Cut a window into batches of equal image tensors, opening and like length; input_ids are padded on the right."""
    groups: dict[tuple[Any, ...], list[tuple[int, Encoded]]] = {}
    for row, encoded in window:
        shapes = tuple((name, tuple(t.shape)) for name, t in sorted(encoded.items()) if name != "input_ids")
        groups.setdefault((common_opening(fit_model, encoded), *shapes), []).append((row, encoded))
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
            yield Batch(list(rows), {**images, "input_ids": ids}, lengths, torch.tensor([starts[row] for row in rows]))


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
