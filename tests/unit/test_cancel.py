"""A request that is cancelled ends inside the graph that runs for it, and nothing else does."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from autosteer.runtime import Conversation, Message, SamplingConfig
from autosteer.runtime.cancel import Cancel
from autosteer.runtime.errors import CancelledError
from autosteer.runtime.manifest import GraphSpec, TensorSpec
from autosteer.runtime.subgraph import Subgraph, buffer, find_device

SIDE, DEEP = 256, 4000


@pytest.fixture(scope="module")
def slow_graph(tmp_path_factory) -> Subgraph:
    """Thousands of products of matrices: seconds."""
    nodes = [helper.make_node("MatMul", [f"y{i}", "w"], [f"y{i + 1}"]) for i in range(DEEP)]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in ("y0", "w", f"y{DEEP}")]
    graph = helper.make_graph(nodes, "slow", tensors[:2], tensors[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path: Path = tmp_path_factory.mktemp("slow") / "slow.onnx"
    onnx.save(model, path)
    specs = [TensorSpec(name, "float32", (SIDE, SIDE)) for name in ("y0", "w", f"y{DEEP}")]
    spec = GraphSpec("slow.onnx", "", tuple(specs[:2]), tuple(specs[2:]), None, "fp32")
    return Subgraph(path, spec, find_device("cpu", 1)[0])


@pytest.mark.parametrize("bound", [False, True])
def test_a_graph_ends_in_the_middle(slow_graph, bound):
    zeros = np.zeros((SIDE, SIDE), np.float32)
    device = find_device("cpu", 1)[0]
    values = {name: buffer(zeros.copy(), device) for name in ("y0", "w", f"y{DEEP}")}
    call = slow_graph.bind({"y0": values["y0"], "w": values["w"]}, {f"y{DEEP}": values[f"y{DEEP}"]})
    cancel = Cancel()
    threading.Timer(0.1, cancel.set).start()
    with cancel, pytest.raises(CancelledError):
        call() if bound else slow_graph.run({"y0": zeros, "w": zeros})


def test_no_graph_starts_after_a_cancel_and_others_are_not_touched(engine):
    cancel = Cancel()
    stream = engine.stream("tick", sampling=SamplingConfig(max_tokens=9))
    with cancel:
        assert next(stream).text == "tock"
        cancel.set()
        with pytest.raises(CancelledError):
            next(stream)
        with pytest.raises(CancelledError):
            engine.generate("red")
    assert engine.generate("red").text == "orange yellow green"


def test_an_error_that_is_no_cancel_stays_what_it_is():
    def fails(options):
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        Cancel().run(ort.RunOptions(), fails)


@pytest.mark.parametrize("after", range(1, 7))
def test_what_a_cancelled_turn_leaves_is_sound(attentive, after, monkeypatch):
    """Wherever it ends, the dialogue goes on as if from a fresh start."""
    messages = [Message.user("red tick"), Message.assistant("w1"), Message.user("bad")]
    conversation, cancel, runs = Conversation(attentive), Cancel(), []
    run = Cancel.run

    def counting(self, options, call):
        runs.append(1)
        if len(runs) == after:
            self.set()
        return run(self, options, call)

    monkeypatch.setattr(Cancel, "run", counting)
    config = SamplingConfig(max_tokens=6)
    with cancel, pytest.raises(CancelledError):
        attentive.generate(messages, policy=attentive.policy("off"), sampling=config, conversation=conversation)
    monkeypatch.undo()
    messages = [*messages, Message.assistant("w2"), Message.user("red")]
    reusing = attentive.generate(messages, policy=attentive.policy("steer"), sampling=config, conversation=conversation)
    fresh = attentive.generate(messages, policy=attentive.policy("steer"), sampling=config)
    assert (reusing.token_ids, reusing.verdict) == (fresh.token_ids, fresh.verdict)


@pytest.mark.parametrize("mode", ["stop", "steer", "report"])
def test_a_cancel_while_the_prober_runs_is_no_verdict(engine, monkeypatch, mode):
    cancel = Cancel()
    prober = engine.graphs["prober"]

    class Cancelling:
        def run(self, inputs):
            cancel.set()
            return prober.run(inputs)

    monkeypatch.setitem(engine.graphs, "prober", Cancelling())
    with cancel, pytest.raises(CancelledError):
        engine.generate("red", policy=engine.policy(mode))
