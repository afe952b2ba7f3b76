"""Write a checkpoint with random weights in the shape of one on the hub, to measure size, speed and memory offline.

    python tools/make_checkpoint.py --shape llava-ov-7b --output build/llava-ov-7b
    autosteer-export --model build/llava-ov-7b --precision int4 --output build/package

Configs, tensor names, dtype and shards are those of the checkpoints on the hub; the tokenizer has their size and
special tokens, but only single bytes as text; safety/ holds a random prober and a steer matrix away from the
identity. Its answers are noise. Weights are written shard by shard: memory stays at one shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from checkpoint_shapes import SHAPES, Shape
from safetensors.torch import save_file

SHARD_BYTES = 2 << 30
REFUSAL = "I'm sorry, but I can't assist with that."


@click.command()
@click.option("--shape", type=click.Choice(sorted(SHAPES)), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--seed", default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace the output folder, if it holds a checkpoint.")
def main(shape: str, output: Path, seed: int, force: bool) -> None:
    """Write a random checkpoint of a real shape."""
    if output.exists():
        if not force:
            raise click.ClickException(f"{output}: exists; give --force to replace it")
        if not (output / "config.json").is_file() or not [*output.glob("*.safetensors")]:
            raise click.ClickException(f"{output}: holds no checkpoint, so --force deletes nothing")
        shutil.rmtree(output)
    facts = SHAPES[shape]
    free = shutil.disk_usage(output.resolve().parent if output.resolve().parent.exists() else ".").free
    config = facts.config()
    names = tensor_shapes(config, facts)
    parameters = sum(torch.Size(s).numel() for s in names.values())
    size = 2 * parameters
    if free < size * 1.05:
        raise click.ClickException(f"{output}: needs {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    output.mkdir(parents=True)
    facts.processor(config).save_pretrained(output)
    config.save_pretrained(output)
    eos = config.get_text_config().eos_token_id
    (output / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}), encoding="utf-8")
    with click.progressbar(length=size, label=f"writing {size / 2**30:.1f} GiB") as bar:
        write_weights(output, names, seed, bar)
    write_safety(output, config.get_text_config().hidden_size, facts.split_layer, seed)
    click.echo(f"{output}: {shape}, {parameters / 1e9:.3f} billion random weights, {size / 2**30:.1f} GiB of bfloat16")


def tensor_shapes(config: Any, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors as the hub's files have them, from Hugging Face's own modules."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    return {shape.hub_name(name): tuple(p.shape) for name, p in model.named_parameters()}


def write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int, bar: Any) -> None:
    """Shards and their index. Activations stay of order one: weights have variance 1 / fan-in, norms are one."""
    shards = list(_shards(shapes))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = _random(name, shapes[name], generator)
            weight_map[name] = file
            bar.update(2 * tensors[name].numel())
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total = sum(2 * torch.Size(s).numel() for s in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if names and size + nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    fan_in = 1 if "embed" in name and len(shape) == 2 else torch.Size(shape[1:]).numel()
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, fan_in**-0.5, generator=generator)


def write_safety(folder: Path, d: int, split_layer: int, seed: int) -> None:
    """A gate for hidden states of width `d` whose scores mean nothing."""
    from autosteer.export.safety_folder import FORMAT_VERSION, SafetyArtifact, SafetyFacts

    generator = torch.Generator().manual_seed(seed)
    facts = SafetyFacts(FORMAT_VERSION, folder.name, split_layer, -1, 0.5, 0.1, REFUSAL, (), {}, {})
    prober = {
        "0.weight": torch.randn(64, d, generator=generator) / d**0.5,
        "0.bias": torch.zeros(64),
        "2.weight": torch.randn(2, 64, generator=generator) / 8,
        "2.bias": torch.zeros(2),
    }
    matrix = torch.eye(d) + torch.randn(d, d, generator=generator) / d**0.5
    SafetyArtifact(facts, prober, matrix).save(folder / "safety")


if __name__ == "__main__":
    main()
