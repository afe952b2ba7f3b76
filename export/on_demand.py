"""The PyTorch original without its weights in memory: each matrix is read from the checkpoint when its turn comes.

The model is Hugging Face's own, built on no memory; forward hooks ask a Convoy for the weights of every large module
before it runs. The two tables of the vocabulary are never there as a whole: rows of the embedding are gathered, and
the head is gone through in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .checkpoint import Checkpoint
from .convoy import Convoy

SMALL_BYTES = 1 << 20  # modules below it are loaded at once and stay
HEAD_BLOCK_BYTES = 64 << 20


class WeightSource(Protocol):
    """Where weights come from, in float32, by module path: a Checkpoint, or what a package made of one."""

    def __contains__(self, path: str) -> bool: ...

    def expect(self, path: str, shape: Sequence[int]) -> None: ...

    def tensor(self, path: str) -> torch.Tensor: ...

    def rows(self, path: str, block_bytes: int) -> Iterator[torch.Tensor]: ...

    def gather(self, path: str, rows: Sequence[int]) -> torch.Tensor: ...


def open_on_demand(checkpoint: Checkpoint, lm_head: str, convoy: Convoy, source: WeightSource | None = None) -> Any:
    """The checkpoint's model, float32, in eval mode; its parts are added to `convoy`, images first.

    `lm_head` is the name of the head's weights, which is the embedding's where the two are tied. Weights come from
    `source`, which is the checkpoint itself unless given.
    """
    source = source or checkpoint
    model = _skeleton(checkpoint)
    decoder = checkpoint.family.decoder
    model.get_submodule(decoder).embed_tokens = RowsOnDemand(source, f"{decoder}.embed_tokens.weight")
    model.lm_head = HeadOnDemand(source, lm_head)
    modules = [(path, m) for path, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    large: dict[str, list[Weights]] = {}  # by parent: SigLIP's attention has k_proj before q_proj, but asks for q first
    for path, module in sorted(modules, key=lambda entry: entry[0].startswith(f"{decoder}.")):
        part = Weights(source, path, module)
        if part.bytes < SMALL_BYTES or isinstance(module, nn.Embedding) or next(module.children(), None) is not None:
            part.load()  # some of these are read without their module's forward
        else:
            large.setdefault(path.rpartition(".")[0], []).append(part)
            module.register_forward_pre_hook(lambda module, args, part=part: convoy.reach(part))
    for parts in large.values():
        convoy.add(*parts)
    return model


def _skeleton(checkpoint: Checkpoint) -> Any:
    """Hugging Face's model with parameters of no size and buffers that are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForCausalLM if checkpoint.family.vision is None else AutoModelForImageTextToText
    with init_empty_weights(include_buffers=False):
        return kind.from_config(checkpoint.config, dtype=torch.float32).eval()


class Weights:
    """The parameters of one module, without its children's: a Convoy's Part."""

    def __init__(self, source: WeightSource, path: str, module: nn.Module):
        self._source, self._module = source, module
        self._empty = dict(module.named_parameters(recurse=False))
        self._paths = {name: f"{path}.{name}" for name in self._empty if f"{path}.{name}" in source}
        self.bytes = sum(4 * self._empty[name].numel() for name in self._paths)

    def load(self) -> None:
        """Read them. What the checkpoint does not have stays empty, and fails where it is used."""
        for name, path in self._paths.items():
            self._source.expect(path, self._empty[name].shape)
            setattr(self._module, name, nn.Parameter(self._source.tensor(path), requires_grad=False))

    def unload(self) -> None:
        """Back to nothing."""
        for name in self._paths:
            setattr(self._module, name, self._empty[name])


class RowsOnDemand(nn.Module):
    """An embedding table that stays on disk."""

    def __init__(self, source: WeightSource, name: str):
        super().__init__()
        self._source, self._name = source, name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (..) -> rows (.., D)"""
        wanted, where = ids.unique(return_inverse=True)
        return self._source.gather(self._name, wanted.tolist())[where]


class HeadOnDemand(nn.Module):
    """An output projection E (V, D) that stays on disk."""

    def __init__(self, source: WeightSource, name: str):
        super().__init__()
        self._source, self._name = source, name

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, R, D) -> (1, R, V)"""
        return torch.cat([hidden @ block.T for block in self.blocks()], dim=-1)

    def blocks(self) -> Iterator[torch.Tensor]:
        """E, in blocks of rows."""
        return self._source.rows(self._name, HEAD_BLOCK_BYTES)
