"""How much each input channel of the decoder's matrices matters: what int4 rounding weighs its errors with.

    importance of channel j = mean of x_j^2 over the rows x of a short text and a picture that a matrix multiplies

An error in a weight costs in proportion to that (the idea of llama.cpp's imatrix and of AWQ): some channels are
hundreds of times livelier than others. What text it is matters little. SmolLM2-135M in blocks of 128, KL to float32:
.39 without importance, .28 with random tokens, .26 with the 160 tokens below, .25 with 2,000 tokens of the kind it was
tested on.

The checkpoint's own decoder computes it, in float32, with the weights of one layer in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from .checkpoint import Checkpoint

TEXT = (
    "The sea covers most of our planet, and yet we know less about its floor than about the surface of the moon. "
    "In 1872 a ship called Challenger left England to change that. For four years her crew measured depth, "
    "temperature and currents, and brought up animals that nobody had seen before. Name three colours. Red, blue and "
    "green. What is shown in this picture? A dog lies on a sofa beside a window; outside it rains. How do I cook rice? "
    "Wash one cup of rice, add two cups of water and a little salt, bring it to the boil, then cover it and let it "
    "stand on a low flame for fifteen minutes. def add(a, b): return a + b. I am sorry, but I cannot help with that."
)
TEXT_TOKENS = 192  # at most, for vocabularies that cut it up small
IMAGE_ROWS = 256  # about: every n-th row of one tile
FLOOR = 1e-3  # of the mean: a channel that was silent here may speak elsewhere


def decoder_importance(
    checkpoint: Checkpoint, inputs_embeds: torch.Tensor, report: Callable[[str], None] = lambda step: None
) -> dict[str, torch.Tensor]:
    """Tensor name of every matrix in the decoder's layers -> importance (K,) of its columns, 1 on average.

    `inputs_embeds` (1, S, D) float32 is what enters the decoder. `report` is told each layer.
    """
    decoder = _without_weights(checkpoint)
    prefix, found = checkpoint.family.decoder, {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            energy = args[0].flatten(0, -2).square().mean(0)
            found[f"{name}.weight"] = energy / energy.mean() + FLOOR

        return hook

    for i, layer in enumerate(decoder.layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(watch(f"{prefix}.layers.{i}.{name}"))
        layer.register_forward_pre_hook(_loader(checkpoint, f"{prefix}.layers.{i}", report, len(decoder.layers)))
        layer.register_forward_hook(_unload)
    with torch.inference_mode():
        decoder(inputs_embeds=inputs_embeds, use_cache=False)
    return found


def _without_weights(checkpoint: Checkpoint) -> Any:
    """Hugging Face's decoder, all of it on the meta device but what is computed (rotary tables)."""
    from transformers import AutoModel

    text = checkpoint.config.get_text_config()
    with torch.device("meta"):
        decoder = AutoModel.from_config(text, dtype=torch.float32).eval()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)
    decoder.norm = nn.Identity()
    return decoder


def _loader(checkpoint: Checkpoint, path: str, report: Callable[[str], None], layers: int) -> Callable[..., None]:
    """A hook that gives a layer its weights before it runs."""

    def load(layer: nn.Module, args: Any) -> None:
        report(f"which weights matter: layer {path.rsplit('.', 1)[1]} of {layers}")
        for name, parameter in layer.named_parameters():
            checkpoint.expect(f"{path}.{name}", parameter.shape)
        state = {name: checkpoint.tensor(f"{path}.{name}") for name, _ in layer.named_parameters()}
        layer.load_state_dict(state, assign=True)

    return load


def _unload(layer: nn.Module, args: Any, output: Any) -> None:
    """A hook that takes a layer's weights away after it ran."""
    layer.to("meta")


def sample_rows(checkpoint: Checkpoint, tokenizer: Any, image_graph: Path | None) -> torch.Tensor:
    """(1, S, D) float32: TEXT and, where there is an image graph (which must be complete), a part of one picture."""
    text = embedding_rows(checkpoint, tokenizer(TEXT).input_ids[:TEXT_TOKENS])
    if image_graph is None:
        return text[None]
    session = ort.InferenceSession(image_graph, providers=["CPUExecutionProvider"])
    size = session.get_inputs()[0].shape[-1]
    rows = torch.from_numpy(session.run(None, {"pixel_values": _picture(size)})[0][0])
    rows = rows[:: max(1, len(rows) // IMAGE_ROWS)]
    image = rows if rows.is_floating_point() else embedding_rows(checkpoint, rows.tolist())
    return torch.cat([text[:1], image, text[1:]])[None]


def _picture(size: int) -> np.ndarray:
    """pixel_values (1, 3, size, size) in -1..1: gradients, and a bright and a dark rectangle."""
    y, x = np.mgrid[0:size, 0:size] * (2.0 / size) - 1.0
    picture = np.stack([x, y, x * y]).astype(np.float32)
    third = size // 3
    picture[:, third // 2 : third, third:-third] = np.array([0.9, -0.7, 0.3], np.float32)[:, None, None]
    picture[:, 2 * third :, third // 2 : 2 * third] = np.array([-0.8, -0.6, -0.9], np.float32)[:, None, None]
    return picture[None]


def embedding_rows(checkpoint: Checkpoint, token_ids: Sequence[int]) -> torch.Tensor:
    """(S, D) float32: rows of the embedding table, which is read but never held."""
    ids = torch.tensor(token_ids)
    name = f"{checkpoint.family.decoder}.embed_tokens.weight"
    rows, first = torch.zeros(len(ids), checkpoint.shape(name)[1]), 0
    for block in checkpoint.rows(name, 64 << 20):
        here = (ids >= first) & (ids < first + len(block))
        rows[here] = block[ids[here] - first]
        first += len(block)
    return rows
