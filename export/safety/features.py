"""Hidden states of prompts, from the PyTorch original: what SAS, prober and Refusal Head are fitted on.

    prompt_states   prompt without generation prompt          ->  residual entering each layer k = 1..N-1, at POSITIONS
    answer_states   prompt + generation prompt + the refusal  ->  final-norm output before each of its tokens

"Entering layer k" is Hugging Face's hidden_states[k]. [0] knows nothing but the token itself; [N] is past the final
norm, where no package can be cut; so both are left out. Prompts of a batch are padded on the right: attention is
causal, so no token of a prompt sees what follows it, and a state depends on its neighbours by rounding alone.

The model itself is asked in one place only, `forward`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from autosteer.runtime.errors import InputError, PackageError, ProviderError, UnsupportedModelError
from autosteer.runtime.image import open_image

from .pairs import Prompt
from .store import FeatureStore, States, digest, file_digest

if TYPE_CHECKING:
    import torch

    from autosteer.export.checkpoint import Checkpoint

    Encoded = dict[str, torch.Tensor]  # what the processor returns for one prompt, batch dimension included

TOKENS_PER_FORWARD = 2048  # bounds activations, not quality
WINDOW_BYTES = 256 << 20  # preprocessed images held at a time
WINDOW_PROMPTS = 512
TOKEN_OFFSET = -1
POSITIONS = ("last", "mean")

Advance = Callable[[int], None]
Watch = Callable[[int, "torch.Tensor"], None]


@dataclass(frozen=True)
class Reference:
    """The PyTorch original, ready to be looked into."""

    model: Any  # transformers.PreTrainedModel, float32, eval
    processor: Any  # transformers.ProcessorMixin
    layers: Any  # its decoder layers, torch.nn.ModuleList of length N
    opening: torch.Tensor  # (O,) ids every prompt begins with, before the user's first word or image
    opening_cache: Any  # transformers.DynamicCache of the opening, batch 1: computed once
    image_token_id: int | None

    @property
    def embeddings(self) -> torch.Tensor:
        """The output projection E, (vocab, d)."""
        return self.model.get_output_embeddings().weight.detach()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.processor.tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(frozen=True)
class SteeredAnswer:
    """Greedy tokens, the end-of-turn token included where it came."""

    ids: list[int]
    log_probs: list[float]  # of each under the unsteered model, after the same tokens: how natural the answer is


@dataclass(frozen=True)
class Batch:
    """Prompts that go through the model together."""

    rows: list[int]  # which prompts
    inputs: Encoded  # input_ids (B, S), padded on the right; images
    lengths: torch.Tensor  # (B,) tokens of each prompt


def open_reference(checkpoint: Checkpoint, *, device: str) -> Reference:
    """Load the checkpoint's weights for a fit, onto "cpu" or "cuda".

    Raises UnsupportedModelError for a processor without a chat template, ProviderError where the device has no room.
    """
    import torch

    from autosteer.export.checkpoint import load_reference
    from autosteer.export.prompt import FIRST, Renderer, text_lead

    model, processor = load_reference(checkpoint)
    if not getattr(processor, "chat_template", None):
        raise UnsupportedModelError(
            f"{checkpoint.folder}: the processor has no chat template, so prompts cannot be rendered"
        )
    try:
        model = model.to(device)
    except torch.OutOfMemoryError as err:
        raise ProviderError("the model does not fit on the GPU in float32; use --device cpu") from err
    renderer = Renderer(processor)
    text = renderer.turns(("user", FIRST)).split(FIRST)[0].removesuffix(text_lead(renderer))
    opening = torch.tensor(processor.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
    with torch.inference_mode():
        cache = model.base_model(input_ids=opening[None].to(device), use_cache=True).past_key_values
    return Reference(
        model,
        processor,
        model.get_submodule(checkpoint.family.decoder).layers,
        opening,
        cache,
        renderer.image_id,
    )


def identity(checkpoint: Checkpoint) -> bytes:
    """What hidden states depend on beside the prompt: the checkpoint's files, and which states are kept (16 bytes)."""
    files = sorted(f for f in checkpoint.folder.iterdir() if f.suffix in {".safetensors", ".json", ".jinja"})
    return digest(
        repr((POSITIONS, TOKEN_OFFSET)).encode(), *(part for f in files for part in (f.name.encode(), file_digest(f)))
    )


def prompt_keys(prompts: Sequence[Prompt]) -> list[bytes]:
    """A digest of each prompt's content: its text and its images' files."""
    seen: dict[Path, bytes] = {}
    for path in {path for prompt in prompts for path in prompt.images}:
        seen[path] = file_digest(path)
    return [digest(prompt.text.encode(), *(seen[path] for path in prompt.images)) for prompt in prompts]


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
    encoded.pop("attention_mask", None)  # nothing to hide: padding comes last, and attention is causal
    tokens, limit = encoded["input_ids"].shape[1], reference.model.config.get_text_config().max_position_embeddings
    if tokens > limit:
        raise InputError(f"{prompt.where}: the prompt takes {tokens} tokens, the model {limit} at most; shorten it")
    return encoded


