"""The caches of dialogues whose next turn may come, found by the digests of their messages.

A request that continues a dialogue brings all of its messages. The dialogue's caches are those that were kept under
the digest of a beginning of them. What is reused is then decided by the engine, token by token and picture by picture,
so a wrong find costs time and changes no answer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from ..conversation import Conversation
from ..engine import Engine


class Conversations:
    """At most `limit` of them; the one that was not used for longest goes first. Thread-safe."""

    def __init__(self, engine: Engine, limit: int):
        self._engine, self._limit = engine, limit
        self._kept: OrderedDict[bytes, Conversation] = OrderedDict()
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

    def __len__(self) -> int:
        return len(self._kept)
