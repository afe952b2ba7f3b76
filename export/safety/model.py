"""The Hugging Face model that a gate is fitted on. Every forward pass over prompts goes through `forward`.

On the CPU, a model of up to KEPT_BYTES is loaded matrix by matrix on first use, and then stays in memory. A larger one
remains on disk (on_demand.py): each matrix is loaded once per sweep, for all batches of the sweep (layer_sweep.py). So
a 7B model is fitted in a few GiB. On CUDA the model is loaded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from autosteer.export.checkpoint.chat_template import text_lead
from autosteer.export.checkpoint.decoder_config import DecoderConfig, decoder_config
from autosteer.export.checkpoint.hf_model import cache_argument, load_hf_model, placed, watching_inputs
from autosteer.export.checkpoint.layer_sweep import LayerSweep
from autosteer.export.checkpoint.on_demand import open_on_demand
from autosteer.export.checkpoint.open import Checkpoint, end_token_ids, load_processor
from autosteer.export.checkpoint.renderer import FIRST, Renderer
from autosteer.export.checkpoint.stated import NO_PROMPT, in_one_line
from autosteer.runtime.errors import ProviderError
from autosteer.runtime.generation import common_length

KEPT_BYTES = 4 << 30  # of float32 weights: a smaller model stays in memory

Encoded = dict[str, torch.Tensor]  # what the processor returns for one prompt, batch dimension included
Watch = Callable[[int, torch.Tensor], None]


@dataclass
class FitModel:
    """The model, its processor, and what a fit needs to know about both."""

    checkpoint: Checkpoint
    decoder: DecoderConfig
    hf_model: Any  # transformers.PreTrainedModel, float32, eval
    processor: Any  # transformers.ProcessorMixin
    layers: Any  # the decoder layers, torch.nn.ModuleList of length N
    sweep: LayerSweep  # runs forward passes as jobs
    device: torch.device
    opening: torch.Tensor  # (O,) token ids that every prompt begins with, before the user's first word or image
    end_token: int  # closes a turn
    image_token_id: int | None
    text_lead: str  # what the chat template writes before the text of a turn without pictures
    closing: int  # tokens that the processor puts behind every text: Chameleon's does
    token_offset: int  # from the prompt's end, the last token that is the same with the generation prompt behind it
    opening_cache: DynamicCache | None = None  # batch 1; see read_opening

    def read_opening(self) -> None:
        """Compute the opening's keys and values once; `forward` then takes them from the cache."""
        if self.opening_cache is None and len(self.opening):
            with torch.inference_mode():
                out = self.hf_model.base_model(input_ids=self.opening[None].to(self.device), use_cache=True)
            self.opening_cache = out.past_key_values

    def lm_head(self) -> torch.Tensor:
        """The LM head E (vocab, d), float32. Each call reads it from disk: 2 GiB for a 7B model."""
        return self.checkpoint.tensor(self.decoder.lm_head).to(self.device)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.processor.tokenizer.decode(list(ids), skip_special_tokens=True))


def open_fit_model(checkpoint: Checkpoint, *, device: str) -> FitModel:
    """Open the checkpoint's model for a fit on "cpu" or "cuda". Raises what opening its parts raises."""
    processor = load_processor(checkpoint)
    renderer = Renderer(processor)
    lead = text_lead(renderer)
    text = renderer.turns(("user", FIRST)).split(FIRST)[0].removesuffix(lead)
    texts = [renderer.turns(("user", "x"), generation=generation) for generation in (False, True)]
    bare, whole = processor.tokenizer(texts, add_special_tokens=False).input_ids
    sweep, decoder = LayerSweep(KEPT_BYTES), decoder_config(checkpoint)
    model = open_on_demand(checkpoint, decoder.lm_head, sweep) if device == "cpu" else _on_cuda(checkpoint)
    return FitModel(
        checkpoint=checkpoint,
        decoder=decoder,
        hf_model=model,
        processor=processor,
        layers=model.get_submodule(checkpoint.family.decoder).layers,
        sweep=sweep,
        device=torch.device(device),
        opening=torch.tensor(processor.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long),
        end_token=_end_token(checkpoint, processor),
        image_token_id=renderer.image_id,
        text_lead=lead,
        closing=len(processor(text=["x"])["input_ids"][0]) - len(processor.tokenizer("x").input_ids),
        token_offset=common_length(bare, whole) - 1 - len(bare),
    )


