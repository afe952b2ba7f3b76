"""The tower of an Idefics3 checkpoint as a GGUF file for llama.cpp (its "mmproj").

    python -m benchmark.mmproj_file CHECKPOINT FILE Q8_0

Runs in the peers' interpreter (gguf, safetensors, torch). Matrices are stored as told (F32, F16, Q8_0); as F16 where
their rows do not divide into blocks. Position embeddings, biases and norms stay float32, the convolution F16 or F32, as
in llama.cpp's own files.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from benchmark.gguf_file import TOWER, tensors

NAMES = (  # Hugging Face's -> llama.cpp's (tools/mtmd/clip-impl.h)
    (r"model\.vision_model\.embeddings\.patch_embedding\.", "v.patch_embd."),
    (r"model\.vision_model\.embeddings\.position_embedding\.", "v.position_embd."),
    (r"model\.vision_model\.post_layernorm\.", "v.post_ln."),
    (r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"v.blk.\1.attn_\2."),
    (r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"v.blk.\1.attn_out."),
    (r"model\.vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"v.blk.\1.ln\2."),
    (r"model\.vision_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.", r"v.blk.\1.ffn_up."),
    (r"model\.vision_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.", r"v.blk.\1.ffn_down."),
    (r"model\.connector\.modality_projection\.proj\.", "mm.model.fc."),
)


def write(checkpoint: Path, path: Path, kind: str) -> None:
    """Write the tower and the projection to `path`, matrices as `kind`."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    processor = json.loads((checkpoint / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    vision = config["vision_config"]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "idefics3")
    writer.add_bool("clip.use_gelu", True)  # GELU by tanh
    sizes = {
        "image_size": vision["image_size"],
        "preproc_image_size": processor["size"]["longest_edge"],
        "patch_size": vision["patch_size"],
        "embedding_length": vision["hidden_size"],
        "feed_forward_length": vision["intermediate_size"],
        "block_count": vision["num_hidden_layers"],
        "attention.head_count": vision["num_attention_heads"],
        "projection_dim": config["text_config"]["hidden_size"],
        "projector.scale_factor": config["scale_factor"],
    }
    for name, size in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
    writer.add_array("clip.vision.image_mean", processor["image_mean"])
    writer.add_array("clip.vision.image_std", processor["image_std"])
    for name, tensor in tensors(checkpoint):
        if TOWER.match(name):
            data, stored = _stored(name, tensor, Type[kind])
            writer.add_tensor(_renamed(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str) -> str:
    for pattern, theirs in NAMES:
        renamed, found = re.subn(f"^{pattern}", theirs, name)
        if found:
            return renamed
    raise ValueError(f"{name}: llama.cpp has no such tensor")


def _stored(name: str, tensor: npt.NDArray[np.float32], kind: Type) -> tuple[npt.NDArray[np.generic], Type]:
    if tensor.ndim == 1 or "position_embedding" in name:
        return tensor, Type.F32
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if tensor.ndim != 2 or tensor.shape[-1] % block:
        kind = Type.F32 if kind is Type.F32 else Type.F16
    return gguf.quants.quantize(tensor, kind), kind


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
