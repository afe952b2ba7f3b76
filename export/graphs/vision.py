"""Image graphs: Hugging Face's own modules, traced without weights.

A wrapper cuts what the device needs out of a Hugging Face model: an encoder whose rows go to the decoder
(vision_encoder), or a tokenizer whose ids go through embed_tokens (image_tokenizer). Modules and inputs are fake
tensors, so a tower of any size is traced in seconds and in no memory; initialisers keep their module paths as names,
and their data is then streamed from the checkpoint like any other weight.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from autosteer.export.checkpoint.open import Checkpoint
from autosteer.runtime.errors import PackageError
from autosteer.runtime.manifest import GraphSpec, Precision

from .dynamic_int8 import quantise_linears
from .int8_matmul import MICROSOFT
from .weights import WeightStore
from .writer import FLOAT32, OPSET, save_model


class ImageGraph(nn.Module):
    """Base of the wrappers. forward takes float32 pixel_values (tiles, 3, image_size, image_size) and returns float32
    rows, whatever dtype it computes in, or token ids.
    """

    name: str  # of the graph
    outputs: tuple[str, ...]
    exact: bool  # weights are stored in float32 whatever --precision says
    image_size: int
    constants: dict[str, npt.NDArray[Any]]  # computed buffers, which no checkpoint has


class TowerAndProjector(ImageGraph):
    """SigLIP or CLIP tower, one of its hidden states, projector. CLIP has a class token and a norm before the layers;
    some models have a newline. HF: get_image_features of LlavaOnevisionModel, LlavaModel and LlavaNextModel.
    """

    name, exact = "vision_encoder", False

    def __init__(self, hf_model: Any):
        super().__init__()
        self.model = hf_model.model  # parameters must have the checkpoint's names
        layers = self.model.vision_tower.encoder.layers
        index = hf_model.config.vision_feature_layer
        self.depth = index if index >= 0 else len(layers) + 1 + index
        self.first = 1 if hf_model.config.vision_feature_select_strategy == "default" else 0  # row that is kept
        self.newline: bool = hasattr(self.model, "image_newline")
        self.outputs = ("image_features", *(["image_newline"] if self.newline else []))
        self.image_size = hf_model.config.vision_config.image_size
        self.constants = {}

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(tiles, 3, size, size) -> image_features (tiles, tokens, D), and image_newline (D,) if there is one"""
        tower = self.model.vision_tower
        embeddings = tower.embeddings
        hidden = embeddings.patch_embedding(pixel_values.to(self.model.dtype)).flatten(2).transpose(1, 2)
        if hasattr(embeddings, "class_embedding"):
            hidden = torch.cat([embeddings.class_embedding.expand(hidden.shape[0], 1, -1), hidden], dim=1)
        hidden = hidden + embeddings.position_embedding.weight
        if hasattr(tower, "pre_layrnorm"):
            hidden = tower.pre_layrnorm(hidden)
        for layer in tower.encoder.layers[: self.depth]:
            hidden = layer(hidden, attention_mask=None)
        features = self.model.multi_modal_projector(hidden[:, self.first :]).float()
        return (features, self.model.image_newline.float() * 1.0) if self.newline else (features,)


class VQTokenizer(ImageGraph):
    """VQ-VAE encoder, nearest codebook entry, its token id (HF: ChameleonModel.get_image_tokens).

    Exact, because a rounded weight would change whole tokens.
    """

    name, outputs, exact = "image_tokenizer", ("input_ids",), True

    token_ids: torch.Tensor

    def __init__(self, hf_model: Any):
        super().__init__()
        self.model = hf_model.model
        vq = hf_model.config.vq_config
        self.image_size = vq.resolution
        ids = hf_model.model.vocabulary_mapping.img2bpe
        if missing := sorted(set(range(vq.num_embeddings)) - ids.keys()):
            raise PackageError(f"config.json: vocabulary_map names no token for image code {missing[0]}")
        self.constants = {"token_ids": np.array([ids[code] for code in range(vq.num_embeddings)], np.int64)}
        self.register_buffer("token_ids", torch.zeros(vq.num_embeddings, dtype=torch.int64))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(tiles, 3, size, size) -> input_ids (tiles, tokens)"""
        codes = self.distances(pixel_values).argmin(1)
        return self.token_ids[codes].reshape(pixel_values.shape[0], -1)

    def distances(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(tiles, 3, size, size) -> squared distance of every token's z to every code, (tiles * tokens, codes)

        Summed as HF does: |z|^2 does not change the order, but it makes near ties round in the same way.
        """
        vq = self.model.vqmodel
        codebook = vq.quantize.embedding.weight
        z = vq.quant_conv(vq.encoder(pixel_values)).permute(0, 2, 3, 1).flatten(0, 2)
        distances: torch.Tensor = (z**2).sum(1, keepdim=True) + (codebook**2).sum(1) - 2 * (z @ codebook.T)
        return distances


