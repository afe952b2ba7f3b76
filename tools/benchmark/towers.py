"""What llama.cpp calls a family's image tower: names of tensors, sizes, how it stores what it stores in another way
(tools/mtmd/clip-impl.h and conversion/ in llama.cpp). A family is one function, and its line in FAMILIES.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
TENSORS = re.compile(r"(model\.)?(vision_model|vision_tower|visual|connector|multi_modal_projector)\.")


@dataclass(frozen=True)
class Tower:
    """A family's tower in llama.cpp's words."""

    projector: str
    turn: str  # the family's turn of one picture, {image}, and a text, {text}
    names: tuple[tuple[str, str], ...]  # the beginning of Hugging Face's name -> what stands there in llama.cpp's
    facts: dict[str, Any]  # clip.vision.*; all have GELU, which llama.cpp computes by tanh
    parts: Mapping[str, Mapping[str, Callable[[Array], Array]]] = field(default_factory=dict)  # by llama.cpp's name:
    # what it stores in place of that tensor, and how to make it

    def stored(self, name: str, tensor: Array) -> Iterator[tuple[str, Array]]:
        """llama.cpp's names and values of what it stores of one of Hugging Face's tensors."""
        for pattern, begins in self.names:
            theirs, found = re.subn(f"^{pattern}", begins, name)
            if found:
                for part, value in self.parts.get(theirs, {theirs: np.asarray}).items():
                    yield part, value(tensor)
                return
        raise ValueError(f"{name}: llama.cpp has no such tensor")


def idefics3(config: dict[str, Any], images: dict[str, Any]) -> Tower:
    """SigLIP; rows are merged and projected."""
    vision = config["vision_config"]
    layer = r"model\.vision_model\.encoder\.layers\.(\d+)\."
    return Tower(
        projector="idefics3",
        turn="<|im_start|>User:{image}{text}<end_of_utterance>\nAssistant:",
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
        turn="<|im_start|>user\n{image}\n{text}<|im_end|>\n<|im_start|>assistant\n",
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
    """Rows of a picture at its own size, merged, and for the first decoder layers what the `deepstack` layers have. To
    the tower a picture is two equal frames: one kernel for each.
    """
    vision = config["vision_config"]
    layers = vision["deepstack_visual_indexes"]
    layer = r"model\.visual\.blocks\.(\d+)\."
    merger = r"model\.visual\.deepstack_merger_list\."
    return Tower(
        projector="qwen3vl_merger",
        turn="<|im_start|>user\n{image}{text}<|im_end|>\n<|im_start|>assistant\n",
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
        },
        parts={
            "v.patch_embd.weight": {
                "v.patch_embd.weight": lambda kernel: kernel[:, :, 0],
                "v.patch_embd.weight.1": lambda kernel: kernel[:, :, 1],
            }
        },
    )


FAMILIES = {"idefics3": idefics3, "internvl": internvl, "qwen3_vl": qwen3_vl}  # model_type


def of(checkpoint: Path) -> Tower:
    """The tower of a checkpoint of one of FAMILIES."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    processor = json.loads((checkpoint / "processor_config.json").read_text(encoding="utf-8"))
    images = processor["image_processor"]
    tower = FAMILIES[config["model_type"]](config, images)
    common = {
        "embedding_length": config["vision_config"]["hidden_size"],
        "feed_forward_length": config["vision_config"]["intermediate_size"],
        "projection_dim": config["text_config"]["hidden_size"],
        "image_mean": images["image_mean"],
        "image_std": images["image_std"],
    }
    return replace(tower, facts=common | tower.facts)
