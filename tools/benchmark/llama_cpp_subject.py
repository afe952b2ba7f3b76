"""llama.cpp: a GGUF file (see peers.py), through llama-cpp-python: its C API, and its class that drafts."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as llama
import numpy as np
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from benchmark.worker import timed_greedy

DRAFTED = 2  # what llama-cpp-python recommends for CPUs


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
        return _facts("")

    def round(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answer one prompt."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        return timed_greedy(self._decode, lambda token: self._decode([token]), job)

    def _decode(self, token_ids: list[int]) -> int:
        tokens = (llama.llama_token * len(token_ids))(*token_ids)
        if code := llama.llama_decode(self._context, llama.llama_batch_get_one(tokens, len(token_ids))):
            raise RuntimeError(f"llama_decode returned {code}")
        return self._likeliest()

    def _likeliest(self) -> int:
        logits = llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


class Drafting:
    """One GGUF file in llama-cpp-python's own class, with its prompt lookup."""

    def __init__(self, path: str, threads: int, max_tokens: int):
        self._model = llama.Llama(
            path,
            n_ctx=max_tokens + 16,  # its last draft must fit
            n_batch=max_tokens,
            n_threads=threads,
            n_threads_batch=threads,
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=DRAFTED),
            logits_all=True,  # it needs them, and 0.3.36 makes no room for them unless told
            verbose=False,
        )

    def facts(self) -> dict[str, Any]:
        """As LlamaCpp's."""
        return _facts(f", prompt lookup of {DRAFTED}")

    def round(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answer one prompt."""
        self._model.reset()
        tokens = self._model.generate(job["token_ids"], temp=0.0, repeat_penalty=1.0)
        return timed_greedy(lambda token_ids: next(tokens), lambda token: next(tokens), job)


def _facts(more: str) -> dict[str, Any]:
    features = llama.llama_print_system_info().decode()
    known = ("AVX2", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8", "NEON", "REPACK", "OPENMP")
    found = [name for name in known if f"{name} = 1" in features]
    return {
        "versions": {"llama-cpp-python": llama.__version__},
        "settings": f"f16 cache, flash attention auto, {', '.join(found)}{more}",
        "kv_itemsize": 2,
    }
