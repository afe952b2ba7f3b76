"""Answer cases with the Python runtime, in whatever Python and onnxruntime runs this: JSON lines in, JSON lines out.

    stdin   {"package": folder}, then one case a line (cases.py)
    stdout  {"python", "onnxruntime"}, then for each case {"name", "answers": [{"token_ids", "action", "p_unsafe",
            "margins": by how much each token's logit led the next one's}]}

A package that does not load, or an answer that raises, is a line {"error": one line} in place of answers.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime

from autosteer.runtime import AutoSteerError, Conversation, Engine, Message, SamplingConfig, engine
from autosteer.runtime.chunk import Answer
from autosteer.runtime.sampling import make_sampler
from autosteer.runtime.text import ImagePart

DRAFT = 5  # tokens


class Forced:
    """Drafts the answer that it was made with, by five tokens, the last of which is wrong."""

    def __init__(self, answer: tuple[int, ...]):
        self._answer, self._at = answer, 0

    def __call__(self, prompt: object, position_cost: float, table: object) -> Forced:
        """In place of drafting.Drafter's constructor."""
        return self

    def push(self, token: int) -> None:
        """One token more has been written."""
        self._at += 1

    def draft(self, limit: int) -> list[int]:
        """What comes next, but for the last token."""
        tokens = list(self._answer[self._at : self._at + DRAFT][:limit])
        return [*tokens[:-1], *([tokens[-1] ^ 1] if tokens else [])]


class Margins:
    """Greedy sampling that notes how close each choice was."""

    def __init__(self) -> None:
        self.noted: list[float] = []

    def __call__(self, sampling: SamplingConfig, *more: Any) -> Callable[..., int]:
        """In place of sampling.make_sampler."""
        sample = make_sampler(sampling, *more)

        def noting(logits: Any, tokens: Any) -> int:
            second, first = np.partition(logits, -2)[-2:]
            self.noted.append(round(float(first - second), 5))
            return sample(logits, tokens)

        return noting


def answer(loaded: Engine, case: dict[str, Any]) -> list[dict[str, Any]]:
    """A case's answers, in order."""
    conversation = Conversation(loaded)
    answers = [_generate(loaded, request, conversation) for request in case["requests"]]
    if case["forced"]:
        request = case["requests"][-1]
        with patch.object(engine, "Drafter", Forced(tuple(answers[-1]["token_ids"]))):
            sampling = {**request["sampling"], "speculate": True}
            answers.append(_generate(loaded, {**request, "sampling": sampling}, None))
    return answers


def _generate(loaded: Engine, request: dict[str, Any], conversation: Conversation | None) -> dict[str, Any]:
    messages = [
        Message(m["role"], tuple(p if isinstance(p, str) else ImagePart(p["image"]) for p in m["parts"]))
        for m in request["messages"]
    ]
    margins = Margins()
    with patch.object(engine, "make_sampler", margins):
        given: Answer = loaded.generate(
            messages,
            sampling=SamplingConfig(**request["sampling"]),
            policy=loaded.policy(request["policy"]),
            conversation=conversation,
        )
    verdict = given.verdict
    return {
        "token_ids": given.token_ids,
        "action": verdict.action.value,
        "p_unsafe": verdict.p_unsafe,
        "margins": margins.noted,
        "drafts_held": given.stats.accepted_tokens,
    }


def main() -> None:
    print(json.dumps({"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}), flush=True)
    try:
        loaded = Engine.load(json.loads(sys.stdin.readline())["package"], device="cpu", threads=1)
    except AutoSteerError as err:
        print(json.dumps({"error": str(err)}))
        return
    for line in sys.stdin:
        case = json.loads(line)
        try:
            print(json.dumps({"name": case["name"], "answers": answer(loaded, case)}), flush=True)
        except Exception as err:  # whatever this onnxruntime does: it is what we want to know
            print(
                json.dumps({"name": case["name"], "error": f"{type(err).__name__}: {err}".splitlines()[0]}), flush=True
            )


if __name__ == "__main__":
    main()
