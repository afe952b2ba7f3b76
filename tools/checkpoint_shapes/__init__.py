"""The shapes that tools/make_checkpoint.py knows: each is its hub's config and a processor for it.

A shape is data; a family adds one file with a function for its config and one for its processor.
"""

from . import chameleon, internvl, llava, llava_onevision, qwen_vl, smolvlm, text_only
from .shape import Shape

SHAPES: dict[str, Shape] = {
    **llava_onevision.SHAPES,
    **llava.SHAPES,
    **internvl.SHAPES,
    **chameleon.SHAPES,
    **qwen_vl.SHAPES,
    **smolvlm.SHAPES,
    **text_only.SHAPES,
}

__all__ = ["SHAPES", "Shape"]
