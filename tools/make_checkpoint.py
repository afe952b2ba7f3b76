"""Checkpoints of real shape with random weights: size, speed and memory of the real thing, without a hub.

    python tools/make_checkpoint.py --shape llava-ov-7b --output build/llava-ov-7b
    autosteer-export --model build/llava-ov-7b --precision int4 --output build/package

Configs, tensor names, dtype and shards are those of the checkpoints on the hub; the tokenizer has their size and
special tokens, but only single bytes as text; safety/ holds a random prober and a steer matrix away from the
identity. Nothing such a model says means anything. Weights are written shard by shard: memory stays at one shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from demo_world.checkpoint import CHAT_TEMPLATE
from safetensors.torch import save_file

SHARD_BYTES = 2 << 30
REFUSAL = "I'm sorry, but I can't assist with that."
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
FIRST_SPECIAL = 151643  # Qwen2's


@dataclass(frozen=True)
class Shape:
    """What differs between the sizes of LLaVA-OneVision (config.json on the hub)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tied: bool
    split_layer: int  # the authors' for 7B


SHAPES = {
    "llava-ov-0.5b": Shape(896, 4864, 24, 14, 2, 152000, True, 16),
    "llava-ov-7b": Shape(3584, 18944, 28, 28, 4, 152128, False, 20),
}


@click.command()
@click.option("--shape", type=click.Choice(sorted(SHAPES)), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--seed", default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace the output folder.")
def main(shape: str, output: Path, seed: int, force: bool) -> None:
    """Write a random checkpoint of a real shape."""
    if output.exists():
        if not force:
            raise click.ClickException(f"{output}: exists; give --force to replace it")
        shutil.rmtree(output)
    facts = SHAPES[shape]
    free = shutil.disk_usage(output.resolve().parent if output.resolve().parent.exists() else ".").free
    config = llava_onevision_config(facts)
    names = tensor_shapes(config)
    size = sum(2 * int(torch.Size(s).numel()) for s in names.values())
    if free < size * 1.05:
        raise click.ClickException(f"{output}: needs {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    output.mkdir(parents=True)
    write_processor(output, config)
    with click.progressbar(length=size, label=f"writing {size / 2**30:.1f} GiB") as bar:
        write_weights(output, names, seed, bar)
    write_safety(output, facts, seed)
    click.echo(f"{output}: {shape}, random weights, {size / 2**30:.1f} GiB of bfloat16")


def llava_onevision_config(shape: Shape) -> Any:
    """The hub's config.json for this size."""
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=shape.tied,
        bos_token_id=FIRST_SPECIAL,
        eos_token_id=FIRST_SPECIAL + 2,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=FIRST_SPECIAL + 3,
        video_token_index=FIRST_SPECIAL + 4,
        image_grid_pinpoints=[[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=shape.tied,
        architectures=["LlavaOnevisionForConditionalGeneration"],
        dtype="bfloat16",
    )


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors as the hub's files have them, from Hugging Face's own modules."""
    from transformers import LlavaOnevisionForConditionalGeneration

    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config)
    return {_hub_name(name): tuple(p.shape) for name, p in model.named_parameters()}


def _hub_name(name: str) -> str:
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


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
    names, size = [], 0
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


def write_processor(folder: Path, config: Any) -> None:
    """config.json, tokenizer and processor files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    vocabulary |= {f"<unused {i}>": i for i in range(len(alphabet), FIRST_SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 384, "width": 384}}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints, **half),
        fast,
        LlavaOnevisionVideoProcessor(**half),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": FIRST_SPECIAL + 2}), encoding="utf-8")


def write_safety(folder: Path, shape: Shape, seed: int) -> None:
    """A gate of the right shapes whose scores mean nothing."""
    from autosteer.export.safety.artifact import FORMAT_VERSION, SafetyArtifact, SafetyFacts

    d, generator = shape.hidden_size, torch.Generator().manual_seed(seed)
    facts = SafetyFacts(FORMAT_VERSION, folder.name, shape.split_layer, -1, 0.5, 0.1, REFUSAL, (), {}, {})
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
