"""Packages for CUDA, as far as a CPU shows what they are: float16 throughout, on onnxruntime's CPU provider."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from exported import SCRATCH, demo_engine

from autosteer.export.cli import export
from autosteer.export.graphs.quantize import recipe
from autosteer.runtime.engine import Engine
from autosteer.runtime.errors import InputError, PackageError
from autosteer.runtime.gate import Action
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.sampling import SamplingConfig
from autosteer.runtime.stats import Stats
from autosteer.runtime.subgraph import ON_THE_CPU
from autosteer.runtime.text import Message

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "models" / "demo" / "examples"
GATE = {
    "prober": {"hidden_states", "p_unsafe"},
    "refusal_head": {"strength"},
}  # float32 in every package
IMAGES = {"vision_encoder": {"pixel_values", "image_features", "image_newline"}}  # the host works in float32


@pytest.fixture(scope="module", params=["fp16", "int8", "int4"])
def package(request: pytest.FixtureRequest) -> Path:
    """A validated package of the demo model for CUDA, made by the command itself."""
    folder = SCRATCH / f"demo-cuda-{request.param}"
    arguments = ["--model", "demo", "--output", str(folder), "--precision", request.param, "--target", "cuda"]
    export.main(arguments, standalone_mode=False)
    return folder


def test_everything_between_the_decoders_graphs_is_float16_and_what_the_host_reads_is_float32(package: Path) -> None:
    manifest = Manifest.load(package)
    assert (manifest.activations, manifest.kv_cache.dtype, manifest.exact) == ("float16", "float16", False)
    for name, graph in manifest.graphs.items():
        kept = GATE.get(name, set()) | IMAGES.get(name, set()) | {"logits"}
        for tensor in (*graph.inputs, *graph.outputs):
            if tensor.dtype.startswith("float"):
                assert tensor.dtype == ("float32" if tensor.name in kept else "float16"), (name, tensor.name)


def test_no_operator_of_the_decoder_casts_and_none_is_without_a_kernel_on_cuda(package: Path) -> None:
    """`Neg` and int8 products are what the CPU's graphs have and CUDA's must not (docs/gpu.md)."""
    for name in ("decoder_lower", "decoder_upper", "vision_encoder"):
        kinds = {node.op_type for node in onnx.load(package / f"{name}.onnx", load_external_data=False).graph.node}
        assert not kinds & {"Neg", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeLinear"}, name
        assert name == "vision_encoder" or "Cast" not in kinds, name


def test_it_answers_as_the_float32_package_does(package: Path) -> None:
    """At 4 bits a token may differ from float32's by the weights alone: there the verdicts are compared."""
    exact, half = demo_engine("fp32"), Engine.load(package, device="cpu", threads=1)
    for example in json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8")).values():
        config = SamplingConfig(max_tokens=24, speculate=False)
        image = [EXAMPLES / example["image"]]
        one, other = (e.generate(example["prompt"], images=image, sampling=config) for e in (exact, half))
        assert one.verdict.action is other.verdict.action
        assert one.verdict.p_unsafe == pytest.approx(other.verdict.p_unsafe, abs=0.02)
        if half.manifest.precision != "int4":
            assert one.token_ids == other.token_ids


def test_a_refusal_that_overflows_float16_is_an_error_and_no_answer(package: Path) -> None:
    """Infinite hidden states would end in NaNs, and their argmax is a token."""
    engine = Engine.load(package, device="cpu", threads=1)
    policy = replace(engine.policy(threshold=-1.0, pieces=False), strength=1e6)
    with pytest.raises(PackageError, match="not finite"):
        engine.generate("describe the picture.", policy=policy)


def test_an_overflow_before_the_prober_is_an_unsafe_verdict(package: Path) -> None:
    engine = Engine.load(package, device="cpu", threads=1)
    prompt = engine.encoder.prepare([Message.user("hello")], Stats())
    broken = replace(prompt, inputs_embeds=np.full_like(prompt.inputs_embeds, np.inf))
    verdict = engine.request(broken, 4, Stats()).prefill_lower(engine.policy())
    assert verdict.unsafe and verdict.action is Action.STEER


def test_what_cuda_has_no_kernel_for_is_refused_with_what_there_is() -> None:
    with pytest.raises(InputError, match=r"--precision fp32: .* --target cuda goes with fp16, int8, int4"):
        recipe("fp32", target="cuda")
    with pytest.raises(InputError, match=r"--image-precision int8: .* goes with fp32, fp16"):
        recipe("int4", target="cuda", image="int8")
    assert recipe("int4", target="cuda", image="fp32").image == "fp32"


@pytest.mark.skipif(
    "AUTOSTEER_ORT_GPU" not in os.environ, reason="AUTOSTEER_ORT_GPU names no folder of onnxruntime-gpu"
)
def test_onnxruntime_gpu_runs_all_of_it_on_the_device_and_a_token_costs_no_copy_but_ids_and_logits(
    package: Path,
) -> None:
    """Its own CUDA provider, on a stand-in for NVIDIA's libraries (tools/cuda/cuda_dry_run.py)."""
    environment = os.environ | {"PYTHONPATH": f"{os.environ['AUTOSTEER_ORT_GPU']}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "tools/cuda/cuda_dry_run.py", str(package), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    facts, vocabulary = json.loads(done.stdout), Manifest.load(package).dims.vocab_size
    assert {"decoder_lower", "decoder_upper", "lm_head"} <= facts["placement"].keys()
    for graph, places in facts["placement"].items():
        assert places.get("CPUExecutionProvider", {}).keys() <= ON_THE_CPU, graph
    token = facts["crossings"]["another token"]
    assert (token["copies to device"], token["bytes to device"]) == (
        2,
        8 + 4,
    )  # the token's id, how many rows are valid
    assert (token["copies to host"], token["bytes to host"]) == (1, 4 * vocabulary)
