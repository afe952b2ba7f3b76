"""LLaVA-OneVision (arXiv 2408.03326): SigLIP tower, two-layer projector, Qwen2 decoder, anyres tiles.

HF: transformers/models/llava_onevision.
"""

from __future__ import annotations

import math
import re
from typing import Any

from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.manifest import AnyresSpec, ImageSpec, VideoSpec

from .family import LLAVA_LAYOUT, RESAMPLE, Family


def image_spec(config: Any, image_processor: Any) -> ImageSpec:
    """Anyres settings from config.json and the HF image processor.

    HF: LlavaOnevisionImageProcessorPil and LlavaOnevisionModel.pack_image_features.
    """
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    vision, cutting = config.vision_config, re.fullmatch(r"anyres_max_(\d+)", str(config.vision_aspect_ratio))
    settings = {  # of config.json, and whether graph and runtime support them
        f"vision_aspect_ratio {config.vision_aspect_ratio!r}, not anyres_max_<tiles>": cutting is not None,
        f"vision_feature_layer {layer!r}, not one layer": isinstance(layer, int),
        f"vision_feature_select_strategy {strategy!r}, not 'full'": strategy == "full",
    }
    if unsupported := [what for what, done in settings.items() if not done]:
        raise UnsupportedModelError(f"config.json: {unsupported[0]}: this way to prepare images is not supported")
    assert cutting is not None
    return ImageSpec(
        kind="anyres",
        tile_size=vision.image_size,
        mean=tuple(image_processor.image_mean),
        std=tuple(image_processor.image_std),
        rescale_factor=image_processor.rescale_factor,
        resample=RESAMPLE[int(image_processor.resample)],
        anyres=AnyresSpec(
            tokens_per_side=vision.image_size // vision.patch_size,
            grid_pinpoints=tuple((int(h), int(w)) for h, w in config.image_grid_pinpoints),
            max_tiles_side=int(cutting[1]),
        ),
    )


def video_spec(config: Any, video_processor: Any) -> VideoSpec:
    """HF: LlavaOnevisionVideoProcessor and LlavaOnevisionModel.apply_pooling."""
    vision = config.vision_config
    return VideoSpec(
        mean=tuple(video_processor.image_mean),
        std=tuple(video_processor.image_std),
        rescale_factor=video_processor.rescale_factor,
        pooled_side=math.ceil(vision.image_size // vision.patch_size / 2),
    )


FAMILY = Family(
    model_type="llava_onevision",
    aliases={
        "llava-ov": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-ov-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    },
    renames=LLAVA_LAYOUT,
    decoder="model.language_model",
    lm_head="lm_head.weight",
    vision="tower_and_projector",
    image_spec=image_spec,
    video_spec=video_spec,
)
