"""Run the decoder on calibration data: the energy of each input channel, and the scales of int8 KV caches.

    channel energy of channel j = mean of x_j^2 over the rows x that a matrix multiplies

The error of a weight costs in proportion to its channel's energy (the idea of llama.cpp's imatrix and of AWQ), and some
channels have hundreds of times the energy of others. So int4 rounding weighs errors by it (quantize.py), and int8
smoothing uses it (int8_matmul.py). Which text is used matters little. SmolLM2-135M in blocks of 128, KL to float32:
0.39 without channel energy, 0.28 from random tokens, 0.26 from the 160 tokens below, 0.25 from 2,000 tokens of the test
set's kind.

The checkpoint's own decoder computes both, in float32, with one matrix in memory at a time (on_demand.py). The rows are
a short text and, for models with images, a part of one image; the scales see more (`rows_for_scales`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from autosteer.export.checkpoint.decoder_config import DecoderConfig
from autosteer.export.checkpoint.hf_model import deepstack_arguments
from autosteer.export.checkpoint.layer_sweep import LayerSweep
from autosteer.export.checkpoint.on_demand import open_on_demand
from autosteer.export.checkpoint.open import Checkpoint
from autosteer.runtime.manifest import ImageSpec

from .kv_scales import KVScales, RangeObserver, through

TEXT = (
    "The sea covers most of our planet, and yet we know less about its floor than about the surface of the moon. "
    "In 1872 a ship called Challenger left England to change that. For four years her crew measured depth, "
    "temperature and currents, and brought up animals that nobody had seen before. Name three colours. Red, blue and "
    "green. What is shown in this picture? A dog lies on a sofa beside a window; outside it rains. How do I cook rice? "
    "Wash one cup of rice, add two cups of water and a little salt, bring it to the boil, then cover it and let it "
    "stand on a low flame for fifteen minutes. def add(a, b): return a + b. I am sorry, but I cannot help with that."
)
TEXT_TOKENS = 192  # at most; TEXT may be more in a small vocabulary
NATIVE_TILES = 16  # along a side of the image, for models that take pictures in any size: 256 rows
IMAGE_ROWS = 256  # about; every n-th row of one tile
RANDOM_TOKENS = 448  # at least, for the scales of int8 caches
FLOOR = 1e-3  # of the mean energy: a channel without energy here may have some elsewhere

Draw = Callable[[int], np.ndarray]  # a side in pixels -> pixel_values (1, 3, side, side) in -1..1


def _gradients(size: int) -> np.ndarray:
    """pixel_values (1, 3, size, size) in -1..1: gradients, and a bright and a dark rectangle."""
    y, x = np.mgrid[0:size, 0:size] * (2.0 / size) - 1.0
    picture = np.stack([x, y, x * y]).astype(np.float32)
    third = size // 3
    picture[:, third // 2 : third, third:-third] = np.array([0.9, -0.7, 0.3], np.float32)[:, None, None]
    picture[:, 2 * third :, third // 2 : 2 * third] = np.array([-0.8, -0.6, -0.9], np.float32)[:, None, None]
    return picture[None]


def _white(size: int) -> np.ndarray:
    """A white picture."""
    return np.ones((1, 3, size, size), np.float32)


def _colours(size: int) -> np.ndarray:
    """Eight plain stripes, in the corners of the colour cube."""
    corner = np.arange(size) * 8 // size
    stripes = np.stack([corner >> bit & 1 for bit in range(3)]) * 2.0 - 1.0
    return np.broadcast_to(stripes[:, None], (3, size, size)).astype(np.float32)[None]


def _chessboard(size: int) -> np.ndarray:
    """8 x 8 fields, white and black."""
    field = np.arange(size) * 8 // size
    board = (field[:, None] + field) % 2 * 2.0 - 1.0
    return np.broadcast_to(board, (1, 3, size, size)).astype(np.float32)


# Plain areas and hard edges. With the gradients alone, what shows a thing on plain ground was clipped to half.
OTHER_PICTURES: tuple[Draw, ...] = (_white, _colours, _chessboard)


@dataclass(frozen=True)
class Calibration:
    """Results of a calibration."""

    channel_energy: dict[str, torch.Tensor]  # (K,) by tensor name, for every matrix of the layers and for the LM head
    kv_scales: tuple[KVScales, ...]  # by layer


def calibrate_decoder(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    rows: torch.Tensor,
    report: Callable[[str], None] = lambda step: None,
) -> Calibration:
    """Run the checkpoint's decoder on `rows` of `calibration_rows`, with a batch. `report` is told each layer.

    Channel energy is taken from the first sequence of the batch, the scales of keys and values from all.

    A tied embedding is rounded with the LM head's channel energy, because that is where its error costs most.
    """
    prefix, found = checkpoint.family.decoder, {}
    decoder = open_on_demand(checkpoint, config.lm_head, LayerSweep(0)).get_submodule(prefix)
    rotary = config.rotary.by_table()
    caches = [RangeObserver(rotary[config.rotary_table(i)], config.context_length) for i in range(len(decoder.layers))]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[f"{name}.weight"] = energy(args[0][:1])

        return hook

    for i, layer in enumerate(decoder.layers):
        step = f"calibrating: layer {i} of {len(decoder.layers)}"
        layer.register_forward_pre_hook(lambda module, args, step=step: report(step))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(watch(f"{prefix}.layers.{i}.{name}"))
    with torch.inference_mode():
        last = decoder(**decoder_arguments(rows, config.hidden_size), **through(decoder, caches)).last_hidden_state
    found[config.lm_head] = energy(last[:1])
    return Calibration(found, tuple(cache.scales for cache in caches if cache.scales))


def energy(rows: torch.Tensor) -> torch.Tensor:
    """rows (.., K) that a matrix multiplies -> channel energy (K,), 1 on average, at least FLOOR."""
    squares = rows.flatten(0, -2).square().mean(0)
    return squares / squares.mean().clamp_min(torch.finfo(torch.float32).tiny) + FLOOR  # all zeros: FLOOR everywhere


def calibration_rows(
    checkpoint: Checkpoint, tokenizer: Any, image_graph: Path | None, spec: ImageSpec | None
) -> torch.Tensor:
    """(1, S, D) float32, (1, S, (1 + L) * D) with deepstack: TEXT and, if there is an image graph, a part of one image.
    Its weights must be on disk.
    """
    text = checkpoint.embed(tokenizer(TEXT).input_ids[:TEXT_TOKENS])
    if image_graph is None or spec is None:
        return text[None]
    image = image_rows(checkpoint, image_graph, spec)
    text = widened(text, image.shape[-1])
    return torch.cat([text[:1], image, text[1:]])[None]


def image_rows(checkpoint: Checkpoint, image_graph: Path, spec: ImageSpec, draw: Draw = _gradients) -> torch.Tensor:
    """(n, D) float32, (n, (1 + L) * D) with deepstack: about IMAGE_ROWS rows of a drawn picture. The image graph's
    weights must be on disk.
    """
    session = ort.InferenceSession(image_graph, providers=["CPUExecutionProvider"])
    pixels = draw(spec.tile_size)
    if native := spec.native:
        pixels = np.repeat(draw(NATIVE_TILES * spec.tile_size), native.frames, 0)
    rows = torch.from_numpy(session.run(None, {"pixel_values": pixels})[0][0])
    rows = rows[:: max(1, len(rows) // IMAGE_ROWS)]
    if rows.is_floating_point():
        return rows
    return checkpoint.embed(rows.tolist())


def widened(text: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of text (.., D) as wide as those of a picture: text has no deepstack, so zeros follow."""
    return nn.functional.pad(text, (0, width - text.shape[-1]))


