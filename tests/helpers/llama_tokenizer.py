"""A tokenizer of the kind that Llama 2, Vicuna and Mistral have: SentencePiece's BPE with byte fallback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"  # a text that does not change
FIRST = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))


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
