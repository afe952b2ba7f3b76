"""llama.cpp: a GGUF file (see peers.py), through the C API as llama-cpp-python exposes it."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as llama
import numpy as np

from benchmark.worker import timed_greedy


class LlamaCpp:
    """One GGUF file; contexts as `llama_context_default_params` makes them, with as many threads as the others."""

    def __init__(self, path: str, threads: int, max_tokens: int):
        self._silence = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama.llama_backend_init()
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(path.encode(), options)
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = max_tokens
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def facts(self) -> dict[str, Any]:
        """Versions, processor features and settings."""
        features = llama.llama_print_system_info().decode()
        found = [name for name in ("AVX2", "AVX512", "AVX512_VNNI", "AVX512_BF16", "NEON", "REPACK", "OPENMP")
                 if f"{name} = 1" in features]  # fmt: skip
        return {
            "versions": {"llama-cpp-python": llama.__version__},
            "settings": f"f16 cache, flash attention auto, {', '.join(found)}",
            "kv_itemsize": 2,
        }

    def round(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answer one prompt."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        return timed_greedy(self._decode, lambda token: self._decode([token]), job)

    def _decode(self, token_ids: list[int]) -> int:
        tokens = (llama.llama_token * len(token_ids))(*token_ids)
        if code := llama.llama_decode(self._context, llama.llama_batch_get_one(tokens, len(token_ids))):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())
