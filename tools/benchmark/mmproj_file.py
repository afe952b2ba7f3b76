"""The tower of a checkpoint with pictures as a GGUF file for llama.cpp (its "mmproj").

    python -m benchmark.mmproj_file CHECKPOINT FILE Q8_0

Runs in the peers' interpreter (gguf, safetensors, torch). Matrices are stored as told (F32, F16, Q8_0); as F16 where
their rows do not divide into blocks. Position embeddings, biases and norms stay float32, the convolution F16 or F32, as
in llama.cpp's own files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from benchmark import towers
from benchmark.gguf_file import tensors


def write(checkpoint: Path, path: Path, kind: str) -> None:
    """Write the tower and the projection to `path`, matrices as `kind`."""
    tower = towers.of(checkpoint)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", tower.projector)
    writer.add_bool("clip.use_gelu", True)
    add: dict[type, Callable[[str, Any], None]] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for name, value in tower.facts.items():
        add[type(value)](f"clip.vision.{name}", value)
    for name, tensor in tensors(checkpoint):
        if towers.TENSORS.match(name):
            for theirs, part in tower.stored(name, tensor):
                data, as_kind = _rounded(theirs, np.ascontiguousarray(part), Type[kind])
                writer.add_tensor(theirs, data, raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rounded(name: str, tensor: towers.Array, kind: Type) -> tuple[npt.NDArray[np.generic], Type]:
    if tensor.ndim == 1 or "position_embd" in name:
        return tensor, Type.F32
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if tensor.ndim != 2 or tensor.shape[-1] % block:
        kind = Type.F32 if kind is Type.F32 else Type.F16
    return gguf.quants.quantize(tensor, kind), kind


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
