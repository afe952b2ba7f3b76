"""autosteer-bench: how fast a package is on this machine, and what its gate costs.

No text is made: the loop's parts run on a prompt of plain English and, if the package takes pictures, on a generated
one, whatever the verdict. Each round does prefill once, then decodes without drafts. Medians over the rounds.

A decode step reads all weights of the decoder and of the LM head once. Its share of the memory's bandwidth is these
bytes, and the caches', over the time of a step and the bandwidth of a plain read with as many threads. At about 1
memory is what limits it; far below 1, arithmetic.
"""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .batch import Batch, can_share
from .engine import Engine
from .errors import InputError
from .gate import Mode
from .generation import Request, finish
from .host import describe_host
from .stats import Stats, ms_since
from .text import Message

SWEEP_BYTES = 512 << 20  # far beyond any cache
TOGETHER = (2, 4, 8)  # answers in one pass
PICTURE = (480, 640, 3)
STAGES = ("vision", "embed", "lower", "gate", "upper")
TEXT = (
    "The lighthouse keeper wrote down the weather every morning before breakfast: wind from the west, a falling glass, "
    "long swell under low cloud. On clear days she could see the other island, where her brother kept bees. "
)
READ_BY_A_STEP = ("decoder_lower", "decoder_upper", "lm_head")
FLOAT16 = 10  # onnx.TensorProto's
Field: TypeAlias = "tuple[int, int | memoryview]"
ALL_PIECES = 0.999999  # a threshold at which no piece ends the reading


@dataclass(frozen=True)
class Case:
    """What one prompt cost. Milliseconds are medians."""

    prompt: str  # "text" or "picture"
    prompt_tokens: int
    first_token_ms: dict[str, float]  # by stage; "total" is from the messages to the first token
    decode_ms: float  # a step
    steered_ms: float | None  # a step through the Refusal Head; None without a gate
    gate_share: float  # of the first token's time, the prompt read as a whole
    pieces_ms: float | None  # what reading its pieces adds to the first token (pieces.py); None without a gate
    steering_share: float | None  # what steering adds to a step
    step_bytes: int  # that a step reads of weights and caches


@dataclass(frozen=True)
class Together:
    """Several answers decoded in one pass, as autosteer-serve does."""

    answers: int
    tok_s: float  # of all
    processor_ms: float  # of all threads, a token


def bench(engine: Engine, folder: Path, *, tokens: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Measure the package in `folder`, loaded as `engine`. `tokens`: about so many of text in a prompt.

    Raises InputError if a prompt and its answer do not fit the context.
    """
    text = _text_of(engine, tokens)
    prompts = {"text": Message.user(text)}
    if engine.manifest.image:
        prompts["picture"] = Message.user(text, [_picture()])
    context = engine.manifest.dims.context_length
    for name, message in prompts.items():
        length = engine.encoder.prepare([message], Stats()).inputs_embeds.shape[1]
        if length + new_tokens > context:
            raise InputError(
                f"--new-tokens {new_tokens}: the {name} prompt has {length} tokens, and the context holds {context}; "
                "take fewer, or fewer --prompt-tokens"
            )
    cases = [_case(engine, folder, name, message, new_tokens, rounds) for name, message in prompts.items()]
    shared = can_share(engine.manifest, engine.device)
    together = [_together(engine, prompts["text"], n, new_tokens) for n in (1, *(TOGETHER if shared else ()))]
    peak = peak_memory_mib()  # before half a gigabyte is read
    bandwidth = read_bandwidth(engine.device.threads)
    return {
        "package": str(folder),
        "precision": engine.manifest.precision,
        "device": engine.device.provider,
        "threads": engine.device.threads,
        "machine": describe_host(),
        "read_gb_s": bandwidth / 1e9,
        "peak_memory_mib": peak,
        "cases": [{**vars(case), "read_share": 1000 * case.step_bytes / case.decode_ms / bandwidth} for case in cases],
        "together": [vars(found) for found in together],
    }


def read_bandwidth(threads: int, nbytes: int = SWEEP_BYTES, sweeps: int = 6) -> float:
    """Bytes per second that `threads` threads can read from memory: the fastest of a few sweeps."""
    data = np.ones(nbytes // 8, np.uint64)
    parts = np.array_split(data, threads)

    def sweep() -> float:
        workers = [threading.Thread(target=np.max, args=(part,)) for part in parts]  # releases the interpreter
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return data.nbytes / (time.perf_counter() - start)

    return max(sweep() for _ in range(sweeps))


def peak_memory_mib() -> float | None:
    """The most memory that this process has had; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else None


def weight_bytes(file: Path, activations: str) -> int:
    """Bytes of a graph's weights that a step reads: its initializers, wherever they are stored. float16 ones of a graph
    that computes in float32 are cast when it is loaded.
    """
    total = 0
    for graph in _of(file.read_bytes(), 7):  # ModelProto.graph
        for tensor in _of(graph, 5):  # GraphProto.initializer
            external = [(_of(entry, 1)[0], _of(entry, 2)[0]) for entry in _of(tensor, 13)]  # external_data: key, value
            lengths = [int(bytes(value)) for key, value in external if bytes(key) == b"length"]
            size = sum(lengths) + sum(len(raw) for raw in _of(tensor, 9))  # raw_data
            cast = activations == "float32" and FLOAT16 in (value for number, value in _fields(tensor) if number == 2)
            total += size * (2 if cast else 1)
    return total


def _case(engine: Engine, folder: Path, name: str, message: Message, new_tokens: int, rounds: int) -> Case:
    manifest, gated = engine.manifest, engine.manifest.refusal
    policy = engine.policy(Mode.REPORT if gated else Mode.OFF, judge_answers=False)
    stages: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "total")}
    steps: dict[float, list[float]] = {strength: [] for strength in ([0.0, gated.strength] if gated else [0.0])}
    for number in range(rounds + 1):  # the first warms up
        for strength, times in steps.items():
            stats, start = Stats(), time.perf_counter()
            prompt = engine.encoder.prepare([message], stats)
            request = engine.request(prompt, new_tokens, stats)
            request.prefill_lower(policy)
            token = int(request.prefill_upper(strength).argmax())
            found = [getattr(stats, f"{stage}_ms") for stage in STAGES]
            spent = [*found, ms_since(start)]
            if number and not strength:
                for stage, value in zip(stages, spent, strict=True):
                    stages[stage].append(value)
            for _ in range(new_tokens - 1):
                start = time.perf_counter()
                token = int(request.decode_step(token).argmax())
                if number:
                    times.append(ms_since(start))
    plain, *steered = (statistics.median(times) for times in steps.values())
    first = {stage: statistics.median(values) for stage, values in stages.items()}
    read = sum(weight_bytes(folder / manifest.graphs[g].file, manifest.activations) for g in READ_BY_A_STEP)
    read += stats.kv_bytes * request.length // request.capacity
    return Case(
        prompt=name,
        prompt_tokens=stats.prompt_tokens,
        first_token_ms=first,
        decode_ms=plain,
        steered_ms=steered[0] if steered else None,
        gate_share=first["gate"] / first["total"],
        pieces_ms=_pieces_ms(engine, message, rounds) if gated else None,
        steering_share=steered[0] / plain - 1 if steered else None,
        step_bytes=read,
    )


