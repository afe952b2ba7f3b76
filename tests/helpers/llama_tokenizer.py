"""Tokenizers of SentencePiece's BPE with byte fallback: as Llama 2, Vicuna and Mistral have them, and as Gemma has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"  # a text that does not change
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
FIRST = ("<unk>", "<s>", "</s>", *BYTES)


def llama_tokenizer(*special: str, legacy: bool, size: int = 600) -> Any:
    """Trained on LICENSE; `special` tokens stand last. `legacy`: a space comes before each run of text, not the first
    alone.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(FIRST), show_progress=False)
    bpe.train_from_iterator([LICENCE.read_text(encoding="utf-8")], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, legacy=legacy, add_bos_token=True)
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def gemma_tokenizer(size: int = 700) -> Any:
    """Trained on LICENSE. Spaces become U+2581 before anything is cut; runs of lines and thousands of unused names are
    added tokens that are not special.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, trainers
    from transformers import GemmaTokenizer

    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*first, *BYTES], show_progress=False)
    bpe.train_from_iterator(LICENCE.read_text(encoding="utf-8").split("\n"), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = GemmaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    unused = [
        *("\n" * n for n in range(2, 8)),
        *("\u2581" * n for n in range(2, 8)),
        *(f"<unused{i}>" for i in range(99)),
    ]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in unused])
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    return tokenizer
