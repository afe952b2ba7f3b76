"""A gate of random weights, for tests of safety folders."""

from __future__ import annotations

import torch

from autosteer.export.safety_folder import FORMAT_VERSION, SafetyArtifact, SafetyFacts


def random_gate(width: int) -> SafetyArtifact:
    """One for hidden states of `width`, before layer 1, without a monitor."""
    prober = {
        "0.weight": torch.randn(64, width),
        "0.bias": torch.zeros(64),
        "2.weight": torch.randn(2, 64),
        "2.bias": torch.zeros(2),
    }
    facts = SafetyFacts(FORMAT_VERSION, "m", 1, -1, 0.5, 0.1, "no", (), {}, {})
    return SafetyArtifact(facts, prober, torch.randn(width, width))
