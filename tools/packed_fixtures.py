"""Make tests/data/packed: one decoder layer of a tiny Llama, packed by the programs that make quantised checkpoints,
and digests of what the same programs unpack it to. tests/parity/test_packed_checkpoint.py puts it into a checkpoint.

    python -m venv build/packers
    build/packers/bin/pip install torch transformers gptqmodel autoawq llmcompressor datasets
    GPTQMODEL_CPU_WORKERS=2 build/packers/bin/python tools/packed_fixtures.py gptq --output tests/data/packed

No GPU. Made with gptqmodel 7.7.0 (which leaves a folder logs/ behind where it is run), autoawq 0.2.9, llmcompressor
0.14.0.1 (compressed-tensors 0.20.0) and transformers 5.24.0. Hugging Face's fp8 packer
refuses to run without a GPU, but does not need one; `no_gpu` skips its check.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
LAYER = "model.layers.0."
GROUP = 32
Made = dict[str, torch.Tensor]


def base(folder: Path) -> Any:
    """The checkpoint to pack, in half precision, and its tokenizer. AutoAWQ wants 64 rows in every matrix."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "demo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        dtype="float16",
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text() -> str:
    """What programs calibrate on."""
    return (ROOT / "LICENSE").read_text(encoding="utf-8")


def gptq(source: Path, target: Path, tokenizer: Any, **options: Any) -> Made:
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    ids = tokenizer(text()).input_ids
    rows = [{"input_ids": ids[i : i + 100], "attention_mask": [1] * 100} for i in range(0, 1600, 100)]
    model = GPTQModel.load(str(source), QuantizeConfig(bits=4, group_size=GROUP, **options), device="cpu")
    model.quantize(rows, batch_size=1)
    model.save(str(target))
    tensors, unpacked = load_file(target / "model.safetensors"), {}
    for module in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        words, n = tensors[f"{module}.qweight"].shape
        shape: dict[str, Any] = {"in_features": 8 * words, "out_features": n, "bias": False, "pack_dtype": torch.int32}
        linear = TorchLinear(bits=4, group_size=GROUP, **options, **shape, register_buffers=True)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            getattr(linear, part).data = tensors[f"{module}.{part}"].clone()
        if options.get("format") != "gptq_v2":
            convert_gptq_v1_to_v2_format_module(linear, bits=4, pack_dtype=torch.int32)
        unpacked[f"{module}.weight"] = linear.dequantize_weight().T
    return unpacked


def awq(source: Path, target: Path, tokenizer: Any) -> Made:
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm

    model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", torch_dtype=torch.float16)
    config = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
    lines = [text()[i : i + 80] for i in range(0, 6000, 80)]
    model.quantize(tokenizer, quant_config=config, calib_data=lines, max_calib_seq_len=64)
    model.save_quantized(str(target))
    tensors = load_file(target / "model.safetensors")
    return {
        name.replace(".qweight", ".weight"): dequantize_gemm(
            *(tensors[name.replace("qweight", part)] for part in ("qweight", "qzeros", "scales")), 4, GROUP
        ).T
        for name in tensors
        if name.endswith(".qweight")
    }


def compressed_tensors(source: Path, target: Path, tokenizer: Any, **scheme: Any) -> Made:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", ignore=["lm_head"], **scheme))
    model.save_pretrained(target, save_compressed=True)
    config = CompressedTensorsConfig(run_compressed=False)
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float16, quantization_config=config)
    return {name: tensor for name, tensor in loaded.state_dict().items() if name.endswith("proj.weight")}


def groups_of_4_bits(symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def fp8(source: Path, target: Path, tokenizer: Any) -> Made:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer as Quantizer

    asked, no_gpu = Quantizer.validate_environment, lambda self, *_, **__: None
    Quantizer.validate_environment = no_gpu  # type: ignore[method-assign]
    config = FineGrainedFP8Config(weight_block_size=(16, 32))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16, quantization_config=config)
    model.save_pretrained(target)
    Quantizer.validate_environment = asked  # type: ignore[method-assign]
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)  # which unpacks where there is no GPU
    return {name: tensor for name, tensor in loaded.state_dict().items() if name.endswith("proj.weight")}


MADE: dict[str, tuple[Callable[..., Made], dict[str, Any]]] = {
    "gptq": (gptq, {"desc_act": False, "sym": True}),
    "gptq-act-order": (gptq, {"desc_act": True, "sym": False}),
    "gptq-v2": (gptq, {"desc_act": False, "sym": False, "format": "gptq_v2"}),
    "awq": (awq, {}),
    "fp8": (fp8, {}),
    "ct-fp8": (compressed_tensors, {"scheme": "FP8_DYNAMIC"}),
    "ct-int8": (compressed_tensors, {"scheme": "W8A8"}),
    "ct-int4": (compressed_tensors, groups_of_4_bits(symmetric=True)),
    "ct-int4-zero-points": (compressed_tensors, groups_of_4_bits(symmetric=False)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("kind", choices=MADE)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    make, options = MADE[arguments.kind]
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "base", Path(scratch) / "packed"
        unpacked = make(source, target, base(source), **options)
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        config.pop("meta", None)
        tensors = load_file(target / "model.safetensors")
        layer = {name: tensor for name, tensor in tensors.items() if name.startswith(LAYER)}
    digests = {
        name: [str(tensor.dtype), hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()]
        for name, tensor in unpacked.items()
        if name.startswith(LAYER)
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    metadata = {"quantization_config": json.dumps(config), "unpacked": json.dumps(digests)}
    save_file(layer, arguments.output / f"{arguments.kind}.safetensors", metadata)


if __name__ == "__main__":
    main()
