"""Which chunks of an answer wait before they are shown, and for what. None in a stream is a pause (engine.py).

    until_watched   if the package has a monitor, a chunk waits until all windows that it is part of are scored
                    (monitor.py)
    until_judged    the whole answer waits for the gate's verdict on it, if it is steered, if its sampling could make
                    the model say anything (SamplingConfig.answer_is_judged), or if the policy judges every answer
                    (GatePolicy.judge_answers)
    until_recorded  with an audit record the last piece of text waits until the line about the answer is written

A schema, a regular expression or a logit bias can dictate an answer: {"const": "how do i ...? sure, ..."} makes the
model say a request that the gate has never seen, and go on from there. A temperature of 2 draws it, with some seed. So
such an answer is judged as if the user had said it (judge.py), with what a stop string cuts from it: its chunks have
tokens and their probabilities. And steering can give way: behind "sure, here is how", or twenty words found
by trial, the demo's head let 41 of 48 requests through. Half a refusal ("i plonk.") is no request, so a steered answer
must also begin like the refusal text.
"""

from __future__ import annotations

import string
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TypeAlias

from .audit import Record
from .chunk import Chunk
from .gate import Action, AnswerVerdict, Mode, is_safe, with_answer
from .monitor import Monitor
from .pieces import in_single_blanks
from .stats import ms_since

COMPARED = 12  # letters and digits
ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
Chunks: TypeAlias = "Iterator[Chunk | None]"
Said: TypeAlias = "Callable[[], str]"  # all that the answer's tokens say, also what a stop string cuts
Score: TypeAlias = "Callable[[str], Generator[None, None, float]]"  # p_unsafe of a text; it may pause


def until_watched(chunks: Chunks, monitor: Monitor, record: Record) -> Chunks:
    """Each chunk once `monitor` has seen it through. A window that is unsafe ends the answer with the refusal text."""
    held, shown = deque[Chunk](), False
    for chunk in chunks:
        if chunk is None:
            yield None
            continue
        last = chunk.finish_reason is not None
        if last:
            monitor.end()
        verdict = with_answer(chunk.verdict, seen := monitor.verdict())
        if seen and seen.unsafe and monitor.stops:
            separator = "\n\n" if shown else ""
            yield Chunk(separator + record.policy.refusal_text, None, verdict, "refused", record.stats)
            return
        held.append(replace(chunk, verdict=verdict) if last else chunk)
        while held and (last or not monitor.stops or len(held) > monitor.window):
            released = held.popleft()
            shown = shown or bool(released.text)
            yield released


def until_judged(chunks: Chunks, said: Said, score: Score, record: Record, *, all_answers: bool) -> Chunks:
    """All chunks once the gate has judged what they say; the refusal text in their place if it is unsafe. What it
    scored is Verdict.answer, unsafe above Verdict.judged_above; None of a steered answer that is safe. Under
    Mode.REPORT nothing waits. `all_answers`: also those that are not steered.
    """
    policy, held = record.policy, list[Chunk]()
    for chunk in chunks:
        if chunk is None:
            yield None
            continue
        steered = chunk.verdict.action is Action.STEER  # then it is greedy, whatever the request's sampling
        if not held and not (policy.checks_steering if steered else all_answers):
            yield chunk
            continue
        if chunk.finish_reason == "refused":
            yield replace(chunk, text=policy.refusal_text)
            return
        last = chunk.finish_reason is not None
        if last and (text := said()).strip(string.whitespace):
            p_unsafe, threshold = (yield from score(text)), chunk.verdict.judged_above
            seen = AnswerVerdict(p_unsafe, not is_safe(p_unsafe, threshold), threshold)
            if seen.unsafe or (chunk.verdict.answer is None and not steered):
                chunk = replace(chunk, verdict=with_answer(chunk.verdict, seen))
            if steered and not begins_like(text, policy.refusal_text):
                chunk = replace(chunk, verdict=replace(chunk.verdict, action=Action.STOP))
            if chunk.verdict.action is Action.STOP:
                yield Chunk(policy.refusal_text, None, chunk.verdict, "refused", record.stats)
                return
        held.append(chunk)
        if last or policy.mode is Mode.REPORT:
            yield from held
            held.clear()


def until_recorded(chunks: Chunks, record: Record) -> Chunks:
    """All chunks, noted in `record` as they are handed over. Raises AuditError before the last text if its line cannot
    be written. (The end of an answer is often a chunk without text.)
    """
    held = list[Chunk]()
    for chunk in chunks:
        if chunk is None:
            yield None
            continue
        record.verdict = chunk.verdict
        record.stats.ttft_ms = record.stats.ttft_ms or ms_since(record.start)
        last = chunk.finish_reason is not None
        if last or chunk.text or not record.audited:
            for earlier in held:
                record.gave(earlier.text, None)
            if last:
                record.gave(chunk.text, chunk.finish_reason)  # before the held text is shown
            yield from held
            held.clear()
        if last or not record.audited:
            yield chunk
        else:
            held.append(chunk)


def begins_like(answer: str, refusal_text: str) -> bool:
    """Whether an answer begins with the first two words of the refusal text, whatever the case and the punctuation
    between letters. At most COMPARED characters are compared; a shorter answer must agree as far as it goes.
    """

    def letters(text: str) -> str:
        return "".join(c for c in text if c.isalnum() or not c.isascii()).translate(ASCII_LOWER)

    wanted = letters("".join(in_single_blanks(refusal_text).split(" ")[:2]))[:COMPARED]
    said = letters(answer)[: len(wanted)]
    return wanted.startswith(said)