def _pieces_ms(engine: Engine, message: Message, rounds: int) -> float:
    """Milliseconds that all pieces of a prompt take."""
    taken: dict[bool, list[float]] = {False: [], True: []}
    for pieces, times in taken.items():
        policy = engine.policy(Mode.REPORT, threshold=ALL_PIECES, pieces=pieces)
        for _ in range(rounds + 1):  # the first warms up
            start = time.perf_counter()
            engine.score([message], policy=policy)
            times.append(ms_since(start))
    whole, both = (statistics.median(times[1:]) for times in taken.values())
    return max(0.0, both - whole)


def _together(engine: Engine, message: Message, answers: int, new_tokens: int) -> Together:
    """Decode `answers` of one prompt; the first pass, for which the caches move, does not count."""
    batch, tokens = Batch(engine.manifest, engine.graphs, engine.device, answers), dict[Request, int]()
    for _ in range(answers):
        stats = Stats()
        request = engine.request(engine.encoder.prepare([message], stats), new_tokens, stats)
        request.prefill_lower(engine.policy(Mode.REPORT if engine.manifest.guarded else Mode.OFF))
        tokens[request] = int(request.prefill_upper(0.0).argmax())
    for step in range(new_tokens - 1):
        if step == 1:
            start, processor = time.perf_counter(), time.process_time()
        waiting = [(request, batch.decode(request, [token])) for request, token in tokens.items()]
        for _, decoding in waiting:
            next(decoding)
        batch.run()
        tokens = {request: int(finish(decoding)[0].argmax()) for request, decoding in waiting}
    made = answers * (new_tokens - 2)
    return Together(
        answers=answers,
        tok_s=made / (time.perf_counter() - start),
        processor_ms=1000 * (time.process_time() - processor) / made,
    )


def _text_of(engine: Engine, tokens: int) -> str:
    """English of about `tokens` tokens."""
    once = len(engine.tokenizer.encode(TEXT, add_special_tokens=False).ids)
    words = (TEXT * (1 + tokens // once)).split()
    kept = max(1, round(len(TEXT.split()) * tokens / once))
    return " ".join(words[:kept])


def _picture() -> npt.NDArray[np.uint8]:
    """Two gradients and a checkerboard."""
    height, width, _ = PICTURE
    y, x = np.mgrid[:height, :width]
    planes = (255 * y // height, 255 * x // width, 255 * ((y // 40 + x // 40) % 2))
    return np.stack(planes, axis=-1).astype(np.uint8)


# --- the few fields of an ONNX file that are needed (protobuf's wire format) ------------------------------------------


def _of(data: bytes | memoryview, wanted: int) -> Sequence[memoryview]:
    """The messages, texts or bytes of one field."""
    return [value for number, value in _fields(data) if number == wanted and isinstance(value, memoryview)]


def _fields(data: bytes | memoryview) -> Iterator[Field]:
    """(number, value) of each field: an integer, or the bytes of what has a length."""
    view, at = memoryview(data), 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = view[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(view):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            yield number, view[at : at + size]
            at += size
