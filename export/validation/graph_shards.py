"""An ONNX graph of a package, run in shards of a few hundred megabytes, so that a 7B package can be validated in less
memory than it takes.

The shards are cut from the very file that ships: consecutive nodes, until their weights exceed SHARD_BYTES. What a
shard computes for later ones becomes its output. onnxruntime loads a shard from memory, its weights from weights.bin.
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
# What casts weights while a session is made. The second does what the first would have done, and ends the process where
# that is missing, from onnxruntime 1.23 to 1.29 ("std::vector<NodeArg*>::operator[]").
UNFOLDED = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer")
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

# Output types where they are not the first input's, for operators whose outputs the exporter leaves untyped.
OUTPUT_TYPES: dict[str, tuple[int, ...]] = {
    "Shape": (INT64,),
    "ArgMin": (INT64,),
    "QuantizeLinear": (onnx.TensorProto.UINT8,),
    "MatMulInteger": (onnx.TensorProto.INT32,),
    "MatMulIntegerToFloat": (FLOAT,),
    "DynamicQuantizeLinear": (onnx.TensorProto.UINT8, FLOAT, onnx.TensorProto.UINT8),
}


class GraphShard:
    """A few consecutive nodes of a graph, in a session of their own while they are loaded."""

    def __init__(self, model: onnx.ModelProto, folder: Path, size: int, device: Device, *, quantised: bool):
        self.bytes = size
        self.quantised = quantised
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        self.session: Any = None
        self._model, self._folder, self._device = model, folder, device

    def load(self) -> None:
        """Make the session."""
        options = session_options(self._device)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        disabled: tuple[str, ...] = ()
        if not self.quantised:  # float weights would be there three times: as stored, cast to float32, and packed
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
    """Keeps values inside of graphs, of which each thread sees its own, between `begin` and `take`."""

    def __init__(self, *endings: str):
        """Values whose names end so."""
        self.endings = endings
        self._thread = threading.local()

    def begin(self) -> None:
        """From now on the calling thread's values are kept; of two by one name the later."""
        self._thread.seen = {}

    def note(self, name: str, value: ort.OrtValue) -> None:
        """A value was computed."""
        seen = getattr(self._thread, "seen", None)
        if seen is not None and name.endswith(self.endings):
            seen[name] = np.array(value.numpy())

    def take(self) -> dict[str, npt.NDArray[Any]]:
        """What was kept; none where nobody began. No more is."""
        seen: dict[str, npt.NDArray[Any]] = getattr(self._thread, "seen", None) or {}
        self._thread.seen = None
        return seen


class ShardedGraph:
    """Stands in for runtime.Subgraph where the graph is larger than the memory (Engine's `load`)."""

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        device: Device,
        *,
        sweep: LayerSweep,
        recorder: ActivationRecorder | None = None,
    ):
        """Cut the graph at `path` and add its shards to `sweep`; `recorder` is shown what it names."""
        self.name = path.stem
        self.device = device
        self._outputs = [t.name for t in spec.outputs]
        self._convoy, self._recorder = sweep, recorder
        quantised = spec.precision in ("int8", "int4")
        self._shards = [
            GraphShard(model, path.parent, size, device, quantised=quantised)
            for model, size in cut(path, recorder.endings if recorder else ())
        ]
        for shard in self._shards:
            sweep.add(shard)
        self._needed = [  # after each shard; everything else is dropped, or activations would pile up
            {*self._outputs, *(name for later in self._shards[i + 1 :] for name in later.inputs)}
            for i in range(len(self._shards))
        ]

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run once on numpy arrays; outputs in the graph's order."""
        values = self._run({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}, {})
        return [np.array(values[name].numpy()) for name in self._outputs]

    def bind(self, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> Callable[[], None]:
        """The graph on fixed buffers, as runtime.Subgraph.bind."""
        return lambda: self._run(inputs, outputs) and None

    def _run(self, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        values = dict(inputs)
        for shard, needed in zip(self._shards, self._needed, strict=True):
            self._convoy.wait_for(shard)
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
                # a copy: what onnxruntime allocated keeps the whole session in memory
                values[name] = outputs.get(name) or ort.OrtValue.ortvalue_from_numpy(np.array(value.numpy()))
                if self._recorder:
                    self._recorder.record(name, values[name])
            del binding, value
            values = {name: value for name, value in values.items() if name in needed}
        return values


def cut(path: Path, watched: tuple[str, ...] = ()) -> list[tuple[onnx.ModelProto, int]]:
    """Models of consecutive nodes of the graph at `path`, with about SHARD_BYTES of weights each, and those bytes.
    Values whose names end in one of `watched` are outputs, too.

    Nodes that depend on weights alone (casts of weights) go wherever they are used.
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
    taken: dict[str, int] = {}  # weight -> bytes, of the shard being filled
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
                if name in later | outputs or name.endswith(watched)
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
    """The weights-only nodes that `node` reads from, nearest last."""
    found: list[onnx.NodeProto] = []
    for name in node.input:
        if name in maker and name in constant:
            found += [*_closure(maker[name], maker, constant), maker[name]]
    return found


def _types(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    """Element types of all values; shapes only where the graph itself says them at its inputs and outputs."""
    known = {value.name: value for value in (*graph.input, *graph.output)}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *known.values())}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        first = next((kinds[name] for name in node.input if name), FLOAT)
        said = OUTPUT_TYPES.get(node.op_type, ())
        if node.op_type == "GatherBlockQuantized":
            said = (kinds[node.input[2]],)  # its scales'
        if node.op_type == "Cast":
            said = (next(a.i for a in node.attribute if a.name == "to"),)
        for i, name in enumerate(node.output):
            if name and not kinds.get(name):
                kinds[name] = said[i] if i < len(said) else first
    return {
        name: known.get(name) or onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()
    }


def _bytes(tensor: onnx.TensorProto) -> int:
    """What a weight takes when it is used: float16 is cast to float32."""
    stored = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), tensor.ByteSize())
    return 2 * stored if tensor.data_type == onnx.TensorProto.FLOAT16 else stored
