"""A checkpoint in memory, as WeightStore reads it; and a chat template for checkpoints on disk."""

from __future__ import annotations

from collections.abc import Iterator

import torch

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Weights:
    """Tensors by name, read a few rows at a time."""

    def __init__(self, tensors: dict[str, torch.Tensor], at_a_time: int = 7):
        self.tensors, self._at_a_time = tensors, at_a_time

    def rows(self, name: str, block_bytes: int) -> Iterator[torch.Tensor]:
        yield from self.tensors[name].split(self._at_a_time)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def keeps(self, name: str, blocks: object) -> bool:
        return False

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        assert self.shape(name) == shape


def random_weights(*names: str, shape: tuple[int, int]) -> Weights:
    """Matrices of this shape, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return Weights({name: torch.randn(*shape, generator=generator) * 0.1 for name in names})
