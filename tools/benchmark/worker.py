"""The measured side: one configuration in a process of its own, so that its memory and its threads are nobody else's.

Reads one JSON command per line on stdin and answers each with one JSON line on stdout. Nothing here needs more than
Python and the subject's own library: peers may live in another interpreter.

    {"do": "round", "prompt": ..., "token_ids": [...], "image": ..., "new_tokens": n}    -> times in milliseconds
    {"do": "memory"}                                                                     -> resident memory in MB
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any, Protocol

SUBJECTS = {
    "autosteer": "benchmark.autosteer_subject:AutoSteer",
    "one graph": "benchmark.one_graph:OneGraph",
    "genai": "benchmark.genai_subject:Genai",
    "llama.cpp": "benchmark.llama_cpp_subject:LlamaCpp",
    "llama.cpp drafting": "benchmark.llama_cpp_subject:Drafting",
    "llama.cpp mtmd": "benchmark.mtmd_subject:Mtmd",
    "torch": "benchmark.torch_subject:Torch",
}


class Subject(Protocol):
    """A loaded model. It is made with keyword arguments: path, threads, max_tokens and its own options."""

    def facts(self) -> dict[str, Any]:
        """Versions, settings, and the bytes of one cached key or value element (`kv_itemsize`)."""

    def round(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answer one prompt greedily with `new_tokens` tokens; at least ttft_ms, decode_ms (all later tokens) and
        token_ids.
        """


def timed_greedy(prefill: Any, step: Any, job: dict[str, Any]) -> dict[str, Any]:
    """A peer's round: `prefill(token_ids)` and `step(token)` both return the next token."""
    start = time.perf_counter()
    tokens = [prefill(job["token_ids"])]
    first = time.perf_counter()
    while len(tokens) < job["new_tokens"]:
        tokens.append(step(tokens[-1]))
    end = time.perf_counter()
    return {
        "prompt_tokens": len(job["token_ids"]),
        "ttft_ms": 1000 * (first - start),
        "decode_ms": 1000 * (end - first),
        "token_ids": tokens,
    }


def memory_mb() -> dict[str, float]:
    """Peak resident memory of this process, and how much of the present one is its own (not mapped files)."""
    with open("/proc/self/status", encoding="ascii") as file:
        status = dict(line.split(":", 1) for line in file)
    return {
        "peak_rss_mb": int(status["VmHWM"].split()[0]) / 1024,
        "private_rss_mb": int(status["RssAnon"].split()[0]) / 1024,
    }


def main() -> None:
    """Load the subject that argv[1] describes (JSON) and serve commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print where they like

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    spec = json.loads(sys.argv[1])
    started = time.perf_counter()
    module, name = SUBJECTS[spec.pop("kind")].split(":")
    make = getattr(importlib.import_module(module), name)
    imported, before = time.perf_counter(), memory_mb()
    subject: Subject = make(**spec)
    loaded = time.perf_counter()
    answer(
        {
            "import_ms": 1000 * (imported - started),
            "load_ms": 1000 * (loaded - imported),
            "import_rss_mb": before["peak_rss_mb"],
            **subject.facts(),
        }
    )
    for line in sys.stdin:
        job = json.loads(line)
        answer(subject.round(job) if job["do"] == "round" else memory_mb())


if __name__ == "__main__":
    main()