def open_store(folder: Path, checkpoint: Checkpoint, reference: Reference) -> FeatureStore:
    """The place in `folder` for this checkpoint's hidden states, records (N-1, P, d)."""
    shape = (len(reference.layers) - 1, len(POSITIONS), reference.embeddings.shape[1])
    return FeatureStore(folder, identity(checkpoint), shape)


def prompt_states(
    reference: Reference, prompts: Sequence[Prompt], store: FeatureStore, *, advance: Advance = lambda done: None
) -> States:
    """n records (N-1, P, d): [:, k-1, p] is the residual entering layer k at POSITIONS[p]. Only what `store` lacks is
    computed.

    "last" is the last prompt token; "mean" the mean over the text tokens of the user's turn up to that one, images and
    what precedes the turn left out. `advance` is told how many prompts are done. Raises InputError for an image that
    cannot be read, PackageError naming the layer where a state is not finite.
    """
    import torch

    depth = len(reference.layers)
    keys = prompt_keys(prompts)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    wanted = [row for key, row in first.items() if key not in store]
    advance(len(prompts) - len(wanted))
    for batch in _batches(reference, prompts, wanted, generation=False):
        taps = torch.empty(len(batch.rows), *store.shape)
        read = _tap(reference, batch)

        def keep(k: int, hidden: torch.Tensor, taps: torch.Tensor = taps, read: Any = read) -> None:
            if k > 0:
                taps[:, k - 1] = read(hidden).float().cpu()

        forward(reference, batch.inputs, watch=keep)
        finite = torch.isfinite(taps).all(dim=-1).all(dim=-1)  # (b, N-1)
        if not finite.all():
            layer = 1 + int((~finite).any(dim=0).nonzero()[0])
            row = batch.rows[int((~finite[:, layer - 1]).nonzero()[0])]
            raise PackageError(
                f"hidden_states[{layer}] is NaN or infinite for the prompt at {prompts[row].where or row}: the "
                "checkpoint's weights are damaged or overflow"
            )
        store.append([keys[row] for row in batch.rows], taps)
        advance(len(batch.rows))
    assert depth == store.shape[0] + 1
    return store.view(keys)


def _tap(reference: Reference, batch: Batch) -> Callable[[torch.Tensor], torch.Tensor]:
    """(B, S - O, d) -> (B, P, d): the states at POSITIONS."""
    import torch

    ids, device, skipped = batch.inputs["input_ids"], reference.embeddings.device, len(reference.opening)
    place = torch.arange(ids.shape[1])
    last = batch.lengths + TOKEN_OFFSET
    pooled = (place >= skipped) & (place <= last[:, None])
    if reference.image_token_id is not None:
        pooled &= ids != reference.image_token_id
    share = (pooled / pooled.sum(dim=1, keepdim=True))[:, skipped:].to(device)
    each, last = torch.arange(len(ids), device=device), (last - skipped).to(device)
    return lambda hidden: torch.stack([hidden[each, last], (share[:, None] @ hidden)[:, 0]], dim=1)


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
    for batch in _batches(reference, prompts, range(len(prompts)), generation=True):
        ids = torch.cat([batch.inputs["input_ids"], answer[:-1].expand(len(batch.rows), -1)], dim=1)
        places = batch.lengths[:, None] + torch.arange(-1, length - 1)  # (B, T): the token before each of the answer's
        ids.scatter_(1, places[:, 1:], answer[:-1].expand(len(batch.rows), -1))  # over the padding of shorter prompts
        hidden = forward(reference, batch.inputs | {"input_ids": ids}).float().cpu()
        places = (places - len(reference.opening))[..., None].expand(-1, -1, hidden.shape[-1])
        states[batch.rows] = hidden.gather(1, places)
        advance(len(batch.rows))
    if not torch.isfinite(states).all():
        raise PackageError(
            "the final hidden states are NaN or infinite: the checkpoint's weights are damaged or overflow"
        )
    return states