def decoder_arguments(rows: torch.Tensor, width: int) -> dict[str, Any]:
    """A decoder's arguments for `rows` (B, S, D), or (B, S, (1 + L) * D) with deepstack. `width`: D."""
    embeds, *added = rows.split(width, -1)
    return {"inputs_embeds": embeds, **deepstack_arguments(added)}


def rows_for_scales(
    rows: torch.Tensor, checkpoint: Checkpoint, vocab: int, image_graph: Path | None, spec: ImageSpec | None
) -> torch.Tensor:
    """`rows` of `calibration_rows` with sequences added to the batch: random tokens, and other pictures in the place of
    the first; the same in every export.

    They reveal the range of keys and values better than any text of this length. They say nothing about channel energy.
    """
    _, length, width = rows.shape
    count = -(-RANDOM_TOKENS // length) * length
    ids = np.random.default_rng(0).integers(0, vocab, count)
    random = checkpoint.embed(ids.tolist())
    more = [widened(random, width).reshape(-1, length, width)]
    if image_graph is not None and spec is not None:
        for draw in OTHER_PICTURES:
            image = image_rows(checkpoint, image_graph, spec, draw)
            more.append(torch.cat([rows[:, :1], image[None], rows[:, 1 + len(image) :]], 1))
    return torch.cat([rows, *more])
