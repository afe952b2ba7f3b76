"""The answer, watched: a second small prober reads what decoder_lower makes of each token that the model has written.

    score    the monitor's p_unsafe of the mean hidden state of the last `window` tokens; of all, if the answer is
             shorter
    held     a token is shown once `window` tokens, itself the first, have been read: no window that it is part of was
             unsafe
    stopped  at the first unsafe window; what is held is never shown, and the refusal text ends the answer

The mean over a window is what keeps single tokens from stopping an answer. A token is read when the pass runs over it
that gives the next one, so the last token of an answer is not read. Nothing is held under --policy report, and nothing
read under off.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from .arrays import Float
from .gate import AnswerVerdict, GatePolicy, Mode, is_safe, worst
from .generation import probe
from .manifest import Manifest
from .stats import Stats, ms_since
from .subgraph import Subgraph


class Monitor:
    """What the monitor made of one answer so far."""

    def __init__(self, manifest: Manifest, graph: Subgraph, policy: GatePolicy, stats: Stats):
        """`manifest` has a monitor. `policy`.answer_threshold, if there is one, stands in for its threshold."""
        assert manifest.monitor is not None
        self.window, self.stops = manifest.monitor.window, policy.mode is not Mode.REPORT
        self._graph, self._stats = graph, stats
        self._threshold = manifest.monitor.threshold if policy.answer_threshold is None else policy.answer_threshold
        self._states: Float = np.zeros((self.window, manifest.dims.hidden_size), np.float32)
        self._read = 0  # tokens
        self._worst: float | None = None  # p_unsafe so far

    def read(self, state: Float) -> None:
        """Read the next token's hidden state (D,)."""
        before = time.perf_counter()
        self._states[self._read % self.window] = state
        self._read += 1
        if self._read >= self.window:
            self._score()
        self._stats.monitor_ms += ms_since(before)

    def end(self) -> None:
        """The answer has ended: score one that is shorter than a window."""
        if 0 < self._read < self.window:
            self._score()

    def verdict(self) -> AnswerVerdict | None:
        """On the answer so far; None if no window has been read."""
        if self._worst is None:
            return None
        return AnswerVerdict(self._worst, not is_safe(self._worst, self._threshold), self._threshold)

    def _score(self) -> None:
        mean = self._states[: self._read].mean(axis=0, dtype=np.float64).astype(np.float32)
        p_unsafe = probe(self._graph, mean[None], "the monitor failed, so the answer counts as unsafe")
        self._worst = p_unsafe if self._worst is None else worst([self._worst, p_unsafe])


def monitor_for(manifest: Manifest, graphs: Mapping[str, Subgraph], policy: GatePolicy, stats: Stats) -> Monitor | None:
    """The monitor of a new answer; None if the package has none, or the policy is OFF."""
    if manifest.monitor is None or policy.mode is Mode.OFF:
        return None
    return Monitor(manifest, graphs["monitor"], policy, stats)
