"""InternVL3 (arXiv 2504.10479) and InternVL3.5 (arXiv 2508.18265) in Hugging Face's format: InternViT tower, pixel
shuffle, two-layer projector, Qwen2 or Qwen3 decoder.

An image is cut into the grid of tiles whose shape is closest; the whole image comes last, as one more tile. HF:
transformers/models/internvl, with got_ocr2's image processor. Folders on the hub without "-hf" have another format.
"""

from __future__ import annotations

from typing import Any

from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.manifest import ClosestGridSpec, ImageSpec

from .family import LLAVA_LAYOUT, RESAMPLE, Family


def image_spec(config: Any, image_processor: Any) -> ImageSpec:
    """HF: GotOcr2ImageProcessorPil, which InternVLProcessor always asks to crop_to_patches."""
    side, size = config.vision_config.image_size[0], image_processor.size
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    settings = {
        f"vision_feature_layer {layer!r}, not the last": layer == -1,
        f"vision_feature_select_strategy {strategy!r}, not 'default'": strategy == "default",
        f"image_size {config.vision_config.image_size}, not a square": {*config.vision_config.image_size} == {side},
        f"the image processor's size {size['height']}x{size['width']}, not image_size": {size["height"], size["width"]}
        == {side},
    }
    if unsupported := [what for what, done in settings.items() if not done]:
        raise UnsupportedModelError(f"config.json: {unsupported[0]}: this way to prepare images is not supported")
    return ImageSpec(
        kind="closest_grid",
        tile_size=side,
        mean=tuple(image_processor.image_mean),
        std=tuple(image_processor.image_std),
        rescale_factor=image_processor.rescale_factor,
        resample=RESAMPLE[int(image_processor.resample)],
        anyres=None,
        closest_grid=ClosestGridSpec(min_tiles=image_processor.min_patches, max_tiles=image_processor.max_patches),
    )


FAMILY = Family(
    model_type="internvl",
    aliases={
        "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
        "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
        "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
        "internvl3.5-1b": "OpenGVLab/InternVL3_5-1B-HF",
        "internvl3.5-2b": "OpenGVLab/InternVL3_5-2B-HF",
        "internvl3.5-4b": "OpenGVLab/InternVL3_5-4B-HF",
        "internvl3.5-8b": "OpenGVLab/InternVL3_5-8B-HF",
    },
    renames=LLAVA_LAYOUT,
    decoder="model.language_model",
    lm_head="lm_head.weight",
    vision="tower_and_pixel_unshuffle",
    image_spec=image_spec,
)
