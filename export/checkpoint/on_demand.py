"""The Hugging Face model with its weights on disk: each matrix is read from the checkpoint when it is first used.

The model is built with empty parameters. Forward hooks ask a LayerSweep for the weights of every large module before it
runs. Embedding and LM head are never in memory as a whole: rows of the embedding are gathered, and the head is
multiplied in blocks of rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .hf_model import auto_class
from .layer_sweep import LayerSweep
from .open import Checkpoint
from .stated import NO_MODEL, in_one_line

SMALL_BYTES = 1 << 20  # modules below it are loaded at once and stay
HEAD_BLOCK_BYTES = 64 << 20
WHOLE_NUMBERS = 1 << 26  # weights; smaller checkpoints are compared with Hugging Face's loader as a whole
SAMPLED_ROWS = 256  # of an embedding table, gathered one by one


class WeightSource(Protocol):
    """Float32 weights by module path: a Checkpoint, or the dequantised weights of a package."""

    def __contains__(self, path: str) -> bool:
        """Whether there is such a weight."""

    def expect(self, path: str, shape: Sequence[int]) -> None:
        """Raise PackageError unless the weight has this shape."""

    def tensor(self, path: str) -> torch.Tensor:
        """The whole weight."""

    def rows(self, path: str, block_bytes: int) -> Iterator[torch.Tensor]:
        """The weight in blocks of rows, of at most so many bytes each."""

    def gather(self, path: str, rows: Sequence[int]) -> torch.Tensor:
        """Some of its rows, (len(rows), ..)."""


def open_on_demand(checkpoint: Checkpoint, lm_head: str, sweep: LayerSweep, source: WeightSource | None = None) -> Any:
    """The checkpoint's model, float32, in eval mode. Its large modules are added to `sweep`, the image tower first.

    `lm_head` names the LM head's weights: the embedding's if the two are tied. `source` defaults to the checkpoint.
    """
    source = source or checkpoint
    model = open_skeleton(checkpoint)
    decoder = checkpoint.family.decoder
    scale = float(getattr(model.get_submodule(decoder).embed_tokens, "embed_scale", 1.0))
    model.get_submodule(decoder).embed_tokens = RowsOnDemand(source, f"{decoder}.embed_tokens.weight", scale)
    model.lm_head = HeadOnDemand(source, lm_head)
    modules = [(path, m) for path, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    large: dict[
        str, list[Weights]
    ] = {}  # by parent: SigLIP's attention declares k_proj before q_proj, but uses q_proj first
    first = modules[0][1]  # Hugging Face asks it for the model's device
    for path, module in sorted(modules, key=lambda entry: entry[0].startswith(f"{decoder}.")):
        part = Weights(source, path, module)
        asked = module is first or isinstance(module, nn.Embedding) or next(module.children(), None) is not None
        if asked or part.bytes < SMALL_BYTES:
            part.load()  # some of these are used without a call of their module's forward
        else:
            large.setdefault(path.rpartition(".")[0], []).append(part)
            module.register_forward_pre_hook(lambda module, args, part=part: sweep.wait_for(part))
    for parts in large.values():
        sweep.add(*parts)
    return model


@torch.no_grad()
def tensors_read_differently(checkpoint: Checkpoint, lm_head: str) -> int:
    """How many tensors differ between our reading of the checkpoint and Hugging Face's own loader.

    Package and PyTorch model both read the checkpoint through `Checkpoint`, so comparing the two does not show a tensor
    that `Checkpoint` maps to the wrong module. This does. Above WHOLE_NUMBERS weights, only the first layer of decoder
    and image tower is compared, and everything outside the layers.
    """
    theirs, missing = _by_hugging_face(checkpoint)
    missing, skipped = missing - checkpoint.packed.keys(), missing | checkpoint.packed.keys()  # it unpacks none
    ours, decoder = open_skeleton(checkpoint), checkpoint.family.decoder
    table, head = theirs.get_input_embeddings(), theirs.get_output_embeddings()
    differing = len(missing)
    for path, module in theirs.named_modules():
        if module is table:
            name = f"{decoder}.embed_tokens.weight"
            some = torch.linspace(0, len(module.weight) - 1, SAMPLED_ROWS).long()
            gathered = RowsOnDemand(checkpoint, name)(some)
            blocks = checkpoint.rows(name, HEAD_BLOCK_BYTES)
            differing += not (_same([gathered], module.weight[some]) and _same(blocks, module.weight))
        elif module is head:
            differing += not _same(HeadOnDemand(checkpoint, lm_head).blocks(), module.weight)
        elif read := {n: p for n, p in module.named_parameters(recurse=False) if f"{path}.{n}" not in skipped}:
            part = Weights(checkpoint, path, mine := ours.get_submodule(path))
            part.load()
            differing += sum(not _same([getattr(mine, name)], theirs) for name, theirs in read.items())
            part.unload()
    return differing


def _same(blocks: Iterable[torch.Tensor], theirs: torch.Tensor) -> bool:
    """Whether blocks of rows equal a tensor, compared in the tensor's dtype."""
    first = 0
    for block in blocks:
        there = theirs[first : first + len(block)]
        if block.is_meta or block.shape != there.shape or not torch.equal(block.to(theirs.dtype), there):
            return False
        first += len(block)
    return first == len(theirs)


