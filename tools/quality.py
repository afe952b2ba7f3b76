"""What rounding costs: perplexity, agreement and KL divergence of packages against the PyTorch model in float32.

    python tools/quality.py --model build/smollm2 --package build/smol-int4 --package build/smol-int8 --gguf Q4_0
    python tools/quality.py --model demo --package build/demo-int4 --data build/demo-data/test.jsonl

Without --data the text is the documentation of Python's standard library, in passages of 512 tokens, of which the first
--given are read as a prompt; with it, the answers of a test file in autosteer-eval's form (rows with prompt, images and
answer), their prompts and pictures given. Everything is teacher-forced: each model sees the true tokens so far and is
asked for the next. Packages run as they are, in onnxruntime, int8 activations included; so do peers' files: --genai (in
onnxruntime, a token at a time, since its graph gives the last one's logits alone) and --llama-cpp (a GGUF file, by
llama-cpp-python). --gguf rounds the original's decoder as llama.cpp's type does (its head at Q8_0) and runs it in
PyTorch with float32 activations: the weights alone, in llama.cpp's favour.

    perplexity  e^(mean of -log p(true token))
    KL          mean of KL(original || package) over the vocabulary, in nats
    agree       how often both find the same token likeliest
"""

from __future__ import annotations

import ast
import json
import math
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import log_softmax

from autosteer.export.checkpoint.hf_model import load_hf_model, quiet_transformers
from autosteer.export.checkpoint.open import Checkpoint, open_checkpoint
from autosteer.runtime.console import debug_option, dumps, json_option, run_command, table
from autosteer.runtime.engine import Engine
from autosteer.runtime.gate import Mode
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.stats import Stats
from autosteer.runtime.text import Message

PASSAGE = 512  # tokens
ROWS = 16  # of an answer, fed at a time
LogProbs = torch.Tensor  # (T, V) float32: of each of a sample's target tokens


@dataclass(frozen=True)
class Sample:
    """Tokens to be foretold, after a prompt with pictures or after nothing."""

    messages: tuple[Message, ...]
    targets: list[int]
    given: int = 0  # of the targets: the prompt, where there are no messages


@dataclass
class Score:
    """Sums over target tokens."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, ours: LogProbs, original: LogProbs, targets: torch.Tensor) -> None:
        """ours, original (T, V), targets (T,)"""
        self.tokens += len(targets)
        self.loss -= float(ours.gather(1, targets[:, None]).double().sum())
        self.divergence += float((original.exp() * (original - ours)).double().sum())
        self.agreed += int((ours.argmax(1) == original.argmax(1)).sum())

    def facts(self) -> dict[str, float]:
        """Means, by the names of this file's docstring."""
        return {
            "perplexity": math.exp(self.loss / self.tokens),
            "kl": self.divergence / self.tokens,
            "agree": self.agreed / self.tokens,
        }


def passages(tokenizer: Any, tokens: int, given: int = 1) -> Iterator[Sample]:
    """Docstrings of modules of the standard library, cut to PASSAGE tokens; an order that is the same everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not {"site-packages", "test", "idlelib"} & set(f.parts)]
    random.Random(0).shuffle(files)
    left = tokens
    for file in files:
        try:
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        except (SyntaxError, UnicodeDecodeError):  # files for other versions of Python
            continue
        ids = tokenizer(text, add_special_tokens=False).input_ids[:PASSAGE]
        if len(ids) == PASSAGE and left > 0:
            left -= PASSAGE
            yield Sample((), ids, given)


def answers(data: Path, tokenizer: Any, rows: int) -> Iterator[Sample]:
    """Every n-th row of a test file, so that about `rows` come."""
    lines = data.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for line in lines[:: max(1, len(lines) // rows)]:
        row = json.loads(line)
        if "prompt" in row:
            images = [data.parent / image for image in row["images"]]
            ids = tokenizer(row["answer"], add_special_tokens=False).input_ids
            yield Sample((Message.user(row["prompt"], images),), ids)


def package_log_probs(engine: Engine, sample: Sample) -> LogProbs:
    """What a package says of the targets that are not given: its prompt is read, the rest fed as an answer."""
    if sample.messages:
        prompt = engine.encoder.prepare(sample.messages, Stats())
    else:
        prompt = engine.encoder.prepare_ids(sample.targets[: sample.given], Stats())
    request = engine.request(prompt, len(sample.targets) - sample.given, Stats())
    request.prefill_lower(engine.policy(Mode.OFF))
    logits = [request.prefill_upper(0.0)[None].copy()]
    rest = sample.targets[sample.given : -1]
    for first in range(0, len(rest), ROWS):
        tokens = rest[first : first + ROWS]
        logits.append(request.verify_draft(tokens).copy())
        for _ in tokens[1:]:
            request.accept_draft()
    return log_softmax(torch.from_numpy(np.concatenate(logits)), -1)


def genai_log_probs(session: Any, head_size: int, sample: Sample) -> LogProbs:
    """What a model of onnxruntime-genai says of the targets that are not given."""
    names = [one.name for one in session.get_outputs()]
    past = {
        one.name: np.zeros((1, one.shape[1], 0, head_size), np.float32)
        for one in session.get_inputs()
        if one.name.startswith("past_key_values")
    }
    logits, read = [], 0
    steps = [sample.targets[: sample.given], *([token] for token in sample.targets[sample.given : -1])]
    for tokens in steps:
        read += len(tokens)
        inputs = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, read), np.int64)}
        found = dict(zip(names, session.run(names, {**inputs, **past}), strict=True))
        logits.append(found["logits"][:, -1].astype(np.float32))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    return log_softmax(torch.from_numpy(np.concatenate(logits)), -1)


def llama_cpp_log_probs(llama: Any, sample: Sample) -> LogProbs:
    """What llama.cpp says of the targets that are not given."""
    llama.reset()
    llama.eval(sample.targets[:-1])
    return log_softmax(torch.from_numpy(llama.scores[sample.given - 1 : len(sample.targets) - 1].copy()), -1)


def peers(genai: Sequence[Path], llama_cpp: Sequence[Path], threads: int | None) -> Iterator[tuple[Path, Any]]:
    """(file or folder, what to ask) of each peer's model; each is freed before the next is loaded."""
    for folder in genai:
        import onnxruntime as ort

        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        session = ort.InferenceSession(folder / "model.onnx")
        yield folder, partial(genai_log_probs, session, config["model"]["decoder"]["head_size"])
    for file in llama_cpp:
        from llama_cpp import Llama

        loaded = Llama(str(file), n_ctx=PASSAGE, n_batch=PASSAGE, logits_all=True, n_threads=threads, verbose=False)
        yield file, partial(llama_cpp_log_probs, loaded)


