"""onnxruntime-genai: a folder made by its model builder (see peers.py), through its Python generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as og

from benchmark.worker import timed_greedy


class Genai:
    """One model folder."""

    def __init__(self, path: str, threads: int, max_tokens: int):
        self._model = og.Model(path)
        self._max_tokens = max_tokens
        options = json.loads((Path(path) / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        self._session = options["session_options"]
        assert self._session["intra_op_num_threads"] == threads

    def facts(self) -> dict[str, Any]:
        """Versions and settings."""
        spinning = self._session.get("session.intra_op.allow_spinning", "1")
        return {
            "versions": {"onnxruntime-genai": og.__version__},
            "settings": f"prune_lm_head, spinning {'on' if spinning == '1' else 'off'}",
            "kv_itemsize": 4,
        }

    def round(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answer one prompt."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=self._max_tokens, min_length=self._max_tokens, do_sample=False)
        generator = og.Generator(self._model, params)

        def prefill(token_ids: list[int]) -> int:
            generator.append_tokens(token_ids)
            return step(0)

        def step(token: int) -> int:  # the generator remembers the token by itself
            generator.generate_next_token()
            return int(generator.get_next_tokens()[0])

        return timed_greedy(prefill, step, job)
