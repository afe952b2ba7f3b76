"""What a shape says, as a type, and the tokenizer that all shapes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A checkpoint on the hub, without its weights."""

    config: Callable[[], Any]  # transformers.PretrainedConfig; `architectures` names the model class
    processor: Callable[[Any], Any]  # config -> processor
    hub_name: Callable[[str], str]  # today's name of a parameter -> its name in the hub's files
    split_layer: int  # of the random prober


def same_name(name: str) -> str:
    """For hub files that have today's names."""
    return name


def byte_tokenizer(size: int, named: Mapping[int, str], special: tuple[str, ...], roles: dict[str, Any]) -> Any:
    """A tokenizer of `size` tokens that reads text byte by byte: `named` stand at their ids, bytes where there is room.

    `special` are those of `named` that are special tokens; `roles` are PreTrainedTokenizerFast's arguments
    that say which token is what.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {named.get(i) or next(letters, f"<unused {i}>"): i for i in range(size)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    bpe.add_tokens([AddedToken(name, normalized=False) for name in named.values() if name not in special])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
