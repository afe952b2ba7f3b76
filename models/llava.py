"""LLaVA-1.5 (arXiv 2310.03744) and LLaVA-NeXT (LLaVA-1.6; the authors' blog, January 2024): CLIP tower, two-layer
projector, Llama or Mistral decoder.

LLaVA-1.5 sees one tile of an image, LLaVA-NeXT anyres tiles. HF: transformers/models/llava and llava_next.
"""

from __future__ import annotations

from typing import Any

from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.manifest import AnyresSpec, ImageSpec

from .family import LLAVA_LAYOUT, RESAMPLE, Family


def one_tile(config: Any, image_processor: Any) -> ImageSpec:
    """HF: CLIPImageProcessorPil, LlavaImageProcessorPil."""
    check_tower(config, ("default", "full"))
    return ImageSpec(
        kind="pad_to_square" if getattr(image_processor, "do_pad", False) else "centre_crop",
        anyres=None,
        **pixels(config, image_processor),
    )


def anyres(config: Any, image_processor: Any) -> ImageSpec:
    """HF: LlavaNextImageProcessorPil and LlavaNextModel.pack_image_features."""
    check_tower(config, ("default",))
    side, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    return ImageSpec(
        kind="anyres",
        anyres=AnyresSpec(
            tokens_per_side=side // config.vision_config.patch_size,
            grid_pinpoints=tuple((int(h), int(w)) for h, w in pinpoints),
            max_tiles_side=max(h * w for h, w in pinpoints) // side**2,  # no grid has more: none is shrunk
            each=True,
        ),
        **pixels(config, image_processor),
    )


def check_tower(config: Any, strategies: tuple[str, ...]) -> None:
    """Raise UnsupportedModelError for another tower than CLIP's, or rows of it that the graph does not give."""
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    settings = {
        f"a vision tower of type {config.vision_config.model_type!r}": config.vision_config.model_type
        != "clip_vision_model",
        f"vision_feature_layer {layer!r}, not one layer": not isinstance(layer, int),
        f"vision_feature_select_strategy {strategy!r}": strategy not in strategies,
    }
    if unsupported := [what for what, found in settings.items() if found]:
        raise UnsupportedModelError(f"config.json: {unsupported[0]}: this way to prepare images is not supported")


def pixels(config: Any, image_processor: Any) -> dict[str, Any]:
    """The fields of an ImageSpec that say how big a tile is, and what its bytes become.

    Raises UnsupportedModelError if the image processor does not crop to the tower's square.
    """
    side, size, crop = config.vision_config.image_size, image_processor.size, image_processor.crop_size
    sides = size["shortest_edge"], crop["height"], crop["width"]
    if set(sides) != {side} or not (image_processor.do_resize and image_processor.do_center_crop):
        raise UnsupportedModelError(
            f"the image processor's shortest_edge and crop_size {sides} must be the vision tower's image_size {side}, "
            "and do_resize and do_center_crop on"
        )
    return {
        "tile_size": side,
        "mean": tuple(image_processor.image_mean),
        "std": tuple(image_processor.image_std),
        "rescale_factor": image_processor.rescale_factor,
        "resample": RESAMPLE[int(image_processor.resample)],
    }


def _family(model_type: str, aliases: dict[str, str], **facts: Any) -> Family:
    return Family(
        model_type=model_type,
        aliases=aliases,
        renames=LLAVA_LAYOUT,
        decoder="model.language_model",
        lm_head="lm_head.weight",
        vision="tower_and_projector",
        **facts,
    )


LLAVA = _family(
    "llava",
    {
        "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
        "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    },
    image_spec=one_tile,
)
LLAVA_NEXT = _family(
    "llava_next",
    {
        "llava-v1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
        "llama3-llava-next-8b": "llava-hf/llama3-llava-next-8b-hf",
    },
    image_spec=anyres,
)