class TowerAndPixelShuffle(ImageGraph):
    """SigLIP tower whose patches are merged in squares and projected (HF: Idefics3Model.get_image_features)."""

    name, outputs, exact = "vision_encoder", ("image_features",), False

    def __init__(self, hf_model: Any):
        super().__init__()
        self.model = hf_model.model
        self.image_size = hf_model.config.vision_config.image_size
        ids = self._position_ids(hf_model.config.vision_config)
        self.constants = {"position_ids": ids}
        self.register_buffer("position_ids", torch.zeros(ids.shape, dtype=torch.int64))

    def _position_ids(self, vision_config: Any) -> npt.NDArray[np.int64]:
        """HF's position ids. HF computes them in float32, which is off by one for some grid sizes (25, 31, 41, ...)."""
        config = copy.copy(vision_config)
        config.hidden_size = 1
        side = self.image_size // config.patch_size
        with unset_fake_temporarily(), torch.no_grad():
            embeddings = type(self.model.vision_model.embeddings)(config)
            embeddings.patch_embedding.weight.zero_()
            embeddings.patch_embedding.bias.zero_()
            embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
            whole = torch.ones(1, side, side, dtype=torch.bool)
            positions = embeddings(torch.zeros(1, 3, self.image_size, self.image_size), whole)
            ids: np.ndarray = positions[0, :, 0].to(torch.int64).numpy()
            return ids

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(tiles, 3, size, size) -> image_features (tiles, tokens, D)"""
        tower = self.model.vision_model
        patches = tower.embeddings.patch_embedding(pixel_values.to(self.model.dtype)).flatten(2).transpose(1, 2)
        hidden = patches + tower.embeddings.position_embedding(self.position_ids)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
        features: torch.Tensor = self.model.connector(tower.post_layernorm(hidden)).float()
        return features


class TowerAndPixelUnshuffle(ImageGraph):
    """InternViT, without its class token; patches are merged in squares and projected (HF:
    InternVLModel.get_image_features).
    """

    name, outputs, exact = "vision_encoder", ("image_features",), False

    def __init__(self, hf_model: Any):
        super().__init__()
        self.model = hf_model.model
        config = hf_model.config.vision_config
        self.image_size, self.side = config.image_size[0], config.image_size[0] // config.patch_size[0]
        self.ratio = hf_model.config.downsample_ratio
        self.constants = {}

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(tiles, 3, size, size) -> image_features (tiles, tokens, D)"""
        tower = self.model.vision_tower
        embeddings, tiles = tower.embeddings, pixel_values.shape[0]
        patches = embeddings.patch_embeddings(pixel_values)
        hidden = torch.cat([embeddings.cls_token.expand(tiles, -1, -1), patches], dim=1)
        if embeddings.position_embeddings is not None:
            hidden = hidden + embeddings.position_embeddings
        for layer in tower.encoder.layer:
            hidden = layer(hidden)
        square = tower.layernorm(hidden)[:, 1:].unflatten(1, (self.side, self.side))
        merged = self.model.pixel_shuffle(square, scale_factor=self.ratio).flatten(1, 2)
        features: torch.Tensor = self.model.multi_modal_projector(merged).float()
        return features


