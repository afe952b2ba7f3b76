"""Run the configurations: one worker process each, all loaded, one round at a time in turn.

A machine's speed drifts; configurations measured minutes apart are not comparable. So rounds alternate, the order
turns by one each round, the first round is dropped, and ratios are taken within a round.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from .peers import Configuration, environment


class WorkerError(Exception):
    """A configuration that died, with the last line it wrote."""


@dataclass(frozen=True)
class Measured:
    """What came back from one configuration."""

    configuration: Configuration
    facts: dict[str, Any]  # versions, settings, import_ms, load_ms, ...
    rounds: tuple[dict[str, Any], ...]  # without the first
    memory: dict[str, float]  # at the end
    cold_start_ms: tuple[float, ...]  # process start to first token, without the first


class Worker:
    """A running worker process."""

    def __init__(self, configuration: Configuration, threads: int, max_tokens: int):
        self.name = configuration.name
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by `close`)
        command = [configuration.python, "-m", "benchmark.worker", configuration.spec(threads, max_tokens)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, env=environment()
        )
        try:
            self.facts = self._read()
        except WorkerError:
            self.close()
            raise

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises WorkerError where the process died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _read says why
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._stderr.seek(0)
            last = (self._stderr.read().strip().splitlines() or [f"exit code {self._process.returncode}"])[-1]
            raise WorkerError(f"{self.name}: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(
    configurations: Sequence[Configuration],
    jobs: Sequence[dict[str, Any]],
    *,
    threads: int,
    max_tokens: int,
    cold_starts: int,
    report: Callable[[str], None],
) -> tuple[list[Measured], list[str]]:
    """Every job on every configuration, the first job thrown away; and why a configuration is missing, if one is: one
    that dies is left out, and the others go on.

    Each job is one round's prompt (see worker.py). `cold_starts` fresh processes each say one token of the last job.
    """
    workers: dict[str, Worker] = {}
    failed: list[str] = []
    rounds: dict[str, list[dict[str, Any]]] = {c.name: [] for c in configurations}
    memory: dict[str, dict[str, float]] = {}
    cold: dict[str, list[float]] = {c.name: [] for c in configurations}

    def asked(name: str, **command: Any) -> dict[str, Any] | None:
        try:
            return workers[name].ask(**command)
        except WorkerError as err:
            failed.append(str(err))
            workers.pop(name).close()
            return None

    try:
        for configuration in configurations:
            report(f"loading {configuration.name}")
            try:
                workers[configuration.name] = Worker(configuration, threads, max_tokens)
            except WorkerError as err:
                failed.append(str(err))
        for number, job in enumerate(jobs):
            for name in _turned(list(workers), number):
                report(f"round {number + 1} of {len(jobs)}: {name}")
                if (found := asked(name, do="round", **job)) is not None:
                    rounds[name].append(found)
        for name in list(workers):
            if (found := asked(name, do="memory")) is not None:
                memory[name] = found
                workers[name].close()
        alive = [c for c in configurations if c.name in workers]
        for number in range(cold_starts):
            for configuration in _turned(alive, number):
                report(f"cold start {number + 1} of {cold_starts}: {configuration.name}")
                try:
                    cold[configuration.name].append(_cold_start(configuration, jobs[-1], threads, max_tokens))
                except WorkerError as err:
                    failed.append(f"a cold start of {err}")
    finally:
        for worker in workers.values():
            worker.close()
    return [
        Measured(c, workers[c.name].facts, tuple(rounds[c.name][1:]), memory[c.name], tuple(cold[c.name][1:]))
        for c in alive
    ], failed


def middle_rounds(measured: Measured, each: int) -> Measured:
    """For prompts that were all asked `each` times: of each prompt, the round in the middle by its decode time."""
    prompts = len(measured.rounds) // each
    asked = [sorted(measured.rounds[n::prompts], key=itemgetter("decode_ms")) for n in range(prompts)]
    return replace(measured, rounds=tuple(rounds[len(rounds) // 2] for rounds in asked))


def _cold_start(configuration: Configuration, job: dict[str, Any], threads: int, max_tokens: int) -> float:
    """Milliseconds from starting the process to its first token, files in the page cache."""
    start = time.perf_counter()
    worker = Worker(configuration, threads, max_tokens)
    ready = time.perf_counter()
    first = worker.ask(do="round", **{**job, "new_tokens": 1})["ttft_ms"]
    worker.close()
    return 1000 * (ready - start) + float(first)


def _turned(items: Sequence[Any], by: int) -> list[Any]:
    by %= max(len(items), 1)
    return [*items[by:], *items[:by]]
