"""weights.bin: the one file with all large tensors. It is written block by block, so the model is never in memory.

A tensor is read from the checkpoint in blocks of rows, cast or quantised, and appended. It is aligned to 4096 bytes, so
that onnxruntime can map it. Graphs refer to it by offset. A tensor that several graphs use (tied embeddings) is
stored once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from autosteer.export.checkpoint.open import Checkpoint
from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.manifest import WEIGHTS_FILE

from .quantize import Blocks, Packed, quantise, quantise_rows

ALIGNMENT = 4096
Advance = Callable[[str, int], None]
COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")  # buffers that old checkpoints store as weights
BLOCK_BYTES = 64 << 20  # of float32 rows in memory at a time


class WeightStore:
    """Appends tensors to `folder`/weights.bin and hands out onnx_ir.ExternalTensor references to them."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, advance: Advance = lambda name, numbers: None):
        """`advance` is told a tensor's name, and how many of its numbers were just written."""
        self._advance = advance
        self.folder = folder
        self._checkpoint = checkpoint
        self._file: IO[bytes] = (folder / WEIGHTS_FILE).open("wb")
        self._digest = hashlib.sha256()
        self._places: dict[str, tuple[int, int]] = {}  # key -> offset, length
        self.read: set[str] = set()  # names of the checkpoint's tensors that are in the file
        self.channel_energy: dict[str, torch.Tensor] = {}  # (K,) by tensor name: see calibration.py
        self.rounded: dict[str, Path] = {}  # matrices that are rounded already: see gptq.py

    def close(self) -> str:
        """Flush and return the file's sha256."""
        self._file.close()
        return self._digest.hexdigest()

    def expect_all_read(self, *modules: str) -> None:
        """Raise UnsupportedModelError if a tensor of `modules` is not in the file: the model has weights that no graph
        uses.
        """
        names = [n for n in self._checkpoint.tensor_files if any(n.startswith(f"{module}.") for module in modules)]
        unread = [n for n in names if n not in self.read and not n.endswith(COMPUTED)]
        if unread:
            raise UnsupportedModelError(
                f"{self._checkpoint.folder}: no graph uses {unread[0]}"
                f"{f' and {len(unread) - 1} more tensors' if unread[1:] else ''}: this decoder is not supported yet"
            )

    def flush(self) -> None:
        """Make everything written so far readable through the file system."""
        self._file.flush()

    def matrix(self, names: Sequence[str], dtype: str, *, shape: Sequence[int]) -> ir.ExternalTensor:
        """Checkpoint tensors stacked along their rows, cast to `dtype` (numpy name)."""
        key = f"{'+'.join(names)}:{dtype}"
        if key not in self._places:
            self._write(key, (rows.numpy().astype(dtype) for rows in self._rows(names, shape)))
        return self._reference(key, dtype, shape)

    def quantised(
        self, names: Sequence[str], blocks: Blocks, shape: tuple[int, int], dtype: str = "float32"
    ) -> dict[str, ir.ExternalTensor]:
        """Checkpoint matrices (N, K) stacked along N and quantised: the parts of `Packed`, scales as `dtype`.

        If the checkpoint stores them in these blocks, they are copied and not rounded again.
        """
        key = f"{'+'.join(names)}:{blocks}"
        n, count = shape[0], -(-shape[1] // blocks.size)
        if f"{key}:codes" not in self._places:
            small: list[Packed] = []

            def codes() -> Iterator[npt.NDArray[Any]]:
                for packed in self._packed(names, blocks, shape):
                    small.append(replace(packed, codes=packed.codes[:0]))
                    yield packed.codes.numpy()

            self._write(f"{key}:codes", codes())
            self._write(f"{key}:scales", [part.scales.numpy().astype(dtype) for part in small])
            if not blocks.symmetric:
                self._write(f"{key}:zero_points", [p.zero_points.numpy() for p in small if p.zero_points is not None])
        parts = {
            "codes": self._reference(f"{key}:codes", "uint8", (n, count, blocks.size * blocks.bits // 8)),
            "scales": self._reference(f"{key}:scales", dtype, (n, count)),
        }
        if not blocks.symmetric:
            parts["zero_points"] = self._reference(f"{key}:zero_points", "uint8", (n, -(-count // 2)))
        return parts

    def columns(
        self, names: Sequence[str], shape: tuple[int, int], smoothing: npt.NDArray[np.float32] | None = None
    ) -> dict[str, ir.ExternalTensor]:
        """Checkpoint matrices (N, K) stacked along N, for MatMulIntegerToFloat: `codes` (K, N) int8 and `scales` (N,).

        Activations will be multiplied by `smoothing` (K,), so weights are divided by it.
        """
        key, (n, k) = f"{'+'.join(names)}:columns", shape
        if f"{key}:codes" not in self._places:
            factor = 1.0 if smoothing is None else torch.from_numpy(smoothing)
            parts = [quantise_rows(rows / factor) for rows in self._rows(names, shape)]
            self._write(f"{key}:codes", [torch.cat([codes for codes, _ in parts]).T.numpy()])
            self._write(f"{key}:scales", [scales.numpy() for _, scales in parts])
        return {
            "codes": self._reference(f"{key}:codes", "int8", (k, n)),
            "scales": self._reference(f"{key}:scales", "float32", (n,)),
        }

    def array(self, key: str, array: npt.NDArray[Any]) -> ir.ExternalTensor:
        """A computed array, stored once per key."""
        if key not in self._places:
            self._write(key, [array])
        return self._reference(key, array.dtype.name, array.shape)

    def _packed(self, names: Sequence[str], blocks: Blocks, shape: tuple[int, int]) -> Iterator[Packed]:
        if all(name in self.rounded for name in names):
            for name in self._expected(names, shape):
                yield (packed := Packed(**torch.load(self.rounded[name])))
                self.rounded[name].unlink()
                self._advance(name, len(packed.codes) * shape[1])
            return
        if not all(self._checkpoint.keeps(name, blocks) for name in names):
            channel_energy = self.channel_energy.get(names[0])
            yield from (quantise(rows, blocks, channel_energy) for rows in self._rows(names, shape))
            return
        for name in self._expected(names, shape):
            for packed in self._checkpoint.packed_rows(name, BLOCK_BYTES):
                yield packed
                self._advance(name, len(packed.codes) * shape[1])

    def _expected(self, names: Sequence[str], shape: Sequence[int]) -> Iterator[str]:
        """The names, after a check that the tensors stacked along their rows have `shape`."""
        heights = [self._checkpoint.shape(name)[0] for name in names]
        heights[-1] += shape[0] - sum(heights)
        for name, height in zip(names, heights, strict=True):
            self._checkpoint.expect(name, (height, *shape[1:]))
            self.read.add(name)
            yield name

    def _rows(self, names: Sequence[str], shape: Sequence[int]) -> Iterator[torch.Tensor]:
        """The named tensors in blocks of rows. Stacked along their rows they have `shape`."""
        for name in self._expected(names, shape):
            for rows in self._checkpoint.rows(name, BLOCK_BYTES):
                yield rows
                self._advance(name, rows.numel())

    def _write(self, key: str, blocks: Iterable[npt.NDArray[Any]]) -> None:
        padding = -self._file.tell() % ALIGNMENT
        self._put(b"\0" * padding)
        start = self._file.tell()
        for block in blocks:
            self._put(np.ascontiguousarray(block).data)
        self._places[key] = (start, self._file.tell() - start)

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def _reference(self, key: str, dtype: str, shape: Sequence[int]) -> ir.ExternalTensor:
        (offset, length), size = self._places[key], np.dtype(dtype).itemsize
        if length != int(np.prod(shape)) * size:  # it was stored for another use of the same tensors
            raise UnsupportedModelError(
                f"{self._checkpoint.folder}: {key.partition(':')[0]} has {length // size} numbers, and a graph reads "
                f"it as {list(shape)}: this decoder is not supported yet"
            )
        kind = ir.DataType.from_numpy(np.dtype(dtype))
        return ir.ExternalTensor(
            WEIGHTS_FILE, offset, length, kind, shape=ir.Shape(shape), name=key, base_dir=self.folder
        )
