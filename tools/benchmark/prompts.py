"""Prompts of a wanted length, another one for each round: nothing that a cache kept from the last round helps."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

from autosteer.runtime.errors import InputError
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.text import Message, load_tokenizer, render

TEXT = """
The lighthouse keeper wrote down the weather every morning before breakfast: wind from the west, a falling glass, long
swell under low cloud. On clear days she could see the other island, where her brother kept bees and sent honey across
with the mail boat. In winter the boat came once a week, or not at all, and then she read the old newspapers again from
the first page to the last. A ship that passed at night was a row of lamps and nothing else; she counted them, looked
the number up in a list, and wrote a name that was probably right. When the fog signal had to be kept going for three
days, she slept in the chair beside it and dreamed in intervals of one minute. Years later a student found the books in
a cellar and learned from them how warm the sea had been.
"""


def prompt_of(folder: Path, manifest: Manifest, tokens: int, number: int, image: Path | None) -> tuple[str, list[int]]:
    """A prompt that renders to at most (nearly always: exactly) `tokens` text tokens, and those tokens.

    `number` says which: each begins elsewhere in the text. `image` adds a picture, whose rows are not counted.
    """
    tokenizer = load_tokenizer(folder / manifest.prompt.tokenizer)
    words = TEXT.split()
    start = 7 * number % len(words)
    text = " ".join(words[(start + i) % len(words)] for i in range(tokens + 1))

    def token_ids(length: int) -> list[int]:
        message = Message.user(text[:length], [image] if image else [])
        runs = render([message], manifest.prompt, tokenizer)
        return [token for run in runs if isinstance(run, list) for token in run]

    length = bisect_right(range(len(text) + 1), tokens, key=lambda n: len(token_ids(n))) - 1
    if length < 1:
        raise InputError(f"--prompt-tokens {tokens}: this model's empty prompt takes {len(token_ids(0))} tokens")
    return text[:length], token_ids(length)
