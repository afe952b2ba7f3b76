"""The PyTorch original that a gate is fitted on: Hugging Face's own model, asked in one place, `forward`.

On the CPU a model of up to KEPT_BYTES is loaded matrix by matrix, when each is first used, and stays in memory. A
larger one remains on disk (on_demand.py): each matrix is loaded once for all batches of a sweep (layer_sweep.py), so
that a 7B model is fitted in a few GiB. On CUDA the model is loaded as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from autosteer.export.checkpoint.chat_template import FIRST, Renderer, text_lead
from autosteer.export.checkpoint.layer_sweep import LayerSweep
from autosteer.export.checkpoint.on_demand import open_on_demand
from autosteer.export.checkpoint.open import Checkpoint, end_token_ids, load_hf_model, load_processor
from autosteer.export.graphs.decoder import decoder_facts
from autosteer.export.graphs.kv_scales import cache_name
from autosteer.runtime.errors import ProviderError, UnsupportedModelError

KEPT_BYTES = 4 << 30  # a model whose matrices take no more in float32 stays in memory

Encoded = dict[str, torch.Tensor]  # what the processor returns for one prompt, batch dimension included
Watch = Callable[[int, torch.Tensor], None]


@dataclass
class FitModel:
    """The PyTorch original, ready to be looked into."""

    checkpoint: Checkpoint
    hf_model: Any  # transformers.PreTrainedModel, float32, eval
    processor: Any  # transformers.ProcessorMixin
    layers: Any  # its decoder layers, torch.nn.ModuleList of length N
    sweep: LayerSweep  # runs forward passes as jobs
    device: torch.device
    opening: torch.Tensor  # (O,) ids every prompt begins with, before the user's first word or image
    end_token: int  # closes a turn
    image_token_id: int | None
    opening_cache: DynamicCache | None = None  # batch 1; see read_opening

    @property
    def config(self) -> Any:
        """The decoder's part of the model's config."""
        return self.hf_model.config.get_text_config()

    @property
    def width(self) -> int:
        """d, of a hidden state."""
        return int(self.config.hidden_size)

    def read_opening(self) -> None:
        """Compute the opening's keys and values, which `forward` then does not compute again for every prompt."""
        if self.opening_cache is None and len(self.opening):
            with torch.inference_mode():
                out = self.hf_model.base_model(input_ids=self.opening[None].to(self.device), use_cache=True)
            self.opening_cache = out.past_key_values

    def embeddings(self) -> torch.Tensor:
        """The output projection E (vocab, d), float32, read anew: 2 GiB for a 7B model."""
        return self.checkpoint.tensor(decoder_facts(self.checkpoint, None).lm_head).to(self.device)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.processor.tokenizer.decode(list(ids), skip_special_tokens=True))


def open_fit_model(checkpoint: Checkpoint, *, device: str) -> FitModel:
    """Make the checkpoint's model ready for a fit on "cpu" or "cuda".

    Raises UnsupportedModelError for a processor without a chat template, or a tokenizer without an end of turn.
    """
    processor = load_processor(checkpoint)
    if not getattr(processor, "chat_template", None):
        raise UnsupportedModelError(
            f"{checkpoint.folder}: the processor has no chat template, so prompts cannot be rendered"
        )
    renderer = Renderer(processor)
    text = renderer.turns(("user", FIRST)).split(FIRST)[0].removesuffix(text_lead(renderer))
    sweep, head = LayerSweep(KEPT_BYTES), decoder_facts(checkpoint, None).lm_head
    model = open_on_demand(checkpoint, head, sweep) if device == "cpu" else _on_cuda(checkpoint)
    return FitModel(
        checkpoint,
        model,
        processor,
        model.get_submodule(checkpoint.family.decoder).layers,
        sweep,
        torch.device(device),
        torch.tensor(processor.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long),
        _end_token(checkpoint, processor),
        renderer.image_id,
    )


def _on_cuda(checkpoint: Checkpoint) -> Any:
    """The whole model on the GPU; where it has no room, in the machine's memory, layers visiting the GPU in turn."""
    from accelerate import cpu_offload

    model, _ = load_hf_model(checkpoint)
    try:
        return model.to("cuda")
    except torch.OutOfMemoryError:
        return cpu_offload(model.to("cpu"), torch.device("cuda"))  # not tried on a GPU so far


def _end_token(checkpoint: Checkpoint, processor: Any) -> int:
    ends, preferred = end_token_ids(checkpoint), processor.tokenizer.eos_token_id
    chosen = ends[0] if ends and preferred not in ends else preferred
    if chosen is None:
        raise UnsupportedModelError("neither the generation config nor the tokenizer names an end-of-turn token")
    return int(chosen)


def forward(fit_model: FitModel, inputs: Encoded, *, watch: Watch | None = None) -> torch.Tensor:
    """One pass without lm_head: (B, S - O, d) after the final norm, on the model's device, of what follows the opening.

    `watch(k, hidden)` is called with what enters layer k, (B, S - O, d), for k = 0..N-1 in turn. Nothing is kept:
    output_hidden_states=True would hold every layer at once, gigabytes for a 7B model. The opening's O rows are the
    same for all prompts; once read, its keys and values are taken from the cache where no image is to be placed.
    """
    cache, opening = fit_model.opening_cache, len(fit_model.opening)
    on_device = {name: t.to(fit_model.device) for name, t in inputs.items()}
    cached = (
        cache is not None and len(inputs) == 1 and bool((inputs["input_ids"][:, :opening] == fit_model.opening).all())
    )
    if cached:
        after = {cache_name(fit_model.hf_model.base_model): cache_after(cache, keep=False)}
        on_device = {"input_ids": on_device["input_ids"][:, opening:], **after}
    skip = 0 if cached else opening

    def shown(k: int, hidden: torch.Tensor) -> None:
        assert watch is not None
        watch(k, hidden[:, skip:])

    try:
        with torch.inference_mode(), _watching(fit_model.layers, shown if watch else None):
            return fit_model.hf_model.base_model(**on_device, use_cache=cached).last_hidden_state[:, skip:]
    except torch.OutOfMemoryError as err:
        raise ProviderError("a batch does not fit on the GPU beside the model; use --device cpu") from err


def cache_after(prefix: DynamicCache, *, keep: bool) -> DynamicCache:
    """An empty cache for any number of rows that all follow `prefix` (batch 1); it is shared, not copied.

    Without `keep` nothing is added: enough for a single forward pass.
    """
    cache = DynamicCache()
    cache.layers = [_PrefixedLayer(layer, keep=keep) for layer in prefix.layers]
    return cache


class _PrefixedLayer(DynamicLayer):
    """Keys and values (B, H, T, D) behind a prefix (1, H, P, D)."""

    def __init__(self, prefix: DynamicLayer, *, keep: bool):
        super().__init__()
        self._prefix, self._keep = (prefix.keys, prefix.values), keep

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values in, all of them out: (B, H, P + T, D)."""
        own = super().update(key_states, value_states) if self._keep else (key_states, value_states)
        both = (torch.cat([t.expand(len(o), -1, -1, -1), o], dim=-2) for t, o in zip(self._prefix, own, strict=True))
        keys, values = both
        return keys, values

    def get_seq_length(self) -> int:
        """P + T."""
        return int(self._prefix[0].shape[-2]) + super().get_seq_length()


@contextmanager
def _watching(layers: Any, watch: Watch | None) -> Iterator[None]:
    """While open, every layer shows `watch` its input where the calling thread runs it."""
    me = threading.get_ident()

    def hook_of(k: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if watch is not None and threading.get_ident() == me:
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
