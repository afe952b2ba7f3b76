"""What the turns of one dialogue share: the KV caches of earlier positions, and the rows of its pictures and videos.

    conversation = Conversation(engine)
    engine.stream(messages, conversation=conversation)                                    # the first turn
    engine.stream([*messages, answer, question], conversation=conversation)               # runs only what is new

You still pass all messages. A new prompt is compared with the cached one, token by token and picture by picture, and
computed from the first difference on. An edited turn, another system prompt, or an answer that tokenises differently
just reuses less.

The positions that the prober reads of the last turn are never reused. For earlier turns, what the prober read
when they came is kept. So a dialogue stays unsafe while an unsafe turn is part of it; leave refused turns out. Steering
changes only the output of the last layer, never what is cached.
"""

from __future__ import annotations

from typing import TypeAlias

from .generation import CachedPrefix
from .image import Runs

ReadingKey: TypeAlias = bytes  # identifies what the prober read of a turn; see judge.reading_key


class Conversation:
    """The cache of one dialogue with one engine. It and its streams belong to one thread at a time.

    A stream that begins before the last one has ended finds it empty, and computes all.
    """

    def __init__(self, engine: object):
        self.engine = engine  # the only one that may use it
        self.images: dict[bytes, Runs] = {}  # rows and token ids of the latest prompt's pictures and videos, by digest
        self.known_scores: dict[ReadingKey, float] = {}  # p_unsafe of readings of the latest prompt's turns (judge.py)
        self._prefix: CachedPrefix | None = None

    @property
    def prefix(self) -> CachedPrefix | None:
        """The cached prefix, if no request has it."""
        return self._prefix

    def take_prefix(self) -> CachedPrefix | None:
        """Hand the cached prefix over to a request, which writes into it: None until `keep_prefix` brings one back."""
        prefix, self._prefix = self._prefix, None
        return prefix

    def keep_prefix(self, prefix: CachedPrefix) -> None:
        """Store what a finished request leaves."""
        self._prefix = prefix
