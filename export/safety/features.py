"""Hidden states of prompts, from the PyTorch original: what SAS, prober and Refusal Head are fitted on.

    prompt_states   prompt without generation prompt          ->  residual entering each layer k = 1..N-1, last token
    answer_states   prompt + generation prompt + the refusal  ->  final-norm output before each of its tokens

"Entering layer k" is Hugging Face's hidden_states[k]. [0] is the last token's embedding, the same for every prompt; [N]
is past the final norm, where no package can be cut; so both are left out. Rows of one batch have equal token length and
equal image tensors: nothing is padded, and a score does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from autosteer.runtime.errors import InputError, PackageError, ProviderError, UnsupportedModelError
from autosteer.runtime.image import open_image

from .pairs import Prompt

if TYPE_CHECKING:
    import torch

    from autosteer.export.checkpoint import Checkpoint

    Encoded = dict[str, torch.Tensor]  # what the processor returns for one prompt, batch dimension included

TOKENS_PER_FORWARD = 2048  # bounds activations, not quality
WINDOW_BYTES = 256 << 20  # preprocessed images held at a time
WINDOW_PROMPTS = 512
TOKEN_OFFSET = -1

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Reference:
    """The PyTorch original, ready to be looked into."""

    model: Any  # transformers.PreTrainedModel, float32, eval
    processor: Any  # transformers.ProcessorMixin
    layers: Any  # its decoder layers, torch.nn.ModuleList of length N

    @property
    def embeddings(self) -> torch.Tensor:
        """The output projection E, (vocab, d)."""
        return self.model.get_output_embeddings().weight.detach()


def open_reference(checkpoint: Checkpoint, *, device: str) -> Reference:
    """Load the checkpoint's weights for a fit, onto "cpu" or "cuda".

    Raises UnsupportedModelError for a processor without a chat template, ProviderError where the device has no room.
    """
    import torch

    from autosteer.export.checkpoint import load_reference

    model, processor = load_reference(checkpoint)
    if not getattr(processor, "chat_template", None):
        raise UnsupportedModelError(
            f"{checkpoint.folder}: the processor has no chat template, so prompts cannot be rendered"
        )
    try:
        model = model.to(device)
    except torch.OutOfMemoryError as err:
        raise ProviderError("the model does not fit on the GPU in float32; use --device cpu") from err
    return Reference(model, processor, model.get_submodule(checkpoint.family.decoder).layers)


def check_text(reference: Reference, prompts: Sequence[Prompt]) -> None:
    """Raise InputError for a prompt whose text holds a special token: Hugging Face would read `<image>` as an image."""
    special = reference.processor.tokenizer.get_added_vocab()
    for prompt in prompts:
        if found := [token for token in special if token in prompt.text]:
            raise InputError(f"{prompt.where}: the text holds the special token {found[0]!r}; take it out")


def render(reference: Reference, prompt: Prompt, *, generation: bool) -> str:
    """The checkpoint's chat template around one user turn, images first."""
    content = [*({"type": "image"} for _ in prompt.images), {"type": "text", "text": prompt.text}]
    return reference.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=generation, tokenize=False
    )


def encode(reference: Reference, prompt: Prompt, *, generation: bool) -> Encoded:
    """Model inputs of one prompt, batch dimension 1. Raises InputError for one longer than the model's context."""
    images = [[Image.fromarray(open_image(path)) for path in prompt.images]] if prompt.images else None
    text = render(reference, prompt, generation=generation)
    encoded = dict(reference.processor(text=[text], images=images, return_tensors="pt"))
    tokens, limit = encoded["input_ids"].shape[1], reference.model.config.get_text_config().max_position_embeddings
    if tokens > limit:
        raise InputError(f"{prompt.where}: the prompt takes {tokens} tokens, the model {limit} at most; shorten it")
    return encoded


def prompt_states(
    reference: Reference, prompts: Sequence[Prompt], *, advance: Advance = lambda done: None
) -> torch.Tensor:
    """(n, N-1, d) float32 on the CPU: [:, k-1] is the residual entering layer k at the last prompt token.

    `advance` is told how many prompts are done. Raises InputError for an image that cannot be read, PackageError naming
    the layer where a state is not finite.
    """
    import torch

    depth = len(reference.layers)
    states = torch.empty(len(prompts), depth - 1, reference.embeddings.shape[1])
    for rows, batch in _batches(reference, prompts, generation=False):
        with _layer_inputs(reference.layers) as entering:
            _forward(reference, batch)
        states[rows] = torch.stack([entering[k] for k in range(1, depth)], dim=1).float().cpu()
        advance(len(rows))
    finite = torch.isfinite(states).all(dim=-1)
    if not finite.all():
        layer = 1 + int((~finite).any(dim=0).nonzero()[0])
        row = int((~finite[:, layer - 1]).nonzero()[0])
        raise PackageError(
            f"hidden_states[{layer}] is NaN or infinite for the prompt at {prompts[row].where or row}: the "
            "checkpoint's weights are damaged or overflow"
        )
    return states