WRAPPERS: dict[str, type[ImageGraph]] = {
    "tower_and_projector": TowerAndProjector,
    "tower_and_pixel_unshuffle": TowerAndPixelUnshuffle,
    "tower_and_pixel_shuffle": TowerAndPixelShuffle,
    "vq_tokenizer": VQTokenizer,
}


def image_graph(
    folder: Path, checkpoint: Checkpoint, store: WeightStore, precision: Precision, activations: str = FLOAT32
) -> GraphSpec:
    """Write the family's image graph, <its name>.onnx. `precision` is how its matrices are stored: fp32, fp16, or int8
    (dynamic_int8.py); int4 has no advantage here. At fp16 it computes in `activations` (numpy name).
    """
    wrapped = WRAPPERS[checkpoint.family.vision or ""]
    if wrapped.exact:
        precision = "fp32"
    storage, computed = ("float16", activations) if precision == "fp16" else (FLOAT32, FLOAT32)
    model, wrapper = trace(checkpoint, computed)
    graph, traced = model.graph, list(model.graph.initializers.values())
    if precision == "int8":
        quantise_linears(graph, store)
    for value in traced:
        if value.name in wrapper.constants:
            value.const_value = ir.tensor(wrapper.constants[value.name], name=value.name)
        elif value.name in graph.initializers:
            _attach(graph, value, store, storage, computed)
    return save_model(model, folder, precision, None)


def trace(checkpoint: Checkpoint, computed: str = FLOAT32) -> tuple[ir.Model, ImageGraph]:
    """The family's image graph without its weights, computing in `computed`, and the wrapper it was made of."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    assert checkpoint.family.vision is not None
    with FakeTensorMode(), no_init_weights(), _quiet(), _fused_attention() as name:
        hf_model = AutoModelForImageTextToText.from_config(
            copy.deepcopy(checkpoint.config), dtype=getattr(torch, computed), attn_implementation=name
        )
        wrapper = WRAPPERS[checkpoint.family.vision](hf_model).eval()
        program = torch.onnx.export(
            wrapper,
            (torch.zeros(2, 3, wrapper.image_size, wrapper.image_size),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("tiles", min=1, max=1024)},),
            input_names=["pixel_values"],
            output_names=list(wrapper.outputs),
            opset_version=OPSET,
            verbose=False,
            optimize=False,  # constant folding would read the fake weights
        )
    model: ir.Model = program.model  # type: ignore[union-attr]
    model.graph.name = wrapper.name
    model.graph.opset_imports[MICROSOFT] = 1
    for node in model.graph:  # Python source locations, which take megabytes
        node.metadata_props.clear()
    return model, wrapper


def _attach(graph: ir.Graph, value: ir.Value, store: WeightStore, storage: str, computed: str) -> None:
    """Point an initialiser at its streamed weights; matrices stored narrower than computed with are cast there."""
    assert value.name is not None and value.shape is not None
    shape = list(value.shape.numpy())
    dtype = storage if len(shape) >= 2 else computed
    tensor = store.matrix([value.name], dtype, shape=shape)
    value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)
    if dtype != computed:
        to = ir.DataType.from_numpy(np.dtype(computed))
        cast = ir.Node("", "Cast", [value], attributes=[ir.AttrInt64("to", to)])
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        graph.insert_before(graph[0], cast)


@contextmanager
def _fused_attention() -> Iterator[str]:
    """Trace attention as one com.microsoft MultiHeadAttention: faster, and without a matrix of all scores.

    Yields the name under which it is registered in transformers.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,  # dropout, and arguments of causal models
    ) -> tuple[torch.Tensor, None]:
        """(B, H, S, d) each -> (B, S, H, d)"""
        assert attention_mask is None, "patches of a tile see each other"
        heads = query.shape[1]
        flat = [t.transpose(1, 2).flatten(2) for t in (query, key, value)]
        attributes = {"num_heads": heads, "scale": scaling or query.shape[-1] ** -0.5}
        out = torch.onnx.ops.symbolic(
            f"{MICROSOFT}::MultiHeadAttention", flat, attributes, dtype=query.dtype, shape=flat[0].shape, version=1
        )
        return out.unflatten(2, (heads, -1)), None

    name = "autosteer_fused"
    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield name
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.onnx's warnings about operators that are not used here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