def _by_hugging_face(checkpoint: Checkpoint) -> tuple[Any, set[str]]:
    """The model as from_pretrained loads it, cut to one layer if it is large, and the names of missing weights. Weights
    stay mapped from the file until they are read.
    """
    from transformers.utils import logging

    config = copy.deepcopy(checkpoint.config)
    if checkpoint.weights > WHOLE_NUMBERS:
        for part in filter(None, (config.get_text_config(), getattr(config, "vision_config", None))):
            part.num_hidden_layers = 1
            if getattr(part, "layer_types", None):
                part.layer_types = part.layer_types[:1]
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report every layer that was cut off
    try:
        model, info = auto_class(checkpoint).from_pretrained(
            checkpoint.folder, config=config, dtype="auto", output_loading_info=True
        )
    finally:
        logging.set_verbosity(before)
    return model, set(info["missing_keys"])


def open_skeleton(checkpoint: Checkpoint) -> Any:
    """The Hugging Face model with parameters on the meta device and real buffers."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config_file = checkpoint.folder / "config.json"
    with in_one_line(config_file, NO_MODEL), init_empty_weights(include_buffers=False), no_init_weights():
        return auto_class(checkpoint).from_config(checkpoint.config, dtype=torch.float32).eval()


class Weights:
    """The parameters of one module, without its children's: a Loadable of a LayerSweep."""

    def __init__(self, source: WeightSource, path: str, module: nn.Module):
        self._source, self._module = source, module
        self._empty = dict(module.named_parameters(recurse=False))
        self._paths = {name: f"{path}.{name}" for name in self._empty if f"{path}.{name}" in source}
        self.bytes = sum(4 * self._empty[name].numel() for name in self._paths)

    def load(self) -> None:
        """Read the parameters. One that the checkpoint lacks stays on the meta device, and fails when it is used."""
        for name, path in self._paths.items():
            self._source.expect(path, self._empty[name].shape)
            setattr(self._module, name, nn.Parameter(self._source.tensor(path), requires_grad=False))

    def unload(self) -> None:
        """Free the parameters."""
        for name in self._paths:
            setattr(self._module, name, self._empty[name])


class RowsOnDemand(nn.Module):
    """An embedding table that stays on disk. Its rows are multiplied by `scale` (HF: Gemma3TextScaledWordEmbedding)."""

    def __init__(self, source: WeightSource, name: str, scale: float = 1.0):
        super().__init__()
        self._source, self._name, self._scale = source, name, scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (..) -> rows (.., D)"""
        wanted, where = ids.unique(return_inverse=True)
        return self._source.gather(self._name, wanted.tolist())[where] * self._scale


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
