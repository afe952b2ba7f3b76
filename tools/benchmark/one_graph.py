"""A package's decoder as one graph in one session, without a gate. The difference in speed is what the split costs.

It is made of the package's own graphs and weights: outputs of one graph are joined to inputs of the same name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from autosteer.runtime.kv_cache import KVCache, empty_arrays
from autosteer.runtime.manifest import ATTENTION_BIAS, GraphSpec, Manifest
from autosteer.runtime.pages import placing
from autosteer.runtime.rotary import PositionCounter, RotaryTables
from autosteer.runtime.subgraph import OrtValue, Subgraph, buffer, empty, find_device
from benchmark.worker import timed_greedy

PARTS = ("embed_tokens", "decoder_lower", "decoder_upper", "lm_head")


def join(folder: Path, manifest: Manifest, target: Path) -> GraphSpec:
    """Write `target`/one_graph.onnx, beside a link to the package's weights."""
    whole = onnx.load(folder / manifest.graphs[PARTS[0]].file, load_external_data=False)
    for kind in ("node", "initializer", "input", "output"):
        whole.graph.ClearField(kind)
    specs = [manifest.graphs[name] for name in PARTS]
    inputs = {t.name: t for spec in specs for t in spec.inputs if t.name != ATTENTION_BIAS}  # one text is read
    outputs = {t.name: t for spec in specs for t in spec.outputs}
    inner = inputs.keys() & outputs.keys()
    for name, spec in zip(PARTS, specs, strict=True):
        graph = onnx.load(folder / spec.file, load_external_data=False).graph
        for node in graph.node:
            node.input[:] = ["" if value == ATTENTION_BIAS else value for value in node.input]
        _rename(graph, name, keep=inputs.keys() | outputs.keys())
        whole.graph.node.extend(graph.node)
        whole.graph.initializer.extend(graph.initializer)
        known = {value.name for value in whole.graph.input}
        whole.graph.input.extend(value for value in graph.input if value.name in inputs.keys() - inner - known)
        whole.graph.output.extend(value for value in graph.output if value.name not in inner)
    target.mkdir(parents=True, exist_ok=True)
    for file in {e.value for t in whole.graph.initializer for e in t.external_data if e.key == "location"}:
        (target / file).unlink(missing_ok=True)
        (target / file).hardlink_to(folder / file)
    path = target / "one_graph.onnx"
    onnx.save(whole, path)
    order = [value.name for value in whole.graph.input], [value.name for value in whole.graph.output]
    return dataclasses.replace(
        manifest.graphs["decoder_lower"],
        file=path.name,
        inputs=tuple(inputs[name] for name in order[0]),
        outputs=tuple(outputs[name] for name in order[1]),
        layers=(0, manifest.dims.num_hidden_layers),
    )


def _rename(graph: onnx.GraphProto, prefix: str, *, keep: Any) -> None:
    """Give every value that only this graph knows a name that no other graph has."""

    def named(name: str) -> str:
        return name if not name or name in keep else f"{prefix}/{name}"

    for tensor in graph.initializer:
        tensor.name = named(tensor.name)
    for node in graph.node:
        node.name = f"{prefix}/{node.name}"
        node.input[:] = map(named, node.input)
        node.output[:] = map(named, node.output)


class OneGraph:
    """One package, joined into the folder `work`; greedy, on the runtime's own buffers and session options."""

    def __init__(self, path: str, threads: int, max_tokens: int, work: str):
        self._manifest = Manifest.load(Path(path))
        self._device, _ = find_device("cpu", threads)
        self._spec = join(Path(path), self._manifest, Path(work))
        with placing():
            self._graph = Subgraph(Path(work) / self._spec.file, self._spec, self._device)
        self._capacity = max_tokens

    def facts(self) -> dict[str, Any]:
        """Versions and settings."""
        versions = {"onnxruntime": onnxruntime.__version__}
        return {"versions": versions, "settings": "one session, no gate, the prompt in one run", "kv_itemsize": 4}

    def round(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answer one prompt."""
        device, manifest = self._device, self._manifest
        cache = KVCache(empty_arrays(self._spec, manifest.dims, manifest.kv_cache, self._capacity), device)
        before, total = buffer(np.zeros(1, np.int32), device), buffer(np.zeros((), np.int32), device)
        rows = buffer(np.ones(1, np.int64), device)
        counter = PositionCounter(manifest.rotary)
        counter.text(1)  # all others go on from it
        rotary = RotaryTables(manifest.rotary, counter.positions(), self._capacity, manifest.activations, device)
        (described,) = (t for t in self._spec.outputs if t.name == "logits")
        logits = empty(described, (1, 1, manifest.dims.vocab_size), device)
        length = 0

        def bound(token_ids: OrtValue) -> Any:
            lengths = {"seqlens_k": before, "total_sequence_length": total, "num_logits": rows}
            inputs = {"input_ids": token_ids, **lengths, **rotary.inputs, **cache.past}
            return self._graph.bind(inputs, {"logits": logits, **cache.present})

        def feed(run: Any, count: int) -> int:
            nonlocal length
            length += count
            rotary.extend(length)
            before.update_inplace(np.array([length - 1], np.int32))
            total.update_inplace(np.array(length, np.int32))
            run()
            return int(logits.numpy()[0, 0].argmax())

        last = buffer(np.zeros((1, 1), np.int64), device)
        one = bound(last)

        def step(token: int) -> int:
            last.update_inplace(np.array([[token]], np.int64))
            return feed(one, 1)

        def prefill(token_ids: list[int]) -> int:
            return feed(bound(buffer(np.array([token_ids], np.int64), device)), len(token_ids))

        return timed_greedy(prefill, step, job)
