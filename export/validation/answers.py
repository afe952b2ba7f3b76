"""What a package made of a validation prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autosteer.runtime.gate import Verdict
from autosteer.runtime.generation import EncodedPrompt


@dataclass(frozen=True)
class Answered:
    """One answer of the package."""

    verdict: Verdict
    hidden: np.ndarray  # (D,) what the prober read
    last: np.ndarray  # (D,) the last hidden state of the prompt, before the Refusal Head
    logits: np.ndarray  # (n, V) after the prompt, and after each token of the answer but the last
    lead: float  # least by which a token of the answer leads the next likely: see golden.lead
    tokens: list[int]
    branches: dict[str, np.ndarray]  # what each layer's attention and MLP made of the prompt; none of long prompts

    def first(self) -> Answered:
        """As if it had been the first token."""
        return replace(self, logits=self.logits[:1], tokens=self.tokens[:1])


@dataclass(frozen=True)
class Ours:
    """What the package made of a case."""

    prompt: EncodedPrompt
    image_tokens: list[list[int]] | None  # where images are tokens
    plain: Answered
    chunked: Answered  # with the prompt in chunks, one token
    steered: Answered | None  # None without a gate
