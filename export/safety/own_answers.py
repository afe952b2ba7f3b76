"""What a package's model answers without a gate, and the hidden states of these answers: what a monitor is fitted on.

The runtime computes them, several answers in one pass where it can (runtime/batch.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autosteer.runtime import Engine, Mode
from autosteer.runtime.batch import Batch, can_share
from autosteer.runtime.errors import InputError
from autosteer.runtime.stats import Stats

from .pairs import Prompt
from .refit import as_messages

AT_ONCE = 8  # answers in one pass


@dataclass(frozen=True)
class OwnAnswer:
    """A greedy answer of the model, without a gate."""

    p_unsafe: float  # the gate's, of its prompt
    text: str
    states: np.ndarray  # (n, d) float32: hidden_states[split_layer] of all its tokens but the last


def own_answers(engine: Engine, prompts: Sequence[Prompt], *, tokens: int) -> Iterator[tuple[int, OwnAnswer]]:
    """Greedy answers of at most `tokens` tokens, each with the index of its prompt, in the order in which they end.

    Raises InputError naming a prompt that the package cannot be asked.
    """
    rows = AT_ONCE if can_share(engine.manifest, engine.device) else 1
    batch = Batch(engine.manifest, engine.graphs, engine.device, rows)
    waiting = deque(enumerate(prompts))
    running: dict[int, Generator[None, None, OwnAnswer]] = {}
    while waiting or running:
        while waiting and len(running) < rows:
            index, prompt = waiting.popleft()
            running[index] = _answer(engine, batch, prompt, tokens)
        for index, steps in list(running.items()):
            try:
                next(steps)
            except StopIteration as end:
                del running[index]
                yield index, end.value
        batch.run()


def _answer(engine: Engine, batch: Batch, prompt: Prompt, tokens: int) -> Generator[None, None, OwnAnswer]:
    """One answer. Pauses where a pass is due."""
    policy = engine.policy(Mode.REPORT, judge_answers=False)
    try:
        p_unsafe = engine.score(as_messages(prompt), policy=policy).p_unsafe
        request = engine.request(engine.encoder.prepare(as_messages(prompt), Stats()), tokens, Stats())
    except InputError as err:
        raise InputError(f"{prompt.where}: {err}") from err
    try:
        yield from request.lower_chunks(policy)
        logits = (yield from request.upper_chunks(0.0))[None]
        ids, states = [int(logits[0].argmax())], list[np.ndarray]()
        while len(ids) < request.max_tokens and ids[-1] not in engine.manifest.prompt.end_token_ids:
            logits = yield from batch.decode(request, ids[-1:])
            states.append(request.hidden_state(0))
            ids.append(int(logits[0].argmax()))
    finally:
        batch.leave(request)
    assert p_unsafe is not None
    empty = np.empty((0, engine.manifest.dims.hidden_size), np.float32)
    return OwnAnswer(p_unsafe, engine.tokenizer.decode(ids), np.stack(states) if states else empty)
