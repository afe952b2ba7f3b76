"""How much a client may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Each has an option of autosteer-serve, and its number in the error of a request that goes beyond."""

    max_body_mb: float = 20.0  # of a request
    max_images: int = 8  # in a request
    max_megapixels: float = 25.0  # of a picture or a frame
    max_frames: int = 32  # of all videos of a request
    max_tokens: int = 1024  # of an answer
    parallel: int = 4  # requests that compute at the same time, their answers in one batch
    max_queue: int = 16  # requests that wait for their turn
    timeout: float = 300.0  # seconds, from a request's arrival to the end of its answer
    conversations: int = 4  # dialogues whose caches are kept for their next turn

    @property
    def body_bytes(self) -> int:
        """`max_body_mb` in bytes."""
        return int(self.max_body_mb * 1e6)
