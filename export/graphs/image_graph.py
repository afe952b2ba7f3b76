"""Image graphs: a wrapper of Hugging Face's own modules (vision.py), traced without weights.

Modules and inputs are fake tensors, so a tower of any size is traced in seconds and in no memory; initialisers keep
their module paths as names, and their data is then streamed from the checkpoint like any other weight.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from autosteer.export.checkpoint.open import Checkpoint
from autosteer.export.checkpoint.stated import NO_MODEL, in_one_line
from autosteer.runtime.manifest import GraphSpec, Precision

from .dynamic_int8 import quantise_linears
from .int8_matmul import MICROSOFT
from .vision import WRAPPERS, ImageGraph
from .weights import WeightStore
from .writer import FLOAT32, OPSET, save_model


def image_graph(
    folder: Path, checkpoint: Checkpoint, store: WeightStore, precision: Precision, activations: str = FLOAT32
) -> GraphSpec:
    """Write the family's image graph, <its name>.onnx. `precision` is how its matrices are stored: fp32, fp16, or int8
    (dynamic_int8.py); int4 has no advantage here. At fp16 it computes in `activations` (numpy name).
    """
    wrapped = WRAPPERS[checkpoint.family.vision or ""]
    if wrapped.exact:
        precision = "fp32"
    storage, computed = ("float16", activations) if precision == "fp16" else (FLOAT32, FLOAT32)
    model, wrapper = trace(checkpoint, computed)
    graph, traced = model.graph, list(model.graph.initializers.values())
    if precision == "int8":
        quantise_linears(graph, store)
    for value in traced:
        if value.name in wrapper.constants:
            value.const_value = ir.tensor(wrapper.constants[value.name], name=value.name)
        elif value.name in graph.initializers:
            _attach(graph, value, store, storage, computed)
    return save_model(model, folder, precision, None)


def trace(checkpoint: Checkpoint, computed: str = FLOAT32) -> tuple[ir.Model, ImageGraph]:
    """The family's image graph without its weights, computing in `computed`, and the wrapper it was made of."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    assert checkpoint.family.vision is not None
    with FakeTensorMode(), no_init_weights(), _quiet(), _fused_attention() as name:
        with in_one_line(checkpoint.folder / "config.json", NO_MODEL):
            hf_model = AutoModelForImageTextToText.from_config(
                copy.deepcopy(checkpoint.config), dtype=getattr(torch, computed), attn_implementation=name
            )
        wrapper = WRAPPERS[checkpoint.family.vision](hf_model).eval()
        pixels, sizes = wrapper.example()
        program = torch.onnx.export(
            wrapper,
            (pixels,),
            dynamo=True,
            dynamic_shapes=({axis: dim for axis, (_, dim) in sizes.items()},),
            input_names=["pixel_values"],
            output_names=list(wrapper.outputs),
            opset_version=OPSET,
            verbose=False,
            optimize=False,  # constant folding would read the fake weights
        )
    model: ir.Model = program.model  # type: ignore[union-attr]
    model.graph.name = wrapper.name
    named = {axis: name for axis, (name, _) in sizes.items()}
    model.graph.inputs[0].shape = ir.Shape([named.get(axis, size) for axis, size in enumerate(pixels.shape)])
    model.graph.opset_imports[MICROSOFT] = 1
    for node in model.graph:  # Python source locations, which take megabytes
        node.metadata_props.clear()
    return model, wrapper


def _attach(graph: ir.Graph, value: ir.Value, store: WeightStore, storage: str, computed: str) -> None:
    """Point an initialiser at its streamed weights; matrices stored narrower than computed with are cast there."""
    assert value.name is not None and value.shape is not None
    shape = list(value.shape.numpy())
    dtype = storage if len(shape) >= 2 else computed
    tensor = store.matrix([value.name], dtype, shape=shape)
    value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)
    if dtype != computed:
        to = ir.DataType.from_numpy(np.dtype(computed))
        cast = ir.Node("", "Cast", [value], attributes=[ir.AttrInt64("to", to)])
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        graph.insert_before(graph[0], cast)


@contextmanager
def _fused_attention() -> Iterator[str]:
    """Trace attention as one com.microsoft MultiHeadAttention: faster, and without a matrix of all scores.

    Yields the name under which it is registered in transformers.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,  # dropout, and arguments of causal models
    ) -> tuple[torch.Tensor, None]:
        """(B, H, S, d) each -> (B, S, H, d)"""
        assert attention_mask is None, "patches of a tile see each other"
        heads = query.shape[1]
        flat = [t.transpose(1, 2).flatten(2) for t in (query, key, value)]
        attributes = {"num_heads": heads, "scale": scaling or query.shape[-1] ** -0.5}
        out = torch.onnx.ops.symbolic(
            f"{MICROSOFT}::MultiHeadAttention", flat, attributes, dtype=query.dtype, shape=flat[0].shape, version=1
        )
        return out.unflatten(2, (heads, -1)), None

    name = "autosteer_fused"
    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield name
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.onnx's warnings about operators that are not used here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
