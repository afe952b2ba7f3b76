"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923) and Qwen3-VL (2511.21631): a tower for pictures of any size;
Qwen2 or Qwen3 decoder, in which time, row and column of a picture's rows turn queries and keys (mrope).

Qwen2.5-VL's tower attends within windows in most layers. Qwen3-VL's has learned positions, too, and gives rows for the
first decoder layers (deepstack). The wrapper sees that. The tower reads two frames of a video as one. In time these
stand one after the other (Qwen2-VL), by seconds (Qwen2.5-VL) or by text between them (Qwen3-VL). HF:
transformers/models/qwen2_vl, which has the image processor of all three, qwen2_5_vl and qwen3_vl.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.manifest import ImageSpec, NativeSpec, NativeVideoSpec, VideoSpec

from .family import RESAMPLE, Family

BICUBIC = 3  # PIL.Image.Resampling's, of the runtimes' frames


def image_spec(config: Any, image_processor: Any) -> ImageSpec:
    """HF: Qwen2VLImageProcessorPil."""
    vision, given = config.vision_config, image_processor
    said = (given.patch_size, given.merge_size, given.temporal_patch_size, given.do_resize)
    wanted = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, True)
    if said != wanted:
        raise UnsupportedModelError(
            f"the image processor's patch_size, merge_size, temporal_patch_size and do_resize are {said}; the vision "
            f"tower needs {wanted}"
        )
    return ImageSpec(
        kind="native",
        tile_size=vision.patch_size * vision.spatial_merge_size,
        mean=tuple(given.image_mean),
        std=tuple(given.image_std),
        rescale_factor=given.rescale_factor,
        resample=RESAMPLE[int(given.resample)],
        anyres=None,
        native=NativeSpec(
            min_pixels=given.size["shortest_edge"],
            max_pixels=given.size["longest_edge"],
            frames=vision.temporal_patch_size,
            deepstack=len(getattr(vision, "deepstack_visual_indexes", ())),
        ),
    )


def video_spec(whole: bool, config: Any, video_processor: Any) -> VideoSpec:
    """HF: Qwen2VLVideoProcessor, whose limits hold for each frame, and Qwen3VLVideoProcessor: for the `whole` video."""
    vision, given = config.vision_config, video_processor
    said = (given.patch_size, given.merge_size, given.temporal_patch_size, given.do_resize, int(given.resample))
    wanted = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, True, BICUBIC)
    if said != wanted:
        raise UnsupportedModelError(
            f"the video processor's patch_size, merge_size, temporal_patch_size, do_resize and resample are {said}; "
            f"supported is {wanted}"
        )
    if getattr(given, "cap_pixels_per_frame", None):
        raise UnsupportedModelError("the video processor's cap_pixels_per_frame is not supported yet; set it to false")
    return VideoSpec(
        mean=tuple(given.image_mean),
        std=tuple(given.image_std),
        rescale_factor=given.rescale_factor,
        pooled_side=None,
        native=NativeVideoSpec(
            min_pixels=given.size["shortest_edge"],
            max_pixels=given.size["longest_edge"],
            whole=whole,
            tokens_per_second=float(getattr(vision, "tokens_per_second", 0)),
        ),
    )


def _family(model_type: str, aliases: dict[str, str], *, whole: bool = False) -> Family:
    return Family(
        model_type=model_type,
        aliases=aliases,
        renames=(  # the hub's files have the layout of transformers < 4.52
            (r"^visual\.", "model.visual."),
            (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
        ),
        decoder="model.language_model",
        lm_head="lm_head.weight",
        vision="native_tower",
        image_spec=image_spec,
        video_spec=partial(video_spec, whole),
    )


QWEN2_VL = _family(
    "qwen2_vl",
    {
        "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
        "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    },
)
QWEN2_5_VL = _family(
    "qwen2_5_vl",
    {
        "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    },
)
QWEN3_VL = _family(
    "qwen3_vl",
    {
        "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
        "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
        "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    },
    whole=True,
)
