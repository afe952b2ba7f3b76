"""What becomes of pixels: a wrapper cuts what the device needs out of a Hugging Face model.

That is an encoder whose rows go to the decoder (vision_encoder), or a tokenizer whose ids go through embed_tokens
(image_tokenizer). image_graph.py traces them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from autosteer.runtime.errors import PackageError

from .int8_matmul import MICROSOFT


class ImageGraph(nn.Module):
    """Base of the wrappers. forward takes float32 pixel_values, shaped as `example`'s, and returns float32 rows,
    whatever dtype it computes in, or token ids.
    """

    name: str  # of the graph
    outputs: tuple[str, ...]
    exact: bool  # weights are stored in float32 whatever --precision says
    image_size: int
    constants: dict[str, npt.NDArray[Any]]  # computed buffers, which no checkpoint has

    def example(self) -> tuple[torch.Tensor, dict[int, tuple[str, Any]]]:
        """pixel_values to trace with; and the axes that may have another size, each with its name in the graph and its
        torch.export.Dim.
        """
        pixels = torch.zeros(2, 3, self.image_size, self.image_size)
        return pixels, {0: ("tiles", torch.export.Dim("tiles", min=1, max=1024))}


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


class NativeTower(ImageGraph):
    """A tower for pictures of any size: patches with rotary positions, merged to one row for each tile.

    HF: Qwen2VisionTransformerPretrainedModel, Qwen2_5_VisionTransformerPretrainedModel, Qwen3VLVisionModel. A tile is
    merge x merge patches. Layers outside of `fullatt_block_indexes` attend within windows of tiles; windows at the
    right and lower edge are not full. HF sorts patches by window; here they stay in the processor's order, tile by
    tile, and only queries, keys and values are gathered. All that depends on the picture's size follows from the shape
    of its pixels. Behind the layers of `deepstack_visual_indexes` patches are merged, too: the further parts of a row.
    """

    name, outputs, exact = "vision_encoder", ("image_features",), False
    inv_freq: torch.Tensor

    def __init__(self, hf_model: Any):
        super().__init__()
        self.model = hf_model.model
        config = hf_model.config.vision_config
        self.patch, self.merge, self.frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        self.image_size = 8 * self.patch * self.merge  # of the picture to trace with
        layers = range(config.depth)
        self.windowed = set(layers) - set(getattr(config, "fullatt_block_indexes", layers))  # Qwen2-VL has no windows
        self.window = config.window_size // (self.patch * self.merge) if self.windowed else 1  # tiles along a side
        self.deepstack = tuple(getattr(config, "deepstack_visual_indexes", ()))
        with unset_fake_temporarily():
            rotary = type(self.model.visual.rotary_pos_emb)(config)
            self.constants = {"inv_freq": rotary.inv_freq.numpy()}
        self.register_buffer("inv_freq", torch.zeros(self.constants["inv_freq"].shape))

    def example(self) -> tuple[torch.Tensor, dict[int, tuple[str, Any]]]:
        """(frames, 3, height, width)"""
        tile = self.patch * self.merge
        names = {2: "height", 3: "width"}
        sides = {axis: (name, tile * torch.export.Dim(name, min=1, max=1 << 14)) for axis, name in names.items()}
        return torch.zeros(self.frames, 3, self.image_size, self.image_size + tile), sides

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(frames, 3, height, width) -> image_features (1, tiles, D), or (1, tiles, (1 + L) * D) with deepstack"""
        visual, merge = self.model.visual, self.merge
        hidden = self._patches(pixel_values)
        down, across = (side // (self.patch * merge) for side in pixel_values.shape[2:])  # tiles
        at = torch.arange(hidden.shape[0])
        tile, inner = at // merge**2, at % merge**2
        row = tile // across
        column = tile - row * across
        place_down, place_across = row * merge + inner // merge, column * merge + inner % merge  # of the patch
        turn = self._turn(place_down, place_across)
        if hasattr(visual, "pos_embed"):
            hidden = hidden + self._learned(place_down, place_across).to(hidden.dtype)
        further: list[torch.Tensor] = []
        window, place = self._windows(row, column, down, across, inner)
        inside = torch.zeros(window.numel(), dtype=torch.int32).scatter(0, place, torch.ones_like(place).int())
        for i, block in enumerate(visual.blocks):
            attention = block.attn
            qkv = attention.qkv(block.norm1(hidden)).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
            q, k, v = (x.flatten(1) for x in (turn(qkv[0]), turn(qkv[1]), qkv[2]))
            if i in self.windowed:
                mixed = _attend(q[window], k[window], v[window], attention, inside.reshape(window.shape))
                mixed = mixed.flatten(0, 1)[place]
            else:
                mixed = _attend(q[None], k[None], v[None], attention)[0]
            hidden = hidden + attention.proj(mixed)
            hidden = hidden + block.mlp(block.norm2(hidden))
            if i in self.deepstack:
                further.append(visual.deepstack_merger_list[self.deepstack.index(i)](hidden))
        features: torch.Tensor = torch.cat([visual.merger(hidden), *further], -1)[None].float()
        return features

    def _patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(frames, 3, height, width) -> embedded patches (n, width of the tower), tile by tile.

        HF's Conv3d sees one patch at a time, which is a matrix product; onnxruntime's would go through them one by one.
        """
        projection, side = self.model.visual.patch_embed.proj, (self.merge, self.patch)
        down, across = (n // (self.merge * self.patch) for n in pixel_values.shape[2:])
        cut = pixel_values.to(projection.weight.dtype).reshape(self.frames, 3, down, *side, across, *side)
        patches = cut.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(down * across * self.merge**2, -1)
        return nn.functional.linear(patches, projection.weight.flatten(1), projection.bias)

    def _learned(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """The square of learned positions, stretched to the picture's patches: (n, width of the tower) at `row` and
        `column` (n,). HF: get_vision_interpolation_indices_and_weights, bilinear, with corners aligned.
        """
        table, side = self.model.visual.pos_embed, self.model.visual.num_grid_per_side

        def ends(at: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
            """The two entries along a side, and their weights."""
            where = at.float() * (side - 1) / at.max().clamp(min=1)
            low = where.floor()
            entries = [(low.long() + step).clamp(max=side - 1) for step in (0, 1)]
            return [(entry, 1 - (where - low - step).abs()) for step, entry in enumerate(entries)]

        corners = [
            table(down * side + across) * (of_row * of_column)[:, None]
            for down, of_row in ends(row)
            for across, of_column in ends(column)
        ]
        stretched: torch.Tensor = corners[0] + corners[1] + corners[2] + corners[3]
        return stretched

    def _turn(self, row: torch.Tensor, column: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Rotates queries or keys (n, heads, d) by their patches' places. HF: apply_rotary_pos_emb_vision."""
        angle = torch.cat([side[:, None] * self.inv_freq for side in (row, column)], -1)[:, None]
        cos, sin = angle.cos(), angle.sin()

        def turned(x: torch.Tensor) -> torch.Tensor:
            first, second = x.float().chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

        return turned

    def _windows(
        self, row: torch.Tensor, column: torch.Tensor, down: int, across: int, inner: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches of each window (windows, places), 0 where there is none; and each patch's place among them (n,).

        `row`, `column`: of a patch's tile, of down x across. `inner`: its place in the tile.
        """
        n, each = self.window, self.merge**2
        windows_across = (across + n - 1) // n
        windows = (down + n - 1) // n * windows_across
        place = (row // n * windows_across + column // n) * n**2 + row % n * n + column % n
        place = place * each + inner
        empty = torch.zeros(windows * n**2 * each, dtype=torch.int64)
        return empty.scatter(0, place, torch.arange(place.shape[0])).reshape(windows, n**2 * each), place


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Any, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, S, H * d) each -> (B, S, H * d), as one com.microsoft MultiHeadAttention: faster, and without a matrix of all
    scores. `attention`: HF's module. `mask` (B, S) int32: 0 for what is not there.
    """
    inputs = [q, k, v] if mask is None else [q, k, v, None, mask]
    attributes = {"num_heads": attention.num_heads, "scale": attention.scaling}
    return torch.onnx.ops.symbolic(
        f"{MICROSOFT}::MultiHeadAttention", inputs, attributes, dtype=q.dtype, shape=q.shape, version=1
    )


WRAPPERS: dict[str, type[ImageGraph]] = {
    "tower_and_projector": TowerAndProjector,
    "tower_and_pixel_unshuffle": TowerAndPixelUnshuffle,
    "tower_and_pixel_shuffle": TowerAndPixelShuffle,
    "vq_tokenizer": VQTokenizer,
    "native_tower": NativeTower,
}
