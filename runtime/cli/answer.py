"""An answer as it is printed: streamed to a terminal between its verdict and its timings, or as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import click

from ..gate import verdict_json

if TYPE_CHECKING:
    from ..chunk import Chunk
    from ..conversation import Conversation
    from ..engine import Engine
    from ..gate import AnswerVerdict, GatePolicy, Verdict
    from ..sampling import SamplingConfig
    from ..stats import Stats
    from ..text import Message


def say(
    engine: Engine,
    messages: list[Message],
    gate: GatePolicy,
    config: SamplingConfig,
    conversation: Conversation | None = None,
) -> tuple[str, Verdict]:
    """Stream an answer: verdict and timings to stderr, text to stdout. Returns the text and the verdict."""
    text, last = "", None
    stream = engine.stream(messages, sampling=config, policy=gate, conversation=conversation)
    with contextlib.closing(stream):  # a reader that goes, or Ctrl-C, ends the request here
        for chunk in stream:
            if last is None:
                click.echo(verdict_line(chunk.verdict), err=True)
            last, text = chunk, text + chunk.text
            click.echo(chunk.text, nl=False)
            sys.stdout.flush()
    assert last is not None and last.stats is not None
    click.echo("")
    if seen := last.verdict.answer:
        click.echo(answer_line(seen, last.verdict), err=True)
    click.echo(stats_line(last, last.stats), err=True)
    return text, last.verdict


def verdict_line(verdict: Verdict) -> str:
    """[STEER  p_unsafe 0.993 > 0.500 at layer 6, strength 0.1]"""
    if verdict.p_unsafe is None:
        return "[no gate: --policy off]"
    above = ">" if verdict.p_unsafe > verdict.threshold else "is no probability; limit"
    relation = above if verdict.unsafe else "<="
    stopped_later = verdict.answer is not None and not verdict.unsafe  # then `answer_line` says so
    action = "pass" if stopped_later else verdict.action.value
    line = f"[{action.upper()}  p_unsafe {verdict.p_unsafe:.3f} {relation} {verdict.threshold:.3f}"
    line += f" at layer {verdict.split_layer}"
    if verdict.action.value == "steer":
        line += f", strength {verdict.strength:g}"
    if verdict.unsafe and verdict.mode.value == "report":
        line += "; unsafe, but --policy report lets it pass"
    return line + "]"


def answer_line(seen: AnswerVerdict, verdict: Verdict) -> str:
    """[ANSWER STOPPED  p_unsafe 0.931 > 0.700]"""
    above = ">" if seen.p_unsafe > seen.threshold else "is no probability; limit"
    line = "[ANSWER STOPPED" if verdict.action.value == "stop" else "[ANSWER"
    line += f"  p_unsafe {seen.p_unsafe:.3f} {above if seen.unsafe else '<='} {seen.threshold:.3f}"
    if seen.unsafe and verdict.mode.value == "report":
        line += "; unsafe, but --policy report lets it pass"
    return line + "]"


def stats_line(last: Chunk, stats: Stats) -> str:
    """[52 + 7 tokens, first after 31 ms (vision 20, lower 6, gate 0.1, upper 4), then 410 tok/s, on
    CPUExecutionProvider]
    """
    upper = "decoder_upper never ran" if stats.upper_ms is None else f"upper {stats.upper_ms:.0f}"
    stages = f"vision {stats.vision_ms:.0f}, lower {stats.lower_ms:.0f}, gate {stats.gate_ms:.1f}, {upper}"
    speed = f", then {stats.decode_tok_s:.0f} tok/s" if stats.decode_tok_s else ""
    first = f"first after {stats.ttft_ms:.0f} ms ({stages})"
    reused = f" ({stats.reused_tokens} cached)" if stats.reused_tokens else ""
    drafted = f" ({stats.accepted_tokens} of {stats.drafted_tokens} drafts accepted)" if stats.drafted_tokens else ""
    tokens = f"{stats.prompt_tokens}{reused} + {stats.completion_tokens}{drafted} tokens"
    return f"[{tokens}, {first}{speed}, {last.finish_reason}, on {stats.device}]"


def answer_json(answer: Any) -> dict[str, Any]:
    """What --json prints."""
    timings = dataclasses.asdict(answer.stats) | {"decode_tok_s": answer.stats.decode_tok_s}
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "verdict": verdict_json(answer.verdict),
        "device": timings.pop("device"),
        "timings": timings,
    }
