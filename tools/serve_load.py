"""Ask a server of OpenAI's chat completions with several clients at once: how fast is it, and are its answers right?

    autosteer-serve build/demo &
    python tools/serve_load.py http://127.0.0.1:8080 --clients 1 --clients 4 --seconds 30

Any such server will do (llama-server, too). Each client streams one greedy answer after another. Before, every prompt
is asked once alone; an answer that is another text than that `differs`. At int8 and int4 a few may, where two tokens
are nearly as likely (docs/quantisation.md). An answer that breaks off, or is no stream, `failed`.

    tok/s        tokens of all answers, by the server's own count, until the last one ends
    first p50    milliseconds from sending to the first piece of text; p99: of the slowest in a hundred
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np

from autosteer.runtime.console import debug_option, dumps, json_option, run_command, table
from autosteer.runtime.errors import InputError
from autosteer.runtime.evaluation.datasets import read_lines

PROMPTS = Path(__file__).parent / "benchmark" / "free.jsonl"


@dataclass
class Answer:
    """One answer."""

    text: str
    tokens: int
    first_ms: float
    ended: float  # time.perf_counter()


@dataclass
class Round:
    """What some clients got."""

    clients: int
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    differs: int = 0
    failed: int = 0

    def row(self) -> dict[str, Any]:
        """The line of the table."""
        first = [answer.first_ms for answer in self.answers] or [float("nan")]
        return {
            "clients": self.clients,
            "tok_s": sum(answer.tokens for answer in self.answers) / self.seconds,
            "first_p50_ms": float(np.percentile(first, 50)),
            "first_p99_ms": float(np.percentile(first, 99)),
            "answers": len(self.answers),
            "differ": self.differs,
            "failed": self.failed,
        }


def ask(client: httpx.Client, model: str, prompt: str, tokens: int) -> Answer:
    """One streamed answer. Raises ValueError or httpx.HTTPError if it is not a whole one."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": tokens,
    }
    start, first, texts, count, done = time.perf_counter(), 0.0, list[str](), 0, False
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if done := line == "data: [DONE]":
                break
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            delta = event["choices"][0]["delta"] if event.get("choices") else {}
            if text := delta.get("content") or delta.get("refusal"):
                first = first or time.perf_counter()
                texts.append(text)
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
    if not done or not count:
        raise ValueError("a stream without its end")
    ended = time.perf_counter()
    return Answer("".join(texts), count, 1000 * ((first or ended) - start), ended)


def load(url: str, model: str, prompts: list[str], expected: dict[str, str], clients: int, cli: Options) -> Round:
    """`clients` ask for `cli.seconds`, and finish what they have begun."""
    found, lock, order = Round(clients), threading.Lock(), itertools.cycle(prompts)
    start = time.perf_counter()

    def talk() -> None:
        with httpx.Client(base_url=url, timeout=600) as client:
            while time.perf_counter() - start < cli.seconds:
                with lock:
                    prompt = next(order)
                try:
                    answer = ask(client, model, prompt, cli.max_tokens)
                except (ValueError, KeyError, httpx.HTTPError):
                    with lock:
                        found.failed += 1
                    continue
                with lock:
                    found.answers.append(answer)
                    found.differs += answer.text != expected[prompt]

    threads = [threading.Thread(target=talk) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds = max((answer.ended for answer in found.answers), default=time.perf_counter()) - start
    return found


@dataclass(frozen=True)
class Options:
    """How long, and how much."""

    seconds: float
    max_tokens: int


@click.command("serve_load")
@click.argument("url")
@click.option("--clients", type=click.IntRange(1), multiple=True, default=(1, 2, 4, 8), show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Of each round.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of an answer.")
@click.option("--prompts", type=click.Path(path_type=Path), default=PROMPTS, help="JSON lines with a prompt each.")
@json_option
@debug_option
def main(url: str, clients: tuple[int, ...], seconds: float, max_tokens: int, prompts: Path, as_json: bool) -> None:
    """Ask the server at URL."""
    asked = [str(row["prompt"]) for _, row in read_lines(prompts)]
    cli = Options(seconds, max_tokens)
    with httpx.Client(base_url=url, timeout=600) as client:
        try:
            model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
            expected = {prompt: ask(client, model, prompt, max_tokens).text for prompt in asked}
        except (ValueError, KeyError, httpx.HTTPError) as err:
            raise InputError(f"{url}: no server of chat completions that answers ({err})") from err
    rows = [load(url, model, asked, expected, count, cli).row() for count in clients]
    if as_json:
        click.echo("\n".join(map(dumps, rows)))
        return
    header = ("clients", "tok/s", "first p50, ms", "p99", "answers", "differ", "failed")
    texts = [[f"{v:.1f}" if k == "tok_s" else f"{v:.0f}" for k, v in row.items()] for row in rows]
    click.echo(table(header, texts))


if __name__ == "__main__":
    run_command(main)
