"""Make a package's table of what its model often says (draft_table.py) from the model's own greedy answers."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from .batch import Batch, can_share
from .draft_table import LONGEST, DraftTable
from .engine import Engine
from .errors import InputError
from .manifest import MANIFEST_FILE, DataFile, DraftSpec, Manifest
from .sampling import SamplingConfig
from .text import Message

AT_ONCE = 16  # answers decoded together: more read the weights less often, and take longer to compute


def own_answers(engine: Engine, prompts: Iterable[Sequence[Message]], max_tokens: int) -> Iterator[list[int]]:
    """The package's greedy answer to each dialogue, under its own policy, in the order in which they end.

    Token ids, with the last LONGEST - 1 of the prompt before them. Raises InputError for a prompt that cannot be read
    or does not fit the context.
    """
    together = AT_ONCE if can_share(engine.manifest, engine.device) else 1
    batch = Batch(engine.manifest, engine.graphs, engine.device, together)
    waiting, running = iter(prompts), list[Generator[list[int] | None, None, None]]()
    try:
        while True:
            more = islice(waiting, together - len(running))
            running += [_answer(engine, messages, max_tokens, batch) for messages in more]
            if not running:
                return
            for answer in list(running):
                if (found := next(answer)) is not None:
                    running.remove(answer)
                    yield found
            batch.run()
    finally:
        for answer in running:
            answer.close()


def _answer(
    engine: Engine, messages: Sequence[Message], max_tokens: int, batch: Batch
) -> Generator[list[int] | None, None, None]:
    """None at each pause, the answer at the end."""
    sampling = SamplingConfig(max_tokens=max_tokens, speculate=False)
    with engine.record(engine.policy("steer" if engine.manifest.guarded else "off")) as record:
        prompt = engine.encode(list(messages), record)
        answer = list(prompt.token_ids[1 - LONGEST :])
        for chunk in engine.steps(prompt, sampling, record, batch=batch):
            if chunk is None:
                yield None
            elif chunk.token is not None:
                answer.append(chunk.token)
    yield answer


def install(folder: Path, table: DraftTable) -> Manifest:
    """Put `table` into the package in `folder`, in place of the one it has. Returns the new manifest.

    Raises InputError for a table without entries. A package is whole at every moment: the new table has another name.
    If anything fails, a full disk for one, what was written is deleted.
    """
    if not len(table.tokens):
        raise InputError("the answers have nothing in common that could be drafted; give more prompts with --data")
    before = Manifest.load(folder)
    raw = table.to_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    file = f"drafts-{digest[:8]}.bin"
    old = before.drafts.file if before.drafts else None
    others = tuple(one for one in before.files if one.file not in (old, file))
    manifest = replace(
        before,
        files=(*others, DataFile(file, len(raw), digest)),
        drafts=DraftSpec(file, len(table.tokens)),
    )
    part = folder / f"{file}.part"
    try:
        part.write_bytes(raw)
        part.replace(folder / file)
        manifest.save(folder)
    except BaseException:
        part.unlink(missing_ok=True)
        (folder / f"{MANIFEST_FILE}.new").unlink(missing_ok=True)
        if file not in {one.file for one in Manifest.load(folder).files}:
            (folder / file).unlink(missing_ok=True)
        raise
    if old not in (None, file):
        (folder / str(old)).unlink()
    return manifest
