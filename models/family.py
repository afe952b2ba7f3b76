"""What a family file says, as types.

A family names things: where the decoder's numbers stand in config.json, what its tensors are called, which encoder
wrapper its images need. The decoder layer itself is written once (export/graphs/decoder.py) and driven by these facts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autosteer.runtime.manifest import ImageSpec, Resample, VideoSpec

RESAMPLE: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling


@dataclass(frozen=True)
class Family:
    """One Hugging Face model type."""

    model_type: str
    aliases: dict[str, str]  # short name -> hub id, for --model
    renames: tuple[tuple[str, str], ...]  # regex, replacement: checkpoint tensor names -> today's HF module paths
    decoder: str  # module path of the decoder: "<decoder>.layers.0...", "<decoder>.norm", "<decoder>.embed_tokens"
    lm_head: str  # tensor name of the output projection (absent in the checkpoint where embeddings are tied)
    vision: str | None = None  # which wrapper of export/graphs/vision.py makes the image graph
    image_spec: Callable[[Any, Any], ImageSpec] | None = None  # (config, HF image processor) -> ImageSpec
    video_spec: Callable[[Any, Any], VideoSpec] | None = None  # (config, HF video processor) -> VideoSpec
    chat_template: str | None = None  # for checkpoints that come without one
    norm_after: Callable[[Any], bool] = lambda config: False  # whether norms follow attention and MLP
    never_generated: Callable[[Any], tuple[int, ...]] = lambda config: ()  # token ids whose logits HF masks
    authors_token_offset: int = -1  # the token that AutoSteer's authors probe, in the prompt without generation prompt