def answer_tokens(reference: Reference, answer: str) -> torch.Tensor:
    """Ids (T,) of `answer` as it continues the generation prompt, closed by the end-of-turn token."""
    import torch

    from autosteer.export.prompt import Renderer

    tokenizer = reference.processor.tokenizer
    opening = Renderer(reference.processor).turns(("user", "x"), generation=True)
    before = tokenizer(opening, add_special_tokens=False).input_ids
    after = tokenizer(opening + answer, add_special_tokens=False).input_ids
    if after[: len(before)] != before:  # answer and template merge into one token, which generation never does
        after = before + tokenizer(answer, add_special_tokens=False).input_ids
    return torch.tensor([*after[len(before) :], _end_token(reference)])


def _end_token(reference: Reference) -> int:
    ends = reference.model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    preferred = reference.processor.tokenizer.eos_token_id
    if preferred in ends or not ends:
        ends = [preferred]
    if ends[0] is None:
        raise UnsupportedModelError("neither the generation config nor the tokenizer names an end-of-turn token")
    return int(ends[0])


def answer_states(
    reference: Reference, prompts: Sequence[Prompt], answer: torch.Tensor, *, advance: Advance = lambda done: None
) -> torch.Tensor:
    """(n, T, d) float32: what lm_head would see before each of the T answer tokens, teacher-forced. answer (T,) ids."""
    import torch

    length = len(answer)
    states = torch.empty(len(prompts), length, reference.embeddings.shape[1])
    for rows, batch in _batches(reference, prompts, generation=True):
        shown = answer[:-1].expand(len(rows), -1)
        batch["input_ids"] = torch.cat([batch["input_ids"], shown], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        states[rows] = _forward(reference, batch)[:, -length:].float().cpu()
        advance(len(rows))
    if not torch.isfinite(states).all():
        raise PackageError(
            "the final hidden states are NaN or infinite: the checkpoint's weights are damaged or overflow"
        )
    return states


def _batches(
    reference: Reference, prompts: Sequence[Prompt], *, generation: bool
) -> Iterator[tuple[list[int], Encoded]]:
    """(row numbers, model inputs) such that every prompt comes once and the rows of a batch have equal shapes."""
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row].images), len(prompts[row].text)))
    window: list[tuple[int, Encoded]] = []
    held = 0
    for row in order:
        encoded = encode(reference, prompts[row], generation=generation)
        window.append((row, encoded))
        held += sum(t.nbytes for t in encoded.values())
        if held > WINDOW_BYTES or len(window) == WINDOW_PROMPTS:
            yield from _equal_shapes(window)
            window, held = [], 0
    yield from _equal_shapes(window)


def _equal_shapes(window: list[tuple[int, Encoded]]) -> Iterator[tuple[list[int], Encoded]]:
    import torch

    groups: dict[tuple[Any, ...], list[tuple[int, Encoded]]] = {}
    for row, encoded in window:
        shapes = tuple((name, tuple(t.shape)) for name, t in sorted(encoded.items()))
        groups.setdefault(shapes, []).append((row, encoded))
    for group in groups.values():
        size = max(1, TOKENS_PER_FORWARD // group[0][1]["input_ids"].shape[1])
        for start in range(0, len(group), size):
            rows, inputs = zip(*group[start : start + size], strict=True)
            yield list(rows), {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}


@contextmanager
def _layer_inputs(layers: Any) -> Iterator[dict[int, torch.Tensor]]:
    """While open, a forward pass leaves the last token's residual entering layer k, (batch, d), under k.

    Hooks, not output_hidden_states=True: that keeps every token of every layer, gigabytes for a 7B model.
    """
    entering: dict[int, torch.Tensor] = {}

    def keep(k: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            entering[k] = hidden[:, TOKEN_OFFSET]

        return hook

    handles = [layer.register_forward_pre_hook(keep(k), with_kwargs=True) for k, layer in enumerate(layers)]
    try:
        yield entering
    finally:
        for handle in handles:
            handle.remove()


def _forward(reference: Reference, batch: Encoded) -> torch.Tensor:
    """One pass without lm_head: (batch, S, d) after the final norm."""
    import torch

    device = reference.embeddings.device
    try:
        with torch.inference_mode():
            inputs = {name: t.to(device) for name, t in batch.items()}
            return reference.model.base_model(**inputs, use_cache=False).last_hidden_state
    except torch.OutOfMemoryError as err:
        raise ProviderError("a batch does not fit on the GPU beside the model; use --device cpu") from err
