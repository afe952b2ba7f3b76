"""The fields of a family file.

A family states what its tensors are called and which image wrapper it needs. The decoder layer is written once, for all
families (export/graphs/decoder.py); its sizes come from config.json (export/checkpoint/decoder_config.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autosteer.runtime.manifest import ImageSpec, Resample, VideoSpec

LLAVA_LAYOUT = (  # renames: many of the hub's files have the layout of transformers < 4.52, some with "model." in front
    (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "model.language_model."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^image_newline$", "model.image_newline"),
)

# A layer's RMS norms, under HF's names: of attention's input and output, of the MLP's input and output. None: no norm.
LayerNorms = tuple[str | None, str | None, str | None, str | None]
BEFORE: LayerNorms = ("input_layernorm", None, "post_attention_layernorm", None)

RESAMPLE: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling


@dataclass(frozen=True)
class Family:
    """One Hugging Face model type."""

    model_type: str
    aliases: dict[str, str]  # short name -> hub id, for --model
    renames: tuple[tuple[str, str], ...]  # regex, replacement: checkpoint tensor names -> today's HF module paths
    decoder: str  # module path of the decoder: "<decoder>.layers.0...", "<decoder>.norm", "<decoder>.embed_tokens"
    lm_head: str  # tensor name of the LM head (not in the checkpoint if it is tied to the embedding)
    vision: str | None = None  # the wrapper in export/graphs/vision.py that makes the image graph; None: no images
    image_spec: Callable[[Any, Any], ImageSpec] | None = None  # (config, HF image processor) -> ImageSpec
    video_spec: Callable[[Any, Any], VideoSpec] | None = None  # (config, HF video processor) -> VideoSpec
    chat_template: str | None = None  # used if the checkpoint has none
    layer_norms: Callable[[Any], LayerNorms] = lambda config: BEFORE  # of the config
    norm_offset: float = 0.0  # what is added to the weights of every RMS norm (Gemma: 1)
    scaled_embedding: bool = False  # whether rows of text are multiplied by the root of their width (Gemma)
    never_generated: Callable[[Any], tuple[int, ...]] = lambda config: ()  # token ids whose logits HF masks
    authors_token_offset: int = -1  # the token that the authors' prober reads, in the prompt without generation prompt
