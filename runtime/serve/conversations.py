"""What the server knows of earlier requests: the caches of dialogues whose next turn may come, and its own answers.
Both are found by the digests of a dialogue's messages.

A request that continues a dialogue brings all of its messages. The dialogue's caches are those that were kept under
the digest of a beginning of them. What is reused is then decided by the engine, token by token and picture by picture,
so a wrong find costs time and changes no answer.

A client sends the server's answers back to it, and could as well send others. The gate judges an assistant turn like
any other unless it is, word for word, what this server answered to the very messages before it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from ..conversation import Conversation
from ..engine import Engine
from .dialogue import Turn

ANSWERS = 10_000  # digests of answers to remember


class Conversations:
    """At most `limit` of them; the one that was not used for longest goes first. Thread-safe."""

    def __init__(self, engine: Engine, limit: int):
        self._engine, self._limit = engine, limit
        self._kept: OrderedDict[bytes, Conversation] = OrderedDict()
        self._answers: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, beginnings: Sequence[bytes]) -> Conversation:
        """The caches of the longest beginning that is known, or new ones. Nobody else has them until `keep`."""
        with self._lock:
            known = next((digest for digest in reversed(beginnings) if digest in self._kept), None)
            return Conversation(self._engine) if known is None else self._kept.pop(known)

    def keep(self, dialogue: bytes, conversation: Conversation) -> None:
        """Keep the caches of the dialogue with this digest."""
        with self._lock:
            self._kept[dialogue] = conversation
            self._kept.move_to_end(dialogue)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)

    def remember(self, dialogue: bytes, answer: str) -> None:
        """Note that `answer` was the whole answer to the dialogue with this digest."""
        with self._lock:
            self._answers[Turn("assistant", (answer,)).digest(dialogue)] = None
            while len(self._answers) > ANSWERS:
                self._answers.popitem(last=False)

    def wrote(self, beginning: bytes) -> bool:
        """Whether the last turn of the beginning with this digest is an answer of this server."""
        with self._lock:
            return beginning in self._answers

    def __len__(self) -> int:
        return len(self._kept)
