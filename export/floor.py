"""The oldest onnxruntime that runs a package correctly: the one list of what versions cannot do.

Found by tools/matrix (docs/onnxruntime.md). It runs every version, and fails if one that is allowed here does not
answer as the newest one does. What the demo does not have (windows) was found by tests/parity on each version.
"""

from __future__ import annotations

from collections.abc import Callable

from .graphs.quantize import Blocks, Recipe

NEEDS: tuple[tuple[str, Callable[[Recipe, bool], bool]], ...] = (  # of a recipe, and of whether there are windows
    # GroupQueryAttention with an int8 cache on the CPU. 1.24 and older refuse the graph (no k_quant_type), 1.25 and
    # 1.26 load it and have no kernel: every answer fails with "Tensor type mismatch".
    ("1.27", lambda recipe, windowed: recipe.int8_caches),
    # float16 activations are for CUDA, and older versions do not tell which operators run there (runtime/subgraph.py).
    ("1.26", lambda recipe, windowed: recipe.activations == "float16"),
    # A query of GroupQueryAttention with local_window_size sees one position too many in 1.23 and older.
    ("1.24", lambda recipe, windowed: windowed),
    # GatherBlockQuantized on uint8 (bits=8, and the attribute itself): 1.22 and older refuse the graph. MatMulNBits
    # with 8 bits: 1.21 and older have no such kernel.
    ("1.23", lambda recipe, windowed: recipe.head is not None or isinstance(recipe.body, Blocks)),
)
OLDEST = "1.20"  # older versions are untested


def lowest_onnxruntime(recipe: Recipe, *, windowed: bool = False) -> str:
    """The oldest onnxruntime (major and minor, as "1.23") that runs packages of this recipe correctly. `windowed`:
    whether a dialogue can be longer than a layer's window.
    """
    return next((version for version, needed in NEEDS if needed(recipe, windowed)), OLDEST)
