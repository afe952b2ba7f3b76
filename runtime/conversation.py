"""What the turns of one dialogue need not compute again: keys and values of earlier rows, and the rows of its pictures
and videos.

    conversation = Conversation(engine)
    engine.stream(messages, conversation=conversation)                                    # the first turn
    engine.stream([*messages, answer, question], conversation=conversation)               # runs what is new

Nothing is assumed of the messages. A new prompt is compared with the rows that were computed, token by token and
picture by picture, and starts where they part: an edited turn, another system prompt or an answer that tokenises
otherwise just reuse less. The gate judges the last turn by rows that are always computed anew, and earlier ones of the
user's by what it read of them when they came: what was unsafe stays so while it is part of the dialogue. Leave out
turns that were refused, and the next ones are judged by themselves. Steering bends what comes out of the last layer and
nothing that is kept.
"""

from __future__ import annotations

from .generation import Computed
from .image import Runs


class Conversation:
    """The memory of one dialogue with one engine. A second stream at the same time finds it empty, and is slower."""

    def __init__(self, engine: object):
        self.engine = engine  # the only one that may use it
        self.images: dict[bytes, Runs] = {}  # what stands for the latest prompt's pictures and videos, by digest
        self._computed: Computed | None = None

    def take(self) -> Computed | None:
        """What earlier turns have computed; a request that takes it writes into it, so it can be taken once."""
        computed, self._computed = self._computed, None
        return computed

    def keep(self, computed: Computed) -> None:
        """Put back what a request that is over leaves."""
        self._computed = computed