@torch.inference_mode()
def original_log_probs(model: Any, processor: Any, sample: Sample) -> LogProbs:
    """What PyTorch says of the same."""
    targets = torch.tensor([sample.targets])
    inputs: dict[str, Any] = {"input_ids": targets[:, :-1]}
    foretold = targets.shape[1] - sample.given
    if sample.messages:
        (message,) = sample.messages
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.parts]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        pictures = [Image.fromarray(open_image(image)) for image in message.images]
        inputs = dict(processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt"))
        inputs.pop("attention_mask", None)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], targets[:, :-1]], 1)
    return log_softmax(model(**inputs, use_cache=False, logits_to_keep=foretold).logits[0].float(), -1)


@torch.no_grad()
def round_like_gguf(model: Any, checkpoint: Checkpoint, kind: str) -> None:
    """Round the decoder's matrices to a type of the gguf package, the table and the head to Q8_0."""
    from gguf import GGMLQuantizationType, quants

    def rounded(weight: torch.Tensor, name: str) -> torch.Tensor:
        qtype = GGMLQuantizationType[name]
        return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), qtype), qtype))

    decoder = model.get_submodule(checkpoint.family.decoder)
    for module in decoder.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(rounded(module.weight, kind))
    for weight in {decoder.embed_tokens.weight, model.get_output_embeddings().weight}:
        weight.copy_(rounded(weight, "Q8_0"))


def measure(samples: Sequence[Sample], originals: Sequence[LogProbs], ask: Callable[[Sample], LogProbs]) -> Score:
    """Compare what `ask` says of every sample with the original."""
    score = Score()
    with click.progressbar(list(zip(samples, originals, strict=True)), file=sys.stderr) as pairs:
        for sample, original in pairs:
            score.add(ask(sample), original, torch.tensor(sample.targets[-len(original) :]))
    return score


@click.command()
@click.option("--model", required=True, help="The checkpoint that the packages were made of.")
@click.option("--package", "packages", multiple=True, type=click.Path(exists=True, path_type=Path), help="Repeatable.")
@click.option("--gguf", "kinds", multiple=True, help="A type of the gguf package, such as Q4_0. Repeatable.")
@click.option("--genai", multiple=True, type=click.Path(exists=True, path_type=Path), help="A folder. Repeatable.")
@click.option("--llama-cpp", multiple=True, type=click.Path(exists=True, path_type=Path), help="GGUF file. Repeatable.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="A test file instead of passages.")
@click.option(
    "--given",
    type=click.IntRange(1, PASSAGE - 1),
    default=1,
    show_default=True,
    help="Tokens of each passage that are the prompt.",
)
@click.option(
    "--tokens", default=4096, show_default=True, help="Tokens of passages in all; with --data, rows of the file."
)
@click.option("--threads", type=int, help="Default: all cores.")
@json_option
@debug_option
def quality(
    model: str,
    packages: tuple[Path, ...],
    kinds: tuple[str, ...],
    genai: tuple[Path, ...],
    llama_cpp: tuple[Path, ...],
    data: Path | None,
    given: int,
    tokens: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Perplexity, KL and agreement of packages and peers' files against the packages' checkpoint."""
    if data and (genai or llama_cpp):
        raise click.ClickException("--genai and --llama-cpp are asked about passages; leave out --data")
    quiet_transformers()
    if threads:
        torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    original, processor = load_hf_model(checkpoint)
    tokenizer = getattr(processor, "tokenizer", processor)
    samples = list(answers(data, tokenizer, tokens) if data else passages(tokenizer, tokens, given))
    if not samples:
        raise click.ClickException("no samples: no row has a prompt, or no docstring is long enough")
    ask = partial(original_log_probs, original, processor)
    originals = [ask(sample) for sample in samples]
    scores = {"PyTorch, float32": measure(samples, originals, ask)}
    for package in packages:
        engine = Engine.load(package, device="cpu", threads=threads)
        scores[str(package)] = measure(samples, originals, partial(package_log_probs, engine))
    for file, ask in peers(genai, llama_cpp, threads):
        scores[str(file)] = measure(samples, originals, ask)
    for kind in kinds:
        rounded, _ = load_hf_model(checkpoint)
        round_like_gguf(rounded, checkpoint, kind)
        ask = partial(original_log_probs, rounded, processor)
        scores[f"gguf {kind}"] = measure(samples, originals, ask)
    if as_json:
        click.echo(dumps({name: score.facts() for name, score in scores.items()}))
        return
    rows = [
        (name, *(f"{value:.4g}" for value in score.facts().values()), str(score.tokens))
        for name, score in scores.items()
    ]
    click.echo(table(("", "perplexity", "KL", "agree", "tokens"), rows))


if __name__ == "__main__":
    run_command(quality)
