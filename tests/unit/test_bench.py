"""autosteer-bench: what it measures, on the toy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import toy
from conftest import load
from onnx import TensorProto, helper, numpy_helper

from autosteer.runtime import bench as module
from autosteer.runtime.bench import bench, read_bandwidth, weight_bytes
from autosteer.runtime.cli.bench import bench_text


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch):
    """A plain read takes seconds; here it is 1 GB/s."""
    monkeypatch.setattr(module, "read_bandwidth", lambda threads: 1e9)


def test_text_and_picture_are_measured_with_and_without_steering(engine, package):
    found = bench(engine, package, tokens=8, new_tokens=4, rounds=2)
    text, picture = found["cases"]
    assert (text["prompt"], picture["prompt"]) == ("text", "picture")
    assert picture["prompt_tokens"] > text["prompt_tokens"] >= 8
    assert text["first_token_ms"]["vision"] < picture["first_token_ms"]["vision"]
    for case in (text, picture):
        stages = case["first_token_ms"]
        assert 0 < sum(v for k, v in stages.items() if k != "total") < 1.5 * stages["total"]
        assert case["gate_share"] == stages["gate"] / stages["total"]
        assert case["decode_ms"] > 0 and case["steered_ms"] > 0
    assert found["peak_memory_mib"] > 10 and "onnxruntime" in found["machine"]
    assert [entry["answers"] for entry in found["together"]] == [1, 2, 4, 8]
    assert all(entry["tok_s"] > 0 and entry["processor_ms"] > 0 for entry in found["together"])
    shown = bench_text(found)
    assert "8 together, tok/s" in shown
    assert "decode, tok/s" in shown and "1 GB/s read" in shown


def test_a_package_without_gate_or_pictures_has_no_such_lines(unguarded, unguarded_package):
    found = bench(unguarded, unguarded_package, tokens=8, new_tokens=3, rounds=1)
    (case,) = found["cases"]
    assert (case["steered_ms"], case["steering_share"]) == (None, None)


def test_a_step_reads_the_decoder_and_the_head(engine, package, monkeypatch):
    """At 1 GB/s, a step of one millisecond could read a million bytes."""
    monkeypatch.setattr(module, "ms_since", lambda start: 1.0)
    case = bench(engine, package, tokens=8, new_tokens=4, rounds=1)["cases"][0]
    weights = 4 * (2 * (toy.D * 3 * toy.D + toy.D**2) + toy.D * toy.V)
    caches = 2 * 2 * 4 * toy.D * (case["prompt_tokens"] + 3)
    assert case["read_share"] * 1e6 == pytest.approx(weights + caches, rel=0.05)


def test_weights_are_counted_wherever_they_are(tmp_path):
    """Inside the file; outside; and float16 ones that are cast."""
    inside = numpy_helper.from_array(np.zeros((3, 5), np.float32), "inside")
    half = numpy_helper.from_array(np.zeros(7, np.float16), "half")
    outside = TensorProto(name="outside", data_type=TensorProto.INT8, dims=[200], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": "4096", "length": "200"}.items():
        outside.external_data.add(key=key, value=value)
    graph = helper.make_graph([], "g", [], [], [inside, half, outside])
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    (tmp_path / "weights.bin").write_bytes(bytes(4296))
    assert weight_bytes(tmp_path / "g.onnx", "float32") == 60 + 2 * 14 + 200
    assert weight_bytes(tmp_path / "g.onnx", "float16") == 60 + 14 + 200


def test_the_bandwidth_is_a_number_of_bytes_a_second():
    assert 1e7 < read_bandwidth(1, nbytes=1 << 20, sweeps=1) < 1e13


def test_a_package_that_decodes_one_answer_at_a_time_is_measured_so(tmp_path):
    toy.build(tmp_path / "alone", places=True)
    found = bench(load(tmp_path / "alone"), tmp_path / "alone", tokens=4, new_tokens=3, rounds=1)
    assert [entry["answers"] for entry in found["together"]] == [1]