def _on_cuda(checkpoint: Checkpoint) -> Any:
    """The whole model on the GPU. If it does not fit, it stays in RAM, and each layer is copied over when it runs."""
    from accelerate import cpu_offload

    model, _ = load_hf_model(checkpoint)
    try:
        return model.to("cuda")
    except torch.OutOfMemoryError:
        return cpu_offload(model.to("cpu"), torch.device("cuda"))  # untested: no GPU so far


def _end_token(checkpoint: Checkpoint, processor: Any) -> int:
    ends, preferred = end_token_ids(checkpoint), processor.tokenizer.eos_token_id
    return preferred if preferred in ends else ends[0]


def common_opening(fit_model: FitModel, inputs: Encoded) -> int:
    """O if each of the prompts begins with the opening, else 0: one with a system prompt does not."""
    length = len(fit_model.opening)
    begin = inputs["input_ids"][:, :length]
    return length if begin.shape[1] == length and bool((begin == fit_model.opening).all()) else 0


def forward(fit_model: FitModel, inputs: Encoded, *, watch: Watch | None = None) -> torch.Tensor:
    """One forward pass without the LM head: final-norm output (B, S - O, d) of the positions after the common opening.

    `watch(k, hidden)` is called with what enters layer k, (B, S - O, d), for k = 0..N-1 in turn. Hidden states are not
    kept: output_hidden_states=True would hold those of all layers, gigabytes for a 7B model. The opening's O positions
    (`common_opening`) are the same in all of these prompts. After `read_opening`, text prompts take their keys and
    values from the cache.

    Raises ProviderError if a batch does not fit on the GPU.
    """
    cache, opening = fit_model.opening_cache, common_opening(fit_model, inputs)
    on_device = {name: t.to(fit_model.device) for name, t in inputs.items()}
    on_device |= placed(fit_model.hf_model.base_model, on_device)
    use_opening = cache is not None and len(inputs) == 1 and opening > 0
    if cache is not None and use_opening:
        after: dict[str, Any] = {cache_argument(fit_model.hf_model.base_model): cache_after(cache, keep=False)}
        on_device = {name: t[..., opening:] for name, t in on_device.items()} | after
    skip = 0 if use_opening else opening
    watched: AbstractContextManager[None] = nullcontext()
    if watch:
        watched = watching_inputs(dict(enumerate(fit_model.layers)), lambda k, hidden: watch(k, hidden[:, skip:]))
    with in_one_line(fit_model.checkpoint.folder, NO_PROMPT):
        try:
            with torch.inference_mode(), watched:
                outputs = fit_model.hf_model.base_model(**on_device, use_cache=use_opening)
                states: torch.Tensor = outputs.last_hidden_state[:, skip:]
                return states
        except torch.OutOfMemoryError as err:
            raise ProviderError("a batch does not fit on the GPU beside the model; use --device cpu") from err


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside, PyTorch may round the factors of float32 matrix products to bfloat16 (on CUDA to TF32), where the machine
    multiplies these faster: 3 to 4 times on a CPU with AMX. Sums stay float32. For all threads of the process.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def cache_after(prefix: DynamicCache, *, keep: bool) -> DynamicCache:
    """A KV cache for a batch of sequences that all begin with `prefix` (batch 1), which is shared and not copied.

    Without `keep`, new keys and values are not stored: enough for a single forward pass.
    """
    cache = DynamicCache()
    cache.layers = [_PrefixedLayer(cast(DynamicLayer, layer), keep=keep) for layer in prefix.layers]
    return cache


class _PrefixedLayer(DynamicLayer):
    """Keys and values (B, H, T, D) that follow a prefix (1, H, P, D)."""

    def __init__(self, prefix: DynamicLayer, *, keep: bool):
        super().__init__()  # type: ignore[no-untyped-call]
        assert prefix.keys is not None and prefix.values is not None
        self._prefix, self._keep = (prefix.keys, prefix.values), keep

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new keys and values; return the prefix's and all later ones, (B, H, P + T, D)."""
        own = super().update(key_states, value_states) if self._keep else (key_states, value_states)
        both = (torch.cat([t.expand(len(o), -1, -1, -1), o], dim=-2) for t, o in zip(self._prefix, own, strict=True))
        keys, values = both
        return keys, values

    def get_seq_length(self) -> int:
        """P + T, in positions."""
        return int(self._prefix[0].shape[-2]) + super().get_seq_length()
