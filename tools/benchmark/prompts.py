"""One job for each round, each with a prompt of its own: nothing that a cache kept from the last round helps.

A job is what every configuration is asked: {"prompt", "token_ids", "image", "new_tokens"} (worker.py).
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from autosteer.runtime import Engine, SamplingConfig
from autosteer.runtime.errors import InputError
from autosteer.runtime.evaluation.datasets import read_lines
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


def of_length(
    folder: Path, manifest: Manifest, tokens: int, new_tokens: int, rounds: int, image: Path | None
) -> list[dict[str, Any]]:
    """Prompts that render to at most (nearly always: exactly) `tokens` text tokens; each begins elsewhere in TEXT.

    `image` adds a picture, whose rows are not counted.
    """
    tokenizer = load_tokenizer(folder / manifest.prompt.tokenizer)
    words, jobs = TEXT.split(), []
    for number in range(rounds):
        start = 7 * number % len(words)
        text = " ".join(words[(start + i) % len(words)] for i in range(tokens + 1))

        def token_ids(length: int, text: str = text) -> list[int]:
            return _token_ids(Message.user(text[:length], [image] if image else []), manifest, tokenizer)

        length = bisect_right(range(len(text) + 1), tokens, key=lambda n: len(token_ids(n))) - 1
        if length < 1:
            raise InputError(f"--prompt-tokens {tokens}: this model's empty prompt takes {len(token_ids(0))} tokens")
        jobs.append(_job(text[:length], token_ids(length), image, new_tokens))
    return jobs


def of_file(
    folder: Path, manifest: Manifest, file: Path, new_tokens: int, threads: int, each: int
) -> list[dict[str, Any]]:
    """All prompts of a file of JSON lines, {"prompt": text}, `each` times over (see `session.middle_rounds`). The first
    one comes once more, because the first round is dropped.

    Answers end where the package's own answer ends, if that is before `new_tokens`: what a model says behind its end
    repeats itself, which flatters drafts.
    """
    engine, jobs = Engine.load(folder, device="cpu", threads=threads), []
    sampling = SamplingConfig(max_tokens=new_tokens, speculate=False)
    for number, fields in read_lines(file):
        if not isinstance(prompt := fields.get("prompt"), str):
            raise InputError(f"{file}:{number}: no 'prompt' that is a text")
        answer = engine.generate(prompt, sampling=sampling, policy=engine.policy("off"))
        token_ids = _token_ids(Message.user(prompt), manifest, engine.tokenizer)
        jobs.append(_job(prompt, token_ids, None, max(2, len(answer.token_ids))))
    if not jobs:
        raise InputError(f"{file}: no prompts")
    return [jobs[0], *jobs * each]


def _token_ids(message: Message, manifest: Manifest, tokenizer: Tokenizer) -> list[int]:
    return [token for run in render([message], manifest.prompt, tokenizer) if isinstance(run, list) for token in run]


def _job(prompt: str, token_ids: list[int], image: Path | None, new_tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "token_ids": token_ids,
        "image": image and str(image.resolve()),
        "new_tokens": new_tokens,
    }
