"""A package's answers to a validation prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autosteer.runtime.gate import Verdict
from autosteer.runtime.generation import EncodedPrompt


@dataclass(frozen=True)
class PackageAnswer:
    """One answer of the package."""

    verdict: Verdict
    hidden: np.ndarray  # (D,) the prober's input
    last: np.ndarray  # (D,) the last hidden state of the prompt, before the Refusal Head
    logits: np.ndarray  # (n, V) after the prompt, and after each token of the answer but the last
    lead: float  # least margin of a token of the answer over the runner-up: see golden.lead
    tokens: list[int]
    branches: dict[str, np.ndarray]  # see OriginalModel.branch_errors, of prompt and answer; empty for long prompts

    def first(self) -> PackageAnswer:
        """Only the first token."""
        later = len(self.logits) - 1  # positions
        branches = {name: values[:, : values.shape[1] - later] for name, values in self.branches.items()}
        return replace(self, logits=self.logits[:1], tokens=self.tokens[:1], branches=branches)


@dataclass(frozen=True)
class PackageAnswers:
    """The package's answers to one prompt, and what it made of the prompt."""

    encoded: EncodedPrompt
    image_tokens: list[list[int]] | None  # None unless images are tokens
    plain: PackageAnswer
    chunked: PackageAnswer  # one token, after prefill in chunks
    steered: PackageAnswer | None  # None without a gate
