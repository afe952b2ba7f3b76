"""Write the decoder's ONNX graphs node by node.

Tracing PyTorch costs seconds and gigabytes, and its result is hard to predict. A decoder layer is twenty operators, and
we want to choose each of them. So they are written here, with onnxruntime's fused operators (com.microsoft), and every
export compares the result with PyTorch. Weights are references into a WeightStore: each tensor is read once, and none
stays in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from autosteer.runtime.manifest import GraphSpec, Precision, TensorSpec, sha256

from .int8_matmul import MICROSOFT, SMOOTHING, SUFFIX, Rows, product, quantise_activations
from .quantize import Blocks, PerChannel, Scheme, flat_nibbles
from .weights import WeightStore

OPSET = 21
FLOAT32 = "float32"


class GraphWriter:
    """Writes one ONNX graph. Values are onnx_ir Values; only the graph's inputs and outputs have shapes."""

    def __init__(self, name: str, store: WeightStore, storage: str, dtype: str = FLOAT32):
        self.name = name
        self.store = store
        self.storage = storage  # numpy dtype that unquantised matrices are stored in
        self.dtype = dtype  # numpy dtype of activations, and of the graph's arithmetic
        self._tape = Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._weights: dict[str, ir.Value] = {}
        self._rows: dict[
            ir.Value, tuple[str, Rows]
        ] = {}  # x -> the first matrix that multiplied it, whose smoothing it got; x in 8 bits

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=_type(dtype))
        self._inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare `value` a graph output called `name`."""
        value.name, value.shape, value.type = name, ir.Shape(shape), _type(dtype)
        self._outputs.append(value)

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One operator with one output."""
        return self._tape.op(kind, inputs, attributes, domain=domain)

    def ops(
        self,
        kind: str,
        *inputs: ir.Value | None,
        outputs: int,
        used: Sequence[int],
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """One operator with several outputs, of which those in `used` are returned.

        The others get empty names: onnxruntime warns at every load about unused outputs that have one.
        """
        values = self._tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs, domain=domain)
        for i, value in enumerate(values):
            if i not in used:
                value.name = ""
        return tuple(values[i] for i in used)

    def cast(self, value: ir.Value, source: str, target: str) -> ir.Value:
        """Cast `value` from numpy dtype `source` to `target`; nothing to do if they are equal."""
        return value if source == target else self.op("Cast", value, to=ir.DataType.from_numpy(np.dtype(target)))

    def constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """A small array inside the graph file, stored once per name."""
        return self._weight(name, ir.tensor(array, name=name))

    def shared(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """A computed array in weights.bin, stored once for all graphs."""
        return self._weight(name, self.store.array(name, array))

    def vector(self, *names: str, shape: tuple[int, ...]) -> ir.Value:
        """Checkpoint vectors (biases, norms), concatenated, in the activations' dtype."""
        return self._weight("+".join(names), self.store.matrix(names, self.dtype, shape=shape))

    def matrix(self, *names: str, shape: tuple[int, int]) -> ir.Value:
        """Checkpoint matrices, stacked along their rows; stored as `storage`, cast to the activations' dtype."""
        value = self._weight("+".join(names), self.store.matrix(names, self.storage, shape=shape))
        return self.cast(value, self.storage, self.dtype)  # folded when the session is created

    def embedding(self, ids: ir.Value, name: str, *, shape: tuple[int, int], blocks: Blocks | None = None) -> ir.Value:
        """Rows `ids` (1, S) of the checkpoint matrix `name` (V, D): (1, S, D).

        Shares the bytes that `linear` uses for a tied lm_head. ORT: Gather; com.microsoft GatherBlockQuantized.
        """
        if blocks is None:
            rows = self.op("Gather", self._weight(name, self.store.matrix([name], self.storage, shape=shape)), ids)
            return self.cast(rows, self.storage, self.dtype)
        parts = self.store.quantised([name], blocks, shape, self.dtype)
        codes, zero_points = parts["codes"], parts.get("zero_points")
        small = [self._weight(f"{name}.scales", parts["scales"])]
        if zero_points is None:
            flat = retyped(codes, ir.DataType.UINT8, (shape[0], shape[1] * blocks.bits // 8))
        else:
            flat = retyped(codes, ir.DataType.UINT4, shape)
            small.append(self._weight(f"{name}.flat_zero_points", self._flat(name, zero_points, shape, blocks)))
        return self.op(
            "GatherBlockQuantized",
            *(self._weight(name, flat), ids, *small),
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            bits=blocks.bits,
            block_size=blocks.size,
        )

    def _flat(
        self, name: str, zero_points: ir.ExternalTensor, shape: tuple[int, int], blocks: Blocks
    ) -> ir.ExternalTensor:
        """MatMulNBits' zero points (V, ceil(count / 2)) uint8, as uint4 (V, count) without padding between rows.

        For GatherBlockQuantized. If zero points are uint8 and `count` is odd, onnxruntime 1.23 to 1.26 (on CUDA also
        later ones) ignores the padding: every second row gets its neighbour's zero points, and the model writes noise.
        uint4 has no padding. If `count` is even, the bytes are the same.
        """
        count = shape[1] // blocks.size
        if count % 2:
            self.store.flush()
            zero_points = self.store.array(f"{name}:{blocks}:flat", flat_nibbles(zero_points.numpy(), count))
        return retyped(zero_points, ir.DataType.UINT4, (shape[0], count))

    def linear(
        self, x: ir.Value, *modules: str, shape: tuple[int, int], bias: bool = False, scheme: Scheme | None = None
    ) -> ir.Value:
        """x (1, S, K) through the projections `modules`, packed into one of `shape` (N, K): (1, S, N).

        ORT: com.microsoft FusedMatMul on the checkpoint's (N, K); MatMulNBits on its blocks; MatMulIntegerToFloat on
        its transpose in 8 bits (int8_matmul.py).
        """
        names = [f"{module}.weight" for module in modules]
        b = self.vector(*(f"{module}.bias" for module in modules), shape=shape[:1]) if bias else None
        if isinstance(scheme, Blocks):
            return self._mat_mul_n_bits(x, names, shape, b, scheme)
        if isinstance(scheme, PerChannel):
            y = self._int8_mat_mul(x, names, shape)
        else:
            y = self.op("FusedMatMul", x, self.matrix(*names, shape=shape), domain=MICROSOFT, transB=1)
        return y if b is None else self.op("Add", y, b)

    def _mat_mul_n_bits(
        self, x: ir.Value, names: list[str], shape: tuple[int, int], bias: ir.Value | None, blocks: Blocks
    ) -> ir.Value:
        stored = self._parts(names, self.store.quantised(names, blocks, shape, self.dtype))
        return self.op(
            "MatMulNBits",
            *(x, stored["codes"], stored["scales"], stored.get("zero_points"), None, bias),
            domain=MICROSOFT,
            K=shape[1],
            N=shape[0],
            bits=blocks.bits,
            block_size=blocks.size,
            accuracy_level=4,  # int8 activations: the only fast kernel for 8 bits. CUDA ignores it
        )

    def _int8_mat_mul(self, x: ir.Value, names: list[str], shape: tuple[int, int]) -> ir.Value:
        """int8 matmul. Matrices that multiply the same x share its codes, and the smoothing of the first matrix."""
        first, rows = self._rows.get(x, (names[0], None))
        channel_energy = self.store.channel_energy.get(first)
        smoothing = None if channel_energy is None else (channel_energy**-SMOOTHING).numpy()
        if rows is None:
            factor = None if smoothing is None else self.shared(f"{first}{SUFFIX}", smoothing)
            rows = quantise_activations(self, x, factor)
            self._rows[x] = first, rows
        stored = self._parts(names, self.store.columns(names, shape, smoothing))
        return product(self, rows, stored["codes"], stored["scales"])

    def _parts(self, names: list[str], tensors: dict[str, ir.ExternalTensor]) -> dict[str, ir.Value]:
        return {part: self._weight(f"{'+'.join(names)}.{part}", tensor) for part, tensor in tensors.items()}

    def save(self, folder: Path, precision: Precision, layers: tuple[int, int] | None = None) -> GraphSpec:
        """Write `folder`/<name>.onnx and return what the manifest says of it."""
        used = self._tape.nodes
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=used,
            initializers=list(self._weights.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=self.name,
        )
        return save_model(ir.Model(graph, ir_version=10, producer_name="autosteer"), folder, precision, layers)

    def _weight(self, name: str, tensor: Any) -> ir.Value:
        if name not in self._weights:
            shape = ir.Shape([int(d) for d in tensor.shape])
            self._weights[name] = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        return self._weights[name]


def save_model(model: ir.Model, folder: Path, precision: Precision, layers: tuple[int, int] | None) -> GraphSpec:
    """Write a model whose large tensors are in weights.bin already; describe it for the manifest."""
    path = folder / f"{model.graph.name}.onnx"
    ir.save(model, path)
    return GraphSpec(
        file=path.name,
        sha256=sha256(path),
        inputs=tuple(_spec(value) for value in model.graph.inputs),
        outputs=tuple(_spec(value) for value in model.graph.outputs),
        layers=layers,
        precision=precision,
    )


def retyped(tensor: ir.ExternalTensor, dtype: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
    """The bytes of `tensor` as another type and shape."""
    return ir.ExternalTensor(
        *(tensor.location, tensor.offset, tensor.length, dtype),
        shape=ir.Shape(shape),
        name=tensor.name,
        base_dir=tensor.base_dir,
    )


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.shape is not None and value.dtype is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)


def _type(dtype: str) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
