"""Compare every tensor in a package's graphs with the checkpoint, without running a graph.

Running a graph shows a wrong weight only if the validation prompts use it. This finds every tensor of every graph by
its checkpoint name:

    unquantised       norms, biases, matrices, embeddings, the gate: must be equal after the cast to their type
    quantised         the error of every row and column of a matrix must be small, and must not change its scale
    computed          the runtime's rotary tables must equal Hugging Face's, scales of int8 caches those of a second
                      calibration
    attributes        of attention and norms: must be the config's

What graphs compute with them is checked in validate.py. Constants without a checkpoint name (an axis, a bound, the
largest code) are not compared here: an error in one shows in the graph's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from autosteer.export.checkpoint.decoder_config import FULL, SLIDING, DecoderConfig, decoder_config
from autosteer.export.checkpoint.open import Checkpoint, load_processor
from autosteer.export.graphs.calibration import calibrate_decoder, calibration_rows, rows_for_scales
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime.manifest import IMAGE_GRAPHS, Manifest
from autosteer.runtime.rotary import tables

from .dequantize import bits_of, packed_kv_scales, read, stacked
from .metrics import worse

BLOCK_BYTES = 32 << 20  # of float32
TINY = 1e-30
DEFAULTS = {"local_window_size": -1, "softcap": 0}  # onnxruntime's, of attributes that a node may leave out


@dataclass(frozen=True)
class Rounding:
    """Rounding errors of a matrix."""

    matrix: float  # error, relative to the matrix (Frobenius norm)
    scale: float  # how much larger or smaller it has become: |<stored, original> / <original, original> - 1|
    row: float  # error of the worst row: the lesser of its relative error and its rms error in steps
    column: float  # the same for columns; a small column may round to zero, and is still within a step
    steps: float  # 8 bits: rms error of the worst row or column in steps; 0 for 4 bits, where scales are chosen to clip

    def or_worse(self, other: Rounding | None) -> Rounding:
        """The larger of each error."""
        return Rounding(*map(worse, astuple(self), astuple(other))) if other else self


@dataclass(frozen=True)
class GraphAudit:
    """Results for one graph."""

    differing: int  # unquantised numbers that differ from the checkpoint, its config or the safety folder
    rounding: Rounding | None  # worst of all matrices; None if none is quantised


def audit(
    path: Path,
    checkpoint: Checkpoint,
    safety: SafetyArtifact | None,
    wanted: Callable[[str], bool] = lambda tensor: True,
) -> GraphAudit:
    """Compare one graph, or those of its tensors that are `wanted`."""
    graph = ir.load(path).graph
    config, rounding = decoder_config(checkpoint), None
    differing = sum(_attributes_that_differ(node, config) for node in graph)
    tables = {node.inputs[0] for node in graph if node.op_type == "GatherBlockQuantized"}
    for node in graph:
        if any(value is not None and value.name and wanted(value.name) for value in node.inputs):
            for name, rows in stacked(node, checkpoint).items():
                rounding = _rounding(node, rows, checkpoint, name).or_worse(rounding)
    gate = _gate_tensors(safety)
    for name, value in graph.initializers.items():
        names = name.split("+")
        if not wanted(name):
            continue
        if name in gate:
            differing += _unequal(_array(value), gate[name])
        elif all(part in checkpoint for part in names) and value not in tables:
            differing += _differing(value, names, checkpoint)
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.release()  # as in dequantize.py
    return GraphAudit(differing, rounding)


@torch.no_grad()
def rotary_error(manifest: Manifest, rotary_emb: Any) -> float:
    """Largest difference between the runtime's rotary tables and those of Hugging Face's module, divided by the
    position (from 1), over the whole context. Time, row and column differ where a model has all three.
    """
    worst, context, long = 0.0, manifest.dims.context_length, manifest.rotary.long
    kinds: dict[str, tuple[str, ...]] = {"": ()}  # by table: what Hugging Face's module wants to know
    if isinstance(rotary_emb.rope_type, dict):
        kinds = {"": (FULL,), "windowed_": (SLIDING,)}
    elif manifest.rotary.windowed:
        return math.inf
    for count in [min(context, long.beyond), context] if long else [context]:
        positions = np.stack([np.arange(count), np.arange(count)[::-1], np.roll(np.arange(count), count // 3)])
        given = torch.from_numpy(positions)[:, None] if manifest.rotary.axes else torch.arange(count)[None]
        specs = manifest.rotary.of(count).by_table()
        for name, kind in kinds.items():
            both = tables(specs.get(name, specs[""]), positions), rotary_emb(torch.zeros(1, 1), given, *kind)
            for ours, doubled in zip(*both, strict=True):
                theirs = doubled[0, :, : doubled.shape[-1] // 2].numpy()
                if ours.shape != theirs.shape:
                    return math.inf
                off = np.abs(ours.astype(manifest.activations) - theirs) / (1.0 + positions.max(0))[:, None]
                worst = worse(worst, float(off.max()))
    return worst


def cache_scales_error(folder: Path, manifest: Manifest, checkpoint: Checkpoint, copies: Sequence[Manifest]) -> float:
    """Largest relative difference between the scales of int8 caches, in each of a package's `copies` of the decoder,
    and those of a second calibration. The copies share caches: one reads what the other has written.
    """
    config, processor = decoder_config(checkpoint, manifest.dims.context_length), load_processor(checkpoint)
    image = next((folder / manifest.graphs[name].file for name in IMAGE_GRAPHS if name in manifest.graphs), None)
    rows = calibration_rows(checkpoint, getattr(processor, "tokenizer", processor), image, manifest.image)
    rows = rows_for_scales(rows, checkpoint, config.vocab_size, image, manifest.image)
    found = calibrate_decoder(checkpoint, config, rows).kv_scales

    def error(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
        return math.inf if one.shape != other.shape else float((np.abs(one - other) / other).max())

    worst = 0.0
    for stored in (packed_kv_scales(folder, copy) for copy in copies):
        if len(stored) != len(found):
            return math.inf
        for s, f in zip(stored, found, strict=True):
            worst = worse(worst, worse(error(s.keys, f.keys), error(s.values, f.values)))
    return worst


def _attributes_that_differ(node: ir.Node, config: DecoderConfig) -> int:
    """How many attributes of a decoder's operator are not as the checkpoint's config says."""
    expected: dict[str, float] = {}
    if node.op_type == "GroupQueryAttention":
        past_key = node.inputs[3]
        layer = int(str(past_key.name).split(".")[1]) if past_key is not None else 0
        expected = {
            "num_heads": config.num_attention_heads,
            "kv_num_heads": config.num_key_value_heads,
            "scale": float(np.float32(config.attention_scale)),
            "do_rotary": 1,
            "local_window_size": config.windows[layer] or -1,
            "softcap": 0,
        }
    elif node.op_type in ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"):
        expected = {"epsilon": float(np.float32(config.rms_norm_eps))}
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    return sum(given.get(name, DEFAULTS.get(name)) != value for name, value in expected.items())


def _rounding(node: ir.Node, rows: slice, checkpoint: Checkpoint, name: str) -> Rounding:
    """Rounding errors of the checkpoint's matrix `name`, which is `rows` of a node's stacked matrix."""
    width = math.prod(checkpoint.shape(name)[1:])
    columns = torch.zeros(3, width)  # sums of squares: of errors, of the checkpoint's, of errors in steps
    along = row = row_steps = 0.0
    done = 0
    for original in checkpoint.rows(name, BLOCK_BYTES):
        first = rows.start + done
        stored = read(node, slice(first, first + len(original)))
        if stored.weights.shape != original.shape:
            return Rounding(*[math.inf] * 5)
        off = stored.weights - original
        along += float(off.flatten() @ original.flatten())
        in_steps = off / stored.steps.clamp_min(TINY)
        squares = [x.square_() for x in (off, original, in_steps)]
        row = worse(row, _worst([square.sum(1) for square in squares], width))
        row_steps = worse(row_steps, float(squares[2].mean(1).max().sqrt()))
        columns += torch.stack([square.sum(0) for square in squares])
        done += len(original)
    error, norm = (float(total) for total in columns[:2].sum(1, dtype=torch.float64))
    return Rounding(
        matrix=math.sqrt(error / max(norm, TINY)),
        scale=abs(along) / max(norm, TINY),
        row=row,
        column=_worst(list(columns), done),
        steps=worse(row_steps, float((columns[2] / done).max().sqrt())) if bits_of(node) == 8 else 0.0,
    )


def _worst(squares: list[torch.Tensor], count: int) -> float:
    """The largest error of several rows or columns of `count` numbers each. `squares`: sums of squared errors, of
    squared originals, of squared errors in steps.
    """
    error, norm, in_steps = squares
    return float(torch.minimum(error / norm.clamp_min(TINY), in_steps / count).max().sqrt())


def _differing(value: ir.Value, names: list[str], checkpoint: Checkpoint) -> int:
    """How many numbers of an initialiser differ from the named tensors, stacked and cast to its type."""
    ours, first, differing = _array(value), 0, 0
    for name in names:
        for block in checkpoint.rows(name, BLOCK_BYTES):
            differing += _unequal(ours[first : first + len(block)], block.numpy())
            first += len(block)
    return differing + abs(ours.size - math.prod((first, *ours.shape[1:])))


def _unequal(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> int:
    if ours.shape != theirs.shape:
        return max(ours.size, theirs.size)
    return int((ours != theirs.astype(ours.dtype)).sum())


def _array(value: ir.Value) -> npt.NDArray[Any]:
    """An initialiser as a memory map."""
    assert value.const_value is not None
    return value.const_value.numpy()


def _gate_tensors(safety: SafetyArtifact | None) -> dict[str, npt.NDArray[np.float32]]:
    if safety is None:
        return {}
    probers = {"prober": safety.prober, "monitor": safety.monitor or {}}
    tensors = {f"{name}.{part}": tensor for name, parts in probers.items() for part, tensor in parts.items()}
    return {name: t.float().numpy() for name, t in (*tensors.items(), ("steer_matrix", safety.steer_matrix))}
