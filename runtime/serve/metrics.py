"""What /metrics says, in Prometheus' format. Counts and times only: nothing of what anybody asked."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..gate import Verdict
from ..stats import Stats

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SCORES = tuple(n / 20 for n in range(1, 21))


class Metrics:
    """One server's. Two servers in a process do not mix theirs."""

    def __init__(self) -> None:
        self._registry = r = CollectorRegistry()
        self._requests = Counter("autosteer_requests", "Requests by their outcome", ("path", "status"), registry=r)
        self._verdicts = Counter("autosteer_verdicts", "Verdicts", ("policy", "action", "unsafe"), registry=r)
        self._scores = Histogram("autosteer_p_unsafe", "Scores of the prober", buckets=SCORES, registry=r)
        self._answers = Counter(
            "autosteer_watched_answers",
            "Answers that the monitor watched, or that were judged as a whole",
            ("unsafe",),
            registry=r,
        )
        self._waited = Histogram("autosteer_queue_seconds", "From arrival to turn", buckets=SECONDS, registry=r)
        self._first = Histogram(
            "autosteer_first_token_seconds", "From turn to first token", buckets=SECONDS, registry=r
        )
        self._tokens = Counter("autosteer_tokens", "Tokens; reused ones were cached", ("kind",), registry=r)
        self._tiles = Counter("autosteer_image_tiles", "Tiles of pictures and frames encoded", registry=r)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show `value()` as `name`."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def waited(self, seconds: float) -> None:
        """A request's turn has come."""
        self._waited.observe(seconds)

    def verdict(self, verdict: Verdict) -> None:
        """A prompt was scored, or let through unscored."""
        self._verdicts.labels(verdict.mode.value, verdict.action.value, str(verdict.unsafe).lower()).inc()
        if verdict.p_unsafe is not None:
            self._scores.observe(verdict.p_unsafe)

    def watched(self, verdict: Verdict) -> None:
        """An answer has ended."""
        if verdict.answer is not None:
            self._answers.labels(str(verdict.answer.unsafe).lower()).inc()

    def work(self, stats: Stats) -> None:
        """A prompt was read, and perhaps answered."""
        if stats.ttft_ms:
            self._first.observe(stats.ttft_ms / 1000)
        self._tokens.labels("prompt").inc(stats.prompt_tokens)
        self._tokens.labels("reused").inc(stats.reused_tokens)
        self._tokens.labels("completion").inc(stats.completion_tokens)
        self._tiles.inc(stats.image_tiles)

    def request(self, path: str, status: int) -> None:
        """A request has ended."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)
