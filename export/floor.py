"""The oldest onnxruntime that runs a package correctly: the one list of what versions cannot do.

Found by tools/matrix (docs/onnxruntime.md). It runs every version, and fails if one that is allowed here does not
answer as the newest one does.
"""

from __future__ import annotations

from collections.abc import Callable

from .graphs.quantize import Blocks, Recipe

NEEDS: tuple[tuple[str, Callable[[Recipe], bool]], ...] = (
    # GroupQueryAttention with an int8 cache on the CPU. 1.24 and older refuse the graph (no k_quant_type), 1.25 and
    # 1.26 load it and have no kernel: every answer fails with "Tensor type mismatch".
    ("1.27", lambda recipe: recipe.int8_caches),
    # float16 activations are for CUDA, and older versions do not tell which operators run there (runtime/subgraph.py).
    ("1.26", lambda recipe: recipe.activations == "float16"),
    # GatherBlockQuantized on uint8 (bits=8, and the attribute itself): 1.22 and older refuse the graph. MatMulNBits
    # with 8 bits: 1.21 and older have no such kernel.
    ("1.23", lambda recipe: recipe.head is not None or isinstance(recipe.body, Blocks)),
)
OLDEST = "1.20"  # older versions are untested


def lowest_onnxruntime(recipe: Recipe) -> str:
    """The oldest onnxruntime (major and minor, as "1.23") that runs packages of this recipe correctly."""
    return next((version for version, needed in NEEDS if needed(recipe)), OLDEST)
