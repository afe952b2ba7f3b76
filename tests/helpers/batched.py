"""Requests that are answered together, in one batch, and alone: what they said."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from autosteer.runtime import Chunk, Conversation, Engine, Message, SamplingConfig
from autosteer.runtime.batch import Batch


@dataclass
class Ask:
    """A request, and what became of it."""

    messages: list[Message]
    sampling: SamplingConfig
    policy: str = "steer"
    strength: float | None = None
    chunks: list[Chunk] = field(default_factory=list)
    error: Exception | None = None

    def begin(self, engine: Engine, batch: Batch | None, conversation: Conversation | None = None) -> Iterator[Any]:
        policy = engine.policy(self.policy, strength=self.strength)
        with engine.record(policy) as record:
            record.messages = self.messages
            prompt = engine.encoder.prepare(record.messages, record.stats, conversation)
            yield from engine.steps(prompt, self.sampling, record, conversation, batch)

    def advance(self, steps: Iterator[Any]) -> bool:
        """Whether it goes on after its next pause."""
        try:
            for chunk in steps:
                if chunk is None:
                    return True
                self.chunks.append(chunk)
        except Exception as err:
            self.error = err
        return False

    def alone(self, engine: Engine, conversation: Conversation | None = None) -> Ask:
        again = Ask(self.messages, self.sampling, self.policy, self.strength)
        for chunk in self.begin(engine, None, conversation):
            if chunk is not None:
                again.chunks.append(chunk)
        return again

    def said(self) -> list[Any]:
        """All that must be as alone. Log probabilities may differ by rounding."""
        return [(c.text, c.token, c.verdict, c.finish_reason) for c in self.chunks]

    def logprobs(self) -> list[float]:
        return [p for c in self.chunks if c.logprobs for _, p in c.logprobs]


def ask(words: str, tokens: int = 20, **more: Any) -> Ask:
    policy, strength = more.pop("policy", "steer"), more.pop("strength", None)
    return Ask([Message.user(words)], SamplingConfig(max_tokens=tokens, **more), policy, strength)


def together(engine: Engine, asks: list[Ask], rows: int = 8, rng: random.Random | None = None) -> Batch:
    """Answer all in one batch. With `rng` they begin at random times, and go on in a random order."""
    batch = Batch(engine.manifest, engine.graphs, engine.device, rows)
    waiting, running = list(asks), list[tuple[Ask, Iterator[Any]]]()
    while waiting or running:
        while waiting and (rng is None or rng.random() < 0.4):
            running.append((one := waiting.pop(0), one.begin(engine, batch)))
        if rng:
            rng.shuffle(running)
        running = [(one, steps) for one, steps in running if one.advance(steps)]
        batch.run()
    return batch
