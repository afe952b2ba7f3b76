"""Run an ONNX graph of a package in shards, so that a 7B package is validated in less memory than it needs to run.

The graph file that ships is cut into shards: consecutive nodes, until their weights exceed SHARD_BYTES. Values that
later shards need are a shard's outputs. onnxruntime loads a shard's nodes from memory and its weights from weights.bin.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from autosteer.export.checkpoint.layer_sweep import LayerSweep
from autosteer.runtime.manifest import GraphSpec
from autosteer.runtime.subgraph import Device, session_options, shrinking

SHARD_BYTES = 256 << 20
# The optimizers that cast weights when a session is created. Both must be off: without the first, the second crashes
# onnxruntime 1.23 to 1.29 ("std::vector<NodeArg*>::operator[]").
UNFOLDED = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer")
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

# Output types of operators that the exporter leaves untyped, if they are not the first input's type.
OUTPUT_TYPES: dict[str, tuple[int, ...]] = {
    "Shape": (INT64,),
    "ArgMin": (INT64,),
    "QuantizeLinear": (onnx.TensorProto.UINT8,),
    "MatMulInteger": (onnx.TensorProto.INT32,),
    "MatMulIntegerToFloat": (FLOAT,),
    "DynamicQuantizeLinear": (onnx.TensorProto.UINT8, FLOAT, onnx.TensorProto.UINT8),
}


class GraphShard:
    """Consecutive nodes of a graph. While loaded, they have a session of their own."""

    def __init__(self, model: onnx.ModelProto, folder: Path, size: int, device: Device, *, quantised: bool):
        self.bytes = size
        self.quantised = quantised
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        self.session: Any = None
        self._model, self._folder, self._device = model, folder, device

    def load(self) -> None:
        """Create the session."""
        options = session_options(self._device)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        disabled: tuple[str, ...] = ()
        if not self.quantised:  # else float weights are in memory three times: as stored, cast to float32, prepacked
            options.add_session_config_entry("session.disable_prepacking", "1")
            disabled = UNFOLDED
        self.session = ort.InferenceSession(
            self._model.SerializeToString(),
            options,
            providers=[self._device.provider],
            disabled_optimizers=list(disabled),
        )

    def unload(self) -> None:
        """Drop the session and its weights."""
        self.session = None


class ActivationRecorder:
    """Records intermediate values of graphs between `start` and `stop`, for each thread separately."""

    def __init__(self, *endings: str):
        """Record values whose names have one of these `endings`."""
        self.endings = endings
        self._thread = threading.local()

    def start(self) -> None:
        """Record the calling thread's values from now on."""
        self._thread.values = {}

    def record(self, name: str, value: ort.OrtValue) -> None:
        """Called for each value that crosses shards."""
        values = getattr(self._thread, "values", None)
        if values is not None and name.endswith(self.endings):
            values.setdefault(name, []).append(np.array(value.numpy()))

    def stop(self) -> dict[str, npt.NDArray[Any]]:
        """Stop recording. The recorded values (1, positions, ..) by name, those of one name joined in order; empty
        without a `start`.
        """
        values: dict[str, list[npt.NDArray[Any]]] = getattr(self._thread, "values", None) or {}
        self._thread.values = None
        return {name: np.concatenate(parts, axis=1) for name, parts in values.items()}