def steered_answers(
    reference: Reference,
    prompts: Sequence[Prompt],
    steer_matrix: torch.Tensor,
    strengths: Sequence[float],
    *,
    tokens: int,
    advance: Advance = lambda done: None,
) -> list[list[SteeredAnswer]]:
    """What the model says to each prompt at each strength, greedily and for at most `tokens`: [prompt][strength].

    One prompt at a time, its strengths side by side in one batch: the prompt is read once.
    """
    import torch

    model, head, device = reference.model.base_model, reference.embeddings, reference.embeddings.device
    name, matrix, end = _cache_name(model), steer_matrix.to(device), _end_token(reference)
    epsilon = torch.tensor(strengths, device=device)[:, None]
    answers = []
    for prompt in prompts:
        with torch.inference_mode():
            inputs = {key: t.to(device) for key, t in encode(reference, prompt, generation=True).items()}
            out = model(**inputs, use_cache=True)
            cache = out.past_key_values
            cache.batch_repeat_interleave(len(strengths))
            hidden = out.last_hidden_state[:, -1].expand(len(strengths), -1)
            ids, log_probs = [], []
            for step in range(tokens):
                token = ((hidden + epsilon * hidden @ matrix.T) @ head.T).argmax(dim=-1, keepdim=True)
                ids.append(token)
                log_probs.append((hidden @ head.T).log_softmax(dim=-1).gather(1, token))
                if bool((torch.cat(ids, dim=1) == end).any(dim=1).all()) or step + 1 == tokens:
                    break
                out = model(input_ids=token, use_cache=True, **{name: cache})
                hidden = out.last_hidden_state[:, -1]
        rows = zip(torch.cat(ids, dim=1).tolist(), torch.cat(log_probs, dim=1).tolist(), strict=True)
        answers.append([_up_to(end, row, scores) for row, scores in rows])
        advance(1)
    return answers


def _up_to(end: int, ids: list[int], log_probs: list[float]) -> SteeredAnswer:
    length = ids.index(end) + 1 if end in ids else len(ids)
    return SteeredAnswer(ids[:length], log_probs[:length])


def _batches(
    reference: Reference, prompts: Sequence[Prompt], wanted: Sequence[int], *, generation: bool
) -> Iterator[Batch]:
    """Batches such that every wanted row comes once, like prompts together."""
    order = sorted(wanted, key=lambda row: (len(prompts[row].images), len(prompts[row].text)))
    window: list[tuple[int, Encoded]] = []
    held = 0
    for row in order:
        encoded = encode(reference, prompts[row], generation=generation)
        window.append((row, encoded))
        held += sum(t.nbytes for t in encoded.values())
        if held > WINDOW_BYTES or len(window) == WINDOW_PROMPTS:
            yield from _padded(window)
            window, held = [], 0
    yield from _padded(window)


def _padded(window: list[tuple[int, Encoded]]) -> Iterator[Batch]:
    """Cut a window into batches of equal image tensors and like length; input_ids are padded on the right."""
    import torch

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
    """ids (S,) -> (length,), the last one repeated: it closes a turn, so it is no image's."""
    import torch

    return torch.cat([ids, ids[-1:].expand(length - len(ids))])


def forward(reference: Reference, inputs: Encoded, *, watch: Watch | None = None) -> torch.Tensor:
    """One pass without lm_head: (B, S - O, d) after the final norm, on the model's device, of what follows the opening.

    `watch(k, hidden)` is called with what enters layer k, (B, S - O, d), for k = 0..N-1 in turn. Nothing is kept:
    output_hidden_states=True would hold every layer at once, gigabytes for a 7B model. The opening's O rows are the
    same for all prompts; its keys and values are taken from the cache where no image is to be placed.
    """
    import torch

    device, opening = reference.embeddings.device, len(reference.opening)
    on_device = {name: t.to(device) for name, t in inputs.items()}
    cached = opening > 0 and len(inputs) == 1 and bool((inputs["input_ids"][:, :opening] == reference.opening).all())
    if cached:
        cache = copy.deepcopy(reference.opening_cache)
        cache.batch_repeat_interleave(len(inputs["input_ids"]))
        on_device = {"input_ids": on_device["input_ids"][:, opening:], _cache_name(reference.model.base_model): cache}
    skip = 0 if cached else opening

    def shown(k: int, hidden: torch.Tensor) -> None:
        assert watch is not None
        watch(k, hidden[:, skip:])

    try:
        with torch.inference_mode(), _watching(reference.layers, shown if watch else None):
            return reference.model.base_model(**on_device, use_cache=cached).last_hidden_state[:, skip:]
    except torch.OutOfMemoryError as err:
        raise ProviderError("a batch does not fit on the GPU beside the model; use --device cpu") from err


def _cache_name(model: Any) -> str:
    """transformers calls the cache `past_key_values`, and from 5.24 on `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def _watching(layers: Any, watch: Watch | None) -> Iterator[None]:
    """While open, every layer shows `watch` its input."""

    def hook_of(k: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert watch is not None
            watch(k, args[0] if args else kwargs["hidden_states"])

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_of(k), with_kwargs=True) for k, layer in enumerate(layers if watch else ())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
