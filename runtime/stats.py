"""What an answer cost."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Stats:
    """What an answer cost. Milliseconds are wall time; `upper_ms` is None if decoder_upper never ran."""

    device: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0  # prompt tokens whose keys and values were cached by the conversation
    completion_tokens: int = 0  # those that were withheld, too
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # drafted tokens that the sampler then chose
    image_tiles: int = 0  # encoded for this answer
    kv_bytes: int = 0  # memory of the keys and values, room for the answer included
    vision_ms: float = 0.0
    embed_ms: float = 0.0
    lower_ms: float = 0.0
    gate_ms: float = 0.0
    upper_ms: float | None = None
    ttft_ms: float = 0.0  # from the first next() to the first chunk: of a judged answer, to its end
    decode_ms: float = 0.0  # passes after the first token
    monitor_ms: float = 0.0  # part of decode_ms: what watched the answer

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens per second after the first one; None for answers of one token."""
        steps = self.completion_tokens - 1
        return 1000 * steps / self.decode_ms if steps > 0 and self.decode_ms > 0 else None


def ms_since(start: float) -> float:
    """Milliseconds since time.perf_counter() was `start`."""
    return 1000 * (time.perf_counter() - start)
