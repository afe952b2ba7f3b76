"""Which graphs run."""

from __future__ import annotations

import pytest

from autosteer.runtime.subgraph import Subgraph


def noted_calls(monkeypatch: pytest.MonkeyPatch, beginnings: tuple[str, ...] = ("",)) -> list[str]:
    """Names of the graphs that run bound to their buffers, in order, from here on: of those that begin so."""
    seen: list[str] = []
    bind = Subgraph.bind

    def noting(self, inputs, outputs):
        call = bind(self, inputs, outputs)
        return lambda: (seen.append(self.name) if self.name.startswith(beginnings) else None, call())

    monkeypatch.setattr(Subgraph, "bind", noting)
    return seen