class ShardedGraph:
    """Stands in for runtime.Subgraph if the graph is larger than memory: Engine's `load`."""

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        device: Device,
        *,
        sweep: LayerSweep,
        recorder: ActivationRecorder | None = None,
    ):
        """Cut the graph at `path` and add its shards to `sweep`. `recorder` gets the values that it names."""
        self.name = path.stem
        self.device = device
        self._outputs = [t.name for t in spec.outputs]
        self._sweep, self._recorder = sweep, recorder
        self._shards = [
            GraphShard(model, path.parent, size, device, quantised=spec.quantised)
            for model, size in split_graph(path, recorder.endings if recorder else ())
        ]
        for shard in self._shards:
            sweep.add(shard)
        self._needed = [  # values needed after each shard; all others are freed
            {*self._outputs, *(name for later in self._shards[i + 1 :] for name in later.inputs)}
            for i in range(len(self._shards))
        ]

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run once on numpy arrays; outputs by name."""
        values = self._run({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}, {})
        return {name: np.array(values[name].numpy()) for name in self._outputs}

    def bind(
        self,
        inputs: Mapping[str, ort.OrtValue],
        outputs: Mapping[str, ort.OrtValue],
        fresh: Callable[[], Mapping[str, ort.OrtValue]] | None = None,
    ) -> Callable[[], None]:
        """The graph on fixed buffers, as runtime.Subgraph.bind."""

        def run() -> None:
            self._run({**inputs, **(fresh() if fresh else {})}, outputs)

        return run

    def _run(self, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        values = dict(inputs)
        for shard, needed in zip(self._shards, self._needed, strict=True):
            self._sweep.wait_for(shard)
            binding = shard.session.io_binding()
            for name in shard.inputs:
                binding.bind_ortvalue_input(name, values[name])
            for name in shard.outputs:
                if name in outputs:
                    binding.bind_ortvalue_output(name, outputs[name])
                else:
                    binding.bind_output(name, "cpu")
            shard.session.run_with_iobinding(
                binding, shrinking(self.device)
            )  # or the arena keeps what the largest shard took
            for name, value in zip(shard.outputs, binding.get_outputs(), strict=True):
                # copied: an output that onnxruntime allocated keeps its session in memory
                values[name] = outputs.get(name) or ort.OrtValue.ortvalue_from_numpy(np.array(value.numpy()))
                if self._recorder:
                    self._recorder.record(name, values[name])
            del binding, value
            values = {name: value for name, value in values.items() if name in needed}
        return values


def split_graph(path: Path, recorded: tuple[str, ...] = ()) -> list[tuple[onnx.ModelProto, int]]:
    """Cut the graph at `path` into models with about SHARD_BYTES of weights each: (model, bytes of its weights).

    Values whose names end in one of `recorded` become outputs as well. Nodes that depend on weights alone (casts of
    weights) are copied into every shard that uses them.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    types = _types(graph)
    maker = {name: node for node in graph.node for name in node.output if name}
    outputs = {value.name for value in graph.output}
    constant: set[str] = set(weights)
    for node in graph.node:
        if all(name in constant for name in node.input if name) and outputs.isdisjoint(node.output):
            constant.update(node.output)

    shards: list[list[onnx.NodeProto]] = [[]]
    taken: dict[str, int] = {}  # weight -> bytes, of the current shard
    for node in (n for n in graph.node if not set(n.output) <= constant):
        if sum(taken.values()) > SHARD_BYTES:
            shards.append([])
            taken = {}
        shards[-1].append(node)
        needed = _closure(node, maker, constant)
        taken |= {name: _bytes(weights[name]) for n in (node, *needed) for name in n.input if name in weights}

    used_by = [{name for node in shard for name in node.input if name} for shard in shards]
    models = []
    for number, shard in enumerate(shards):
        helpers = {id(n): n for node in shard for n in _closure(node, maker, constant)}
        nodes = [n for n in graph.node if id(n) in helpers] + shard
        made = {name for node in nodes for name in node.output if name}
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        later = set().union(*used_by[number + 1 :]) if number + 1 < len(shards) else set()
        part = onnx.helper.make_graph(
            nodes,
            f"{graph.name}.{number}",
            [types[name] for name in read if name not in made and name not in weights],
            [
                types[name]
                for name in dict.fromkeys(n for node in shard for n in node.output)
                if name in later | outputs or name.endswith(recorded)
            ],
            [weights[name] for name in read if name in weights],
        )
        size = sum(_bytes(weights[name]) for name in read if name in weights)
        models.append(
            (onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version), size)
        )
    return models


def _closure(
    node: onnx.NodeProto, maker: Mapping[str, onnx.NodeProto], constant: Iterable[str]
) -> list[onnx.NodeProto]:
    """The nodes that `node` depends on and that depend on weights alone, nearest last."""
    found: list[onnx.NodeProto] = []
    for name in node.input:
        if name in maker and name in constant:
            found += [*_closure(maker[name], maker, constant), maker[name]]
    return found


def _types(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    """Element types of all values; shapes of the graph's inputs and outputs only."""
    known = {value.name: value for value in (*graph.input, *graph.output)}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *known.values())}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        first = next((kinds[name] for name in node.input if name), FLOAT)
        outputs = OUTPUT_TYPES.get(node.op_type, ())
        if node.op_type == "GatherBlockQuantized":
            outputs = (kinds[node.input[2]],)  # the type of its scales
        if node.op_type == "Cast":
            outputs = (next(a.i for a in node.attribute if a.name == "to"),)
        for i, name in enumerate(node.output):
            if name and not kinds.get(name):
                kinds[name] = outputs[i] if i < len(outputs) else first
    return {
        name: known.get(name) or onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()
    }


def _bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a weight in memory: float16 is cast to float32."""
    stored = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), tensor.ByteSize())
    return 2 * stored if tensor.data_type == onnx.TensorProto.FLOAT16 else stored
