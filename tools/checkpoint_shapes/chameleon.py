"""Chameleon: facebook/chameleon-7b."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .shape import Shape, byte_tokenizer, same_name

VOCABULARY, CODES, FIRST_CODE = 65536, 8192, 4
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
FRAME = {8196: "<eoss>", 8197: "<racm3:break>", 8710: "<reserved08706>", 8711: "<image>"}

ROLES = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "<reserved08706>",
}


def image_token_names(codes: Iterable[int]) -> list[str]:
    """IMGIMG...Z: what Chameleon's vocabulary calls image codes, their digits as letters."""
    return ["IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z" for code in codes]


def _named() -> dict[int, str]:
    """The tokens that are not text. Codes stand in no order, as Chameleon's own do."""
    codes = np.random.default_rng(1).permutation(CODES)
    return dict(enumerate(SPECIAL)) | dict(enumerate(image_token_names(codes), FIRST_CODE)) | FRAME


def config() -> Any:
    """The hub's config.json, but that vocabulary_map leaves out the tokens of text, which nothing reads."""
    from transformers import ChameleonConfig

    return ChameleonConfig(  # every other number of the 7B is ChameleonConfig's default
        vocab_size=VOCABULARY,
        vocabulary_map={name: i for i, name in _named().items()},
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        architectures=["ChameleonForConditionalGeneration"],
        dtype="bfloat16",
    )


def processor(config: Any) -> Any:
    """Images as on the hub; text as single bytes, other tokens at the hub's ids."""
    from tokenizers import processors
    from transformers import ChameleonImageProcessor, ChameleonProcessor

    tokenizer = byte_tokenizer(
        config.vocab_size,
        _named(),
        SPECIAL,
        ROLES,
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return ChameleonProcessor(ChameleonImageProcessor(), tokenizer, image_seq_length=1024)


SHAPES = {"chameleon-7b": Shape(config, processor, same_name, split_layer=24)}
