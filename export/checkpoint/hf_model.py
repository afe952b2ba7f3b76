"""Load Hugging Face's PyTorch model, and look at what enters its modules: for validation and for the fit."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from autosteer.runtime.errors import PackageError

from .open import Checkpoint, load_processor
from .stated import NO_MODEL, in_one_line

Key = TypeVar("Key", bound=Hashable)


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and notices."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def auto_class(checkpoint: Checkpoint) -> Any:
    """The transformers Auto class that loads the checkpoint."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if checkpoint.family.vision is None else AutoModelForImageTextToText


def load_hf_model(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """(the whole model in memory, float32, in eval mode; its processor).

    Raises PackageError for a packed checkpoint in which a tensor is missing.
    """
    kind = auto_class(checkpoint)
    if checkpoint.packed:  # from_pretrained would need each quantisation method's own libraries and kernels
        model = kind.from_config(checkpoint.config, dtype=torch.float32)
        missing, _ = model.load_state_dict(
            {name: checkpoint.tensor(name) for name in checkpoint.tensor_files}, strict=False
        )
        model.tie_weights(missing_keys=set(missing))
        if gone := set(missing) - set(model.all_tied_weights_keys):
            raise PackageError(f"{checkpoint.folder}: no tensor {min(gone)!r} in the checkpoint (incomplete download?)")
    else:
        with in_one_line(checkpoint.folder / "config.json", NO_MODEL):
            model = kind.from_pretrained(checkpoint.folder, dtype=torch.float32)
    return model.eval(), load_processor(checkpoint)


def cache_argument(model: Any) -> str:
    """Name of forward's argument for the KV cache: `past_key_values`, or `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def watching_inputs(modules: Mapping[Key, Any], watch: Callable[[Key, torch.Tensor], None]) -> Iterator[None]:
    """While open, call `watch(key, hidden_states)` with what enters each of `modules`, before the module runs.

    Only forward passes of the calling thread are watched: other jobs of a LayerSweep share the model.
    """
    me = threading.get_ident()

    def hook_of(key: Key) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == me:
                watch(key, args[0] if args else kwargs["hidden_states"])

        return hook

    handles = [m.register_forward_pre_hook(hook_of(key), with_kwargs=True) for key, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changing_arguments(module: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """While open, `module` is called with the keyword arguments that `change` makes of those it was given. Only in
    forward passes of the calling thread, as in `watching_inputs`.
    """
    me = threading.get_ident()

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, change(kwargs) if threading.get_ident() == me else kwargs

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def deepstack_arguments(added: Sequence[torch.Tensor]) -> dict[str, Any]:
    """A decoder's arguments that add (B, S, D) to the output of each of its first layers; none for models without
    deepstack. Where no picture stands, add zeros.
    """
    if not added:
        return {}
    everywhere = torch.ones(added[0].shape[:2], dtype=torch.bool)
    return {"visual_pos_masks": everywhere, "deepstack_visual_embeds": [rows.flatten(0, 1) for rows in added]}


def placed(base_model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where the rows of prompts stand: position_ids (3, B, S), for a model with multimodal rotary embedding; none for
    others. `inputs`: the processor's.

    Such a model remembers what it found for the prompt before (HF: rope_deltas), and takes it where a pass has no token
    ids, or continues a cache. Passes over several prompts may take turns here, so each says where its rows stand.
    """
    if not hasattr(base_model, "get_rope_index"):
        return {}
    if not {"image_grid_thw", "video_grid_thw"} & inputs.keys():
        batch, length = inputs["input_ids"].shape
        return {"position_ids": torch.arange(length, device=inputs["input_ids"].device).expand(3, batch, -1)}
    names = ("input_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    given, config = {name: inputs[name] for name in names if name in inputs}, base_model.config
    kinds = sum(
        (inputs["input_ids"] == i).int() * n for n, i in ((1, config.image_token_id), (2, config.video_token_id))
    )
    return {"position_ids": base_model.get_rope_index(**given, mm_token_type_ids=kinds)[0]}
