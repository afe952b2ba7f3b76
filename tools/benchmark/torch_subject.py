"""PyTorch: the checkpoint itself, in Hugging Face's model with its dynamic cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from benchmark.worker import timed_greedy


class Torch:
    """One checkpoint folder at one dtype."""

    def __init__(self, path: str, threads: int, max_tokens: int, dtype: str):
        torch.set_num_threads(threads)
        self._dtype = getattr(torch, dtype)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=self._dtype).eval()

    def facts(self) -> dict[str, Any]:
        """Versions and settings."""
        return {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "settings": f"eager, {self._model.config._attn_implementation} attention, last row's logits only",
            "kv_itemsize": self._dtype.itemsize,
        }

    def round(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answer one prompt."""
        cache = transformers.DynamicCache()

        def forward(token_ids: list[int]) -> int:
            with torch.inference_mode():
                out = self._model(torch.tensor([token_ids]), past_key_values=cache, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())

        return timed_greedy(forward, lambda token: forward([token]), job)
