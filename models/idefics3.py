"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): SigLIP tower, pixel shuffle, Llama decoder.

An image is cut into tiles, followed by a thumbnail of the whole; separator tokens number the tiles. HF:
transformers/models/idefics3 and smolvlm, which are one model: SmolVLM-256M and -500M have model_type idefics3, SmolVLM2
has smolvlm.
"""

from __future__ import annotations

from typing import Any

from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.manifest import ImageSpec, SplitSpec

from .family import RESAMPLE, Family

LARGEST_EDGE = 4096  # HF: MAX_IMAGE_SIZE; HF shrinks larger images in a second step


def image_spec(config: Any, image_processor: Any) -> ImageSpec:
    """HF: Idefics3ImageProcessorPil."""
    tile, edge = image_processor.max_image_size["longest_edge"], image_processor.size["longest_edge"]
    if tile != config.vision_config.image_size or edge > LARGEST_EDGE or not image_processor.do_resize:
        raise UnsupportedModelError(
            f"the image processor's max_image_size {tile} must be the vision tower's image_size, "
            f"{config.vision_config.image_size}; its size {edge} at most {LARGEST_EDGE}; and do_resize on"
        )
    return ImageSpec(
        kind="split",
        tile_size=tile,
        mean=tuple(image_processor.image_mean),
        std=tuple(image_processor.image_std),
        rescale_factor=image_processor.rescale_factor,
        resample=RESAMPLE[int(image_processor.resample)],
        anyres=None,
        split=SplitSpec(longest_edge=edge, tiles=image_processor.do_image_splitting),
    )


def _family(model_type: str, aliases: dict[str, str]) -> Family:
    return Family(
        model_type=model_type,
        aliases=aliases,
        renames=(),
        decoder="model.text_model",
        lm_head="lm_head.weight",
        vision="tower_and_pixel_shuffle",
        image_spec=image_spec,
    )


IDEFICS3 = _family(
    "idefics3",
    {
        "smolvlm": "HuggingFaceTB/SmolVLM-256M-Instruct",
        "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    },
)
SMOLVLM = _family("smolvlm", {"smolvlm2": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"})
