"""The tower of a checkpoint with pictures as a GGUF file for llama.cpp (its "mmproj").

    python -m benchmark.mmproj_file CHECKPOINT FILE Q8_0

Runs in the peers' interpreter (gguf, safetensors, torch). Matrices are stored as told (F32, F16, Q8_0); as F16 where
their rows do not divide into blocks. Position embeddings, biases and norms stay float32, the convolution F16 or F32, as
in llama.cpp's own files.

A family is one function that says what llama.cpp calls its tensors and sizes (tools/mtmd/clip-impl.h, conversion/ in
llama.cpp), its line in FAMILIES, and its turn in peers.TURNS.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from benchmark.gguf_file import TOWER, tensors

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tower:
    """A family's tower in llama.cpp's words."""

    projector: str
    names: tuple[tuple[str, str], ...]  # the beginning of Hugging Face's name -> what stands there in llama.cpp's
    facts: dict[str, Any]  # clip.vision.*; all have GELU, which llama.cpp always takes by tanh
    parts: Mapping[str, Mapping[str, Callable[[Array], Array]]] = field(default_factory=dict)
    # llama.cpp's name of a tensor that it stores in another way -> names and values of what it stores


def idefics3(config: dict[str, Any], images: dict[str, Any]) -> Tower:
    """SigLIP; rows are merged and projected."""
    vision = config["vision_config"]
    layer = r"model\.vision_model\.encoder\.layers\.(\d+)\."
    return Tower(
        projector="idefics3",
        names=(
            (r"model\.vision_model\.embeddings\.patch_embedding\.", "v.patch_embd."),
            (r"model\.vision_model\.embeddings\.position_embedding\.", "v.position_embd."),
            (r"model\.vision_model\.post_layernorm\.", "v.post_ln."),
            (layer + r"self_attn\.([qkv])_proj\.", r"v.blk.\1.attn_\2."),
            (layer + r"self_attn\.out_proj\.", r"v.blk.\1.attn_out."),
            (layer + r"layer_norm([12])\.", r"v.blk.\1.ln\2."),
            (layer + r"mlp\.fc1\.", r"v.blk.\1.ffn_up."),
            (layer + r"mlp\.fc2\.", r"v.blk.\1.ffn_down."),
            (r"model\.connector\.modality_projection\.proj\.", "mm.model.fc."),
        ),
        facts={
            "image_size": vision["image_size"],
            "preproc_image_size": images["size"]["longest_edge"],
            "patch_size": vision["patch_size"],
            "block_count": vision["num_hidden_layers"],
            "attention.head_count": vision["num_attention_heads"],
            "attention.layer_norm_epsilon": vision["layer_norm_eps"],
            "projector.scale_factor": config["scale_factor"],
        },
    )


def internvl(config: dict[str, Any], images: dict[str, Any]) -> Tower:
    """InternViT of 300M parameters. llama.cpp puts the class token behind the patches, so its position goes there, too
    (llama.cpp's own converter leaves it in front, and every patch gets its neighbour's).
    """
    vision = config["vision_config"]
    tower, projector = r"(?:model\.)?vision_tower\.", r"(?:model\.)?multi_modal_projector\."
    layer = tower + r"encoder\.layer\.(\d+)\."
    return Tower(
        projector="internvl",
        names=(
            (tower + r"embeddings\.cls_token$", "v.class_embd"),
            (tower + r"embeddings\.position_embeddings$", "v.position_embd.weight"),
            (tower + r"embeddings\.patch_embeddings\.projection\.", "v.patch_embd."),
            (layer + r"attention\.([qkv])_proj\.", r"v.blk.\1.attn_\2."),
            (layer + r"attention\.projection_layer\.", r"v.blk.\1.attn_out."),
            (layer + r"lambda_([12])$", r"v.blk.\1.ls\2.weight"),
            (layer + r"layernorm_before\.", r"v.blk.\1.ln1."),
            (layer + r"layernorm_after\.", r"v.blk.\1.ln2."),
            (layer + r"mlp\.fc1\.", r"v.blk.\1.ffn_up."),
            (layer + r"mlp\.fc2\.", r"v.blk.\1.ffn_down."),
            (projector + r"layer_norm\.", "mm.model.mlp.0."),
            (projector + r"linear_1\.", "mm.model.mlp.1."),
            (projector + r"linear_2\.", "mm.model.mlp.3."),
        ),
        facts={
            "image_size": vision["image_size"][0],
            "patch_size": vision["patch_size"][0],
            "block_count": vision["num_hidden_layers"],
            "attention.head_count": vision["num_attention_heads"],
            "attention.layer_norm_epsilon": vision["layer_norm_eps"],
            "projector.scale_factor": round(1 / config["downsample_ratio"]),
            "preproc_min_tiles": images["min_patches"],
            "preproc_max_tiles": images["max_patches"],
        },
        parts={
            "v.class_embd": {"v.class_embd": np.ravel},
            "v.position_embd.weight": {"v.position_embd.weight": lambda rows: np.roll(rows[0], -1, axis=0)},
        },
    )


def qwen3_vl(config: dict[str, Any], images: dict[str, Any]) -> Tower:
    """Rows of a picture at its own size, merged, and for the first decoder layers what the `deepstack` layers have. A
    picture is two frames, so its patches are embedded by two kernels.
    """
    vision = config["vision_config"]
    layers = vision["deepstack_visual_indexes"]
    layer = r"model\.visual\.blocks\.(\d+)\."
    merger = r"model\.visual\.deepstack_merger_list\."
    return Tower(
        projector="qwen3vl_merger",
        names=(
            (r"model\.visual\.patch_embed\.proj\.", "v.patch_embd."),
            (r"model\.visual\.pos_embed\.", "v.position_embd."),
            (layer + r"norm([12])\.", r"v.blk.\1.ln\2."),
            (layer + r"attn\.qkv\.", r"v.blk.\1.attn_qkv."),
            (layer + r"attn\.proj\.", r"v.blk.\1.attn_out."),
            (layer + r"mlp\.linear_fc1\.", r"v.blk.\1.ffn_up."),
            (layer + r"mlp\.linear_fc2\.", r"v.blk.\1.ffn_down."),
            (r"model\.visual\.merger\.norm\.", "v.post_ln."),
            (r"model\.visual\.merger\.linear_fc1\.", "mm.0."),
            (r"model\.visual\.merger\.linear_fc2\.", "mm.2."),
            *((rf"{merger}{i}\.norm\.", f"v.deepstack.{layers[i]}.norm.") for i in range(len(layers))),
            *((rf"{merger}{i}\.linear_(fc[12])\.", rf"v.deepstack.{layers[i]}.\1.") for i in range(len(layers))),
        ),
        facts={
            "image_size": math.isqrt(vision["num_position_embeddings"]) * vision["patch_size"],
            "patch_size": vision["patch_size"],
            "block_count": vision["depth"],
            "attention.head_count": vision["num_heads"],
            "attention.layer_norm_epsilon": 1e-6,  # Hugging Face's own constant
            "spatial_merge_size": vision["spatial_merge_size"],
            "is_deepstack_layers": [number in layers for number in range(vision["depth"])],
        },
        parts={
            "v.patch_embd.weight": {
                "v.patch_embd.weight": lambda kernel: kernel[:, :, 0],
                "v.patch_embd.weight.1": lambda kernel: kernel[:, :, 1],
            }
        },
    )


FAMILIES = {"idefics3": idefics3, "internvl": internvl, "qwen3_vl": qwen3_vl}  # model_type


def write(checkpoint: Path, path: Path, kind: str) -> None:
    """Write the tower and the projection to `path`, matrices as `kind`."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    images = json.loads((checkpoint / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    tower = FAMILIES[config["model_type"]](config, images)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", tower.projector)
    writer.add_bool("clip.use_gelu", True)
    common = {
        "embedding_length": config["vision_config"]["hidden_size"],
        "feed_forward_length": config["vision_config"]["intermediate_size"],
        "projection_dim": config["text_config"]["hidden_size"],
        "image_mean": images["image_mean"],
        "image_std": images["image_std"],
    }
    add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for name, value in (common | tower.facts).items():
        add[type(value)](f"clip.vision.{name}", value)
    for name, tensor in tensors(checkpoint):
        if TOWER.match(name):
            for theirs, part in stored(tower, name, tensor):
                data, as_kind = _rounded(theirs, part, Type[kind])
                writer.add_tensor(theirs, data, raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(tower: Tower, name: str, tensor: Array) -> Iterator[tuple[str, Array]]:
    """llama.cpp's names and values of what it stores of one of Hugging Face's tensors."""
    for pattern, begins in tower.names:
        theirs, found = re.subn(f"^{pattern}", begins, name)
        if found:
            for part, value in tower.parts.get(theirs, {theirs: np.asarray}).items():
                yield part, np.ascontiguousarray(value(tensor))
            return
    raise ValueError(f"{name}: llama.cpp has no such tensor")


def _rounded(name: str, tensor: Array, kind: Type) -> tuple[npt.NDArray[np.generic], Type]:
    if tensor.ndim == 1 or "position_embd" in name:
        return tensor, Type.F32
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if tensor.ndim != 2 or tensor.shape[-1] % block:
        kind = Type.F32 if kind is Type.F32 else Type.F16
    return gguf.quants.quantize(tensor, kind), kind


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
