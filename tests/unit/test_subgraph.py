"""Memory that sessions share, on a graph with one large activation; and where operators may run."""

import contextlib
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from autosteer.runtime.errors import AutoSteerError, PackageError, ProviderError
from autosteer.runtime.manifest import GraphSpec, TensorSpec
from autosteer.runtime.subgraph import CUDA, BoundGraph, Device, Subgraph, buffer, empty, find_device, session_options

SIZE = 4096  # the product takes 64 MiB
MIB = 1 << 20


def graph(folder: Path) -> Subgraph:
    """Sum of x (4096, 1) times its transpose."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [SIZE, 1]), ("y", [])))
    nodes = [
        helper.make_node("Transpose", ["x"], ["row"]),
        helper.make_node("MatMul", ["x", "row"], ["product"]),
        helper.make_node("ReduceSum", ["product"], ["y"], keepdims=0),
    ]
    opsets = [helper.make_opsetid("", 21)]
    path = folder / "outer.onnx"
    model = helper.make_model(helper.make_graph(nodes, "outer", [x], [y]), opset_imports=opsets, ir_version=10)
    path.write_bytes(model.SerializeToString())
    inputs, outputs = (TensorSpec("x", "float32", (SIZE, 1)),), (TensorSpec("y", "float32", ()),)
    return Subgraph(path, GraphSpec(path.name, "", inputs, outputs, None, "fp32"), find_device("cpu", 1)[0])


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc", AutoSteerError),
        (
            "1 : FAIL : Load model failed: Failed to map file weights.bin, error code: 12 Cannot allocate memory",
            AutoSteerError,
        ),
        ("2 : Failed to allocate memory for requested buffer of size 4096", AutoSteerError),
        ("1 : FAIL : CUDA failure 2: out of memory", AutoSteerError),
        ("7 : INVALID_PROTOBUF : Protobuf parsing failed", PackageError),
    ],
)
def test_too_little_memory_does_not_look_like_a_damaged_package(tmp_path, monkeypatch, said, error):
    def fails(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(ort, "InferenceSession", fails)
    with pytest.raises(AutoSteerError) as raised:
        graph(tmp_path)
    assert type(raised.value) is error
    what = "onnxruntime cannot load it" if error is PackageError else "not enough memory to load it"
    assert str(raised.value) == f"{tmp_path / 'outer.onnx'}: {what} ({said})"


def memory() -> int:
    """This process's own memory, resident, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def test_activations_of_one_session_serve_the_next_and_what_an_image_took_goes_back(tmp_path: Path) -> None:
    """Each session used to keep the most that it had ever needed: a 0.5B model held 130 MB more than now. Measured in a
    process of its own, whose arena no other test has used.
    """
    code = f"from pathlib import Path; import test_subgraph; test_subgraph.measure(Path({str(tmp_path)!r}))"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def measure(folder: Path) -> None:
    """Raises AssertionError unless two sessions share an arena that gives memory back."""
    first, second = graph(folder), graph(folder)
    ones = np.ones((SIZE, 1), np.float32)
    at_rest = memory()
    for session in (first, second):
        out = empty(TensorSpec("y", "float32", ()), (), session.device)
        session.bind({"x": buffer(ones, session.device)}, {"y": out})()
        assert 60 * MIB < memory() - at_rest < 100 * MIB
        assert out.numpy() == SIZE**2
    first.run({"x": ones})
    assert memory() - at_rest < 10 * MIB


def test_a_bound_graph_keeps_its_buffers_alive() -> None:
    """The strength of a steered answer was an array that only the binding knew of. Up to onnxruntime 1.28 that did not
    keep it alive: the Refusal Head read memory that had been freed, and unsafe prompts were answered. The session here
    keeps nothing, as those did not.
    """
    watched, ran = [weakref.ref(values := set()), weakref.ref(outputs := set())], []
    forgetful = SimpleNamespace(bind_ortvalue_input=lambda *given: None, bind_ortvalue_output=lambda *given: None)
    session = SimpleNamespace(io_binding=lambda: forgetful, run_with_iobinding=ran.append)
    call = BoundGraph(session, {"x": values}, {"y": outputs}, None)
    del values, outputs
    assert all(value() is not None for value in watched)
    call()
    assert len(ran) == 1
    del call
    assert all(value() is None for value in watched)


@pytest.mark.skipif(
    not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"), reason="needs onnxruntime 1.26"
)
@pytest.mark.parametrize(
    ("kinds", "astray"),
    [(("Sub", "Concat", "Div"), ""), (("Sub", "Relu", "Relu"), r"no kernel for Relu \(2 of them\)")],
)
def test_a_gpus_session_may_leave_shapes_to_the_cpu_and_nothing_else(kinds: tuple[str, ...], astray: str) -> None:
    """onnxruntime put attention on the CPU without a word. Here everything is on the CPU, and the device says CUDA."""
    names = ["x", *(f"{i}" for i in range(len(kinds)))]
    inputs = {"Sub": 2, "Concat": 2, "Div": 2, "Relu": 1}
    nodes = [
        helper.make_node(kind, [names[i]] * inputs[kind], [names[i + 1]], **({"axis": 0} if kind == "Concat" else {}))
        for i, kind in enumerate(kinds)
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [s]) for n, s in ((names[0], 2), (names[-1], None)))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    subgraph = object.__new__(Subgraph)
    subgraph.device = Device(CUDA, "cuda", 1)
    options = session_options(subgraph.device)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    subgraph.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=astray) if astray else contextlib.nullcontext():
        subgraph._check_placement(Path("g.onnx"))
