"""Round the decoder's matrices to 4 bits so that what they compute on a text changes least (GPTQ, arXiv 2210.17323).

A matrix W (N, K) multiplies rows x. With H (K, K), the mean of x x^T over the rows of a text, rounding W to Q costs
trace((W - Q) H (W - Q)^T). Columns are rounded one after another, those with most energy H_jj first, and columns that
are still to come make up for the error of each. Scales and zero points of all blocks are chosen before (quantize.py),
so a package has the same format as without, and runs as fast. No weight moves further than a step.

The decoder reads the text in float32, with one matrix in memory at a time (on_demand.py).
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autosteer.export.checkpoint.decoder_config import DecoderConfig
from autosteer.export.checkpoint.layer_sweep import LayerSweep
from autosteer.export.checkpoint.on_demand import open_on_demand
from autosteer.export.checkpoint.open import Checkpoint
from autosteer.export.safety import builtin
from autosteer.runtime.errors import InputError

from .calibration import decoder_arguments, energy, widened
from .kv_scales import uncached
from .quantize import Blocks, Packed, grid, pack

LENGTH = 512  # tokens that are read together
SEQUENCES = 16  # at most; a quarter of them gives three quarters of the gain
CHARACTERS = 16 * LENGTH * SEQUENCES  # read at most: a token of a text has about 4
DAMPING = (0.1, 1.0)  # of the mean energy, added to each column's: H is singular if columns outnumber rows
REACH = 1.0  # steps between a weight and its code, at most: more would hide damage from validation, and gains 2 %
SMALL = 2.0  # steps: a column whose weights are smaller on average is rounded to nearest, or it would drown
AT_ONCE = 128  # columns between two updates of all that follow
ZERO_POINTS = 15  # the largest code


def read_text(source: str) -> str:
    """The beginning of a UTF-8 file, as far as it is needed; "builtin": calibration.txt, and then our prompts.

    Raises InputError if it cannot be read.
    """
    if source != builtin.NAME:
        try:
            with open(source, encoding="utf-8") as file:
                return file.read(CHARACTERS)
        except (OSError, UnicodeDecodeError) as err:
            raise InputError(f"--calibrate {source}: {err}") from err
    prompts = [text for twins in builtin.builtin_twins() for text in (twins.unsafe, twins.safe)]
    prompts += [harmless.text for harmless in builtin.builtin_harmless()]
    random.Random(0).shuffle(prompts)
    prose = (files("autosteer.export.graphs") / "calibration.txt").read_text(encoding="utf-8")
    return "\n".join([prose, *prompts])


def text_rows(text: str, checkpoint: Checkpoint, tokenizer: Any, picture: torch.Tensor | None) -> torch.Tensor:
    """(B, LENGTH, D) float32: embeddings of `text`, every fourth sequence with the rows `picture` (n, D) of an image
    behind its first token. As wide as those: (1 + L) * D with deepstack.

    Raises InputError if the text is shorter than LENGTH tokens.
    """
    ids = tokenizer(text[:CHARACTERS], add_special_tokens=False).input_ids[: LENGTH * SEQUENCES]
    if len(ids) < LENGTH:
        raise InputError(f"--calibrate: the text has {len(ids)} tokens; give at least {LENGTH}, better {4 * LENGTH}")
    rows = checkpoint.embed(ids[: len(ids) // LENGTH * LENGTH])
    rows = rows.reshape(-1, LENGTH, rows.shape[-1])
    if picture is not None:
        rows, shown = widened(rows, picture.shape[-1]), picture[: LENGTH - 1]
        rows[::4, 1 : 1 + len(shown)] = shown
    return rows


@torch.inference_mode()
def round_decoder(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    rows: torch.Tensor,
    blocks: Blocks,
    folder: Path,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, Path]:
    """Round every matrix of the decoder's layers while it reads `rows` of `text_rows`. By tensor name, the file in
    `folder` with the fields of its Packed. `report` is told each layer.
    """
    prefix, found = checkpoint.family.decoder, dict[str, Path]()
    decoder = open_on_demand(checkpoint, config.lm_head, LayerSweep(0)).get_submodule(prefix)
    last: list[torch.Tensor] = []  # what the last matrix read, and its second moment

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if not last or last[0] is not args[0]:  # queries, keys and values read the same
                x = args[0].flatten(0, -2)
                last[:] = args[0], x.T @ x / len(x)
            if not checkpoint.keeps(name, blocks):
                torch.save(vars(gptq(checkpoint.tensor(name), blocks, last[1])), buffer := io.BytesIO())
                found[name] = folder / f"{name}.pt"
                found[name].write_bytes(buffer.getbuffer())  # torch.save itself makes a RuntimeError of a full disk

        return hook

    for i, layer in enumerate(decoder.layers):
        step = f"rounding: layer {i} of {len(decoder.layers)}"
        layer.register_forward_pre_hook(lambda module, args, step=step: report(step))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(watch(f"{prefix}.layers.{i}.{name}.weight"))
    decoder(**decoder_arguments(rows, config.hidden_size), **uncached(decoder))
    return found


def gptq(rows: torch.Tensor, blocks: Blocks, second_moment: torch.Tensor) -> Packed:
    """Round rows (N, K) float32 in asymmetric blocks. second_moment: H, (K, K) float32."""
    (n, k), weight = rows.shape, second_moment.diagonal()
    _, scales, zero_points = grid(rows, blocks, energy(weight.sqrt()[None]))
    order = weight.argsort(descending=True)
    factor, block = _inverse_factor(second_moment[order][:, order]), order // blocks.size
    w, zeros = rows[:, order], zero_points.float()
    codes = torch.zeros(n, scales.shape[1] * blocks.size)
    codes[:, k:] = zeros[:, -1:]  # the padding is zero
    for first in range(0, k, AT_ONCE):
        some = slice(first, min(first + AT_ONCE, k))
        part, triangle = w[:, some].clone(), factor[some, some]
        errors = torch.empty_like(part)
        for j, column in enumerate(part.unbind(1)):
            scale, zero = scales[:, block[first + j]], zeros[:, block[first + j]]
            steps = torch.where(scale == 0, 0, rows[:, order[first + j]] / scale)
            reach = REACH if float(steps.square().mean().sqrt()) > SMALL else 0.5
            wanted = torch.where(scale == 0, 0, column / scale).round()
            wanted = torch.maximum(torch.minimum(wanted, (steps + reach).floor()), (steps - reach).ceil())
            code = (wanted + zero).clamp_(0, ZERO_POINTS)
            codes[:, order[first + j]] = code
            errors[:, j] = (column - (code - zero) * scale) / triangle[j, j]
            part[:, j + 1 :].addr_(errors[:, j], triangle[j, j + 1 :], alpha=-1)
        w[:, some.stop :].addmm_(errors, factor[some, some.stop :], alpha=-1)
    packed = pack(codes.to(torch.uint8).unflatten(1, (-1, blocks.size)))
    return Packed(packed, scales, pack(zero_points))


def _inverse_factor(second_moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of H, (K, K), damped until it has one."""
    mean = second_moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    for damping in DAMPING:
        damped = second_moment + damping * mean * torch.eye(len(second_moment))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor: torch.Tensor
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
    raise InputError("--calibrate: what a matrix reads of this text is not finite")
