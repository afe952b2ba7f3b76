"""autosteer-run, autosteer-check, autosteer-bench. Answers go to stdout; verdicts, timings and progress to stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .console import debug_option, dumps, json_option, run_command, table
from .errors import CheckError, InputError

if TYPE_CHECKING:  # onnxruntime and numpy load when a command runs, so that --help is quick
    from .conversation import Conversation
    from .engine import Chunk, Engine
    from .gate import GatePolicy, Verdict, Watched
    from .generation import Stats
    from .image import ImageLike
    from .sampling import SamplingConfig
    from .text import Message
    from .video import Video

MAX_THREADS = 1024  # more is taken for a typing error

F = TypeVar("F", bound=Callable[..., Any])

device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run."
)
threads_option = click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads. Default: all cores.")


class PackagePath(click.ParamType):  # type: ignore[type-arg]  # older versions of click have no argument
    """A package's folder, or `hf:owner/name[@revision]`, which is downloaded."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """See hub.package_folder."""
        from .hub import package_folder

        return package_folder(str(value))


package_argument = click.argument("package", type=PackagePath())
audit_option = click.option(
    "--audit",
    type=click.Path(path_type=Path),
    help="Append a line of JSON to this file for each request: verdict, digests, counts. No line, no answer.",
)
audit_texts_option = click.option(
    "--audit-texts", is_flag=True, help="In these lines, the words of prompts and answers, too."
)


def load(
    package: Path,
    device: Any,
    threads: int | None,
    audit: Path | None = None,
    audit_texts: bool = False,
    **options: Any,
) -> Engine:
    """Load a package, with log lines on stderr. `options`: more of Engine.load's."""
    if audit_texts and audit is None:
        raise click.UsageError("--audit-texts needs --audit FILE")
    import logging

    from .engine import Engine

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("autosteer").setLevel(logging.INFO)
    return Engine.load(package, device=device, threads=threads, audit=audit, audit_texts=audit_texts, **options)


# --- autosteer-run ---------------------------------------------------------------------------------------------------


@click.command("autosteer-run", context_settings={"help_option_names": ["-h", "--help"]})
@package_argument
@click.option("-p", "--prompt", help="The prompt; '-' reads stdin. Without one, a terminal opens a chat.")
@click.option(
    "-i", "--image", "images", multiple=True, type=click.Path(path_type=Path), help="An image file; repeatable."
)
@click.option(
    "--video",
    "videos",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An MP4 or another file that ffmpeg reads, an animated GIF, WebP, PNG or TIFF, or a folder of pictures, "
    "ordered by name; repeatable.",
)
@click.option(
    "--frames",
    type=click.IntRange(min=1),
    default=8,  # video.FRAMES, without loading numpy
    show_default=True,
    help="Number of frames to take from a longer video, evenly spaced.",
)
@click.option(
    "--policy",
    type=click.Choice(["steer", "stop", "monitor", "off"]),
    default="steer",
    show_default=True,
    help="For an unsafe prompt: steer the answer towards a refusal, refuse outright, or only report it; or no gate.",
)
@click.option("--threshold", type=float, help="Unsafe above this p_unsafe. Default: the package's.")
@click.option("--strength", type=float, help="Strength of steering. Default: the package's.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, help="Sample from the k most likely tokens.  [0: all]")
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens with this total probability.",
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    show_default=True,
    help="Sample from tokens with this share of the likeliest one's probability.",
)
@click.option(
    "--presence-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Taken from the logits of tokens that the answer has.",
)
@click.option(
    "--frequency-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Taken from them for each time that the answer has them.",
)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1 discourages repeats.")
@click.option(
    "--json-schema",
    type=click.File(encoding="utf-8"),
    help="Answer with JSON of the schema in this file ('-': stdin). Unsafe prompts are then stopped, not steered.",
)
@click.option("--regex", help="Answer with a text that this regular expression matches; the same holds.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same text.")
@click.option("--stop", multiple=True, help="End the answer before this string; repeatable.")
@click.option(
    "--speculation/--no-speculation",
    "speculate",
    default=True,
    help="Draft what the answer copies from the prompt. Faster. Near ties may differ at int8 and int4.  [on]",
)
@click.option("--score-only", is_flag=True, help="Print the verdict on the prompt and answer nothing.")
@click.option("--max-tiles", type=click.IntRange(min=1), help="Cut a picture into at most this many tiles.  [no limit]")
@click.option("--low-memory", is_flag=True, help="Load the image graph for each picture, and drop it afterwards.")
@audit_option
@audit_texts_option
@device_option
@threads_option
@json_option
@debug_option
def run(
    package: Path,
    prompt: str | None,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    frames: int,
    policy: str,
    threshold: float | None,
    strength: float | None,
    score_only: bool,
    max_tiles: int | None,
    low_memory: bool,
    audit: Path | None,
    audit_texts: bool,
    device: Any,
    threads: int | None,
    as_json: bool,
    json_schema: Any,
    **sampling: Any,
) -> None:
    """Answer a prompt with the model in PACKAGE, guarded by its gate.

    PACKAGE is a folder made by autosteer-export, or hf:owner/name[@revision] on the Hugging Face hub.
    """
    from .sampling import SamplingConfig
    from .text import Message
    from .video import open_video

    config = SamplingConfig(**sampling, json_schema=json_schema and read_schema(json_schema))
    if score_only and policy == "off":
        raise click.UsageError("--score-only needs a policy that scores; --policy off does not")
    chat_wanted = prompt is None and sys.stdin.isatty() and not as_json and not score_only
    if not chat_wanted and (prompt is None or prompt == "-"):
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as err:
            raise InputError(f"stdin: the prompt is not valid {sys.stdin.encoding} text ({err})") from err
    if prompt is not None and not prompt.strip():
        raise InputError("the prompt is empty")
    shown = [open_video(video, frames) for video in videos]
    one_text = prompt is not None and not images and not videos  # no picture will need the image graph
    engine = load(package, device, threads, audit, audit_texts, low_memory=low_memory or one_text, max_tiles=max_tiles)
    gate = engine.policy(policy, threshold=threshold, strength=strength)
    if prompt is None:
        chat(engine, gate, config, list(images), shown, frames)
        return
    message = Message.user(prompt, images, shown)
    if score_only:
        verdict = engine.score([message], policy=gate)
        click.echo(dumps(verdict_json(verdict)) if as_json else verdict_line(verdict))
    elif as_json:
        answer = engine.generate([message], sampling=config, policy=gate)
        click.echo(dumps(answer_json(answer)))
    else:
        say(engine, [message], gate, config)


def read_schema(file: Any) -> dict[str, Any]:
    """The JSON object in an open file. Raises InputError if there is none."""
    try:
        schema = json.load(file)
    except (ValueError, RecursionError) as err:
        raise InputError(f"{file.name}: not JSON ({err})") from err
    if not isinstance(schema, dict):
        raise InputError(f"{file.name}: a schema is a JSON object")
    return schema


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
    if seen := last.verdict.monitor:
        click.echo(monitor_line(seen, last.verdict), err=True)
    click.echo(stats_line(last, last.stats), err=True)
    return text, last.verdict


def chat(
    engine: Engine,
    gate: GatePolicy,
    config: SamplingConfig,
    images: list[ImageLike],
    videos: list[Video],
    frames: int,
) -> None:
    """A dialogue on the terminal. Pictures and videos (at most `frames` frames each) go into the next answered turn.

    A turn that was steered or stopped is forgotten: as part of the dialogue it would make every later turn unsafe.
    """
    from .conversation import Conversation
    from .gate import Action
    from .image import open_image
    from .text import Message
    from .video import open_video

    help_text = "Type a message. /image FILE or /video FILE adds to it, /new starts over, Ctrl-D leaves."
    click.echo(help_text, err=True)
    dialogue: list[Message] = []
    conversation = Conversation(engine)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo("", err=True)
            return
        command, _, rest = line.partition(" ")
        if command in ("/image", "/video"):
            try:  # open it now, so that a mistyped name does not fail every later turn
                if command == "/video":
                    if engine.manifest.video is None:
                        raise InputError("this model takes no videos")
                    videos.append(open_video(typed_path(rest), frames))
                else:
                    if engine.manifest.image is None:
                        raise InputError("this model takes no images")
                    open_image(typed_path(rest))
                    images.append(typed_path(rest))
            except InputError as err:
                click.echo(f"error: {err}", err=True)
        elif command == "/new":
            dialogue, images, videos, conversation = [], [], [], Conversation(engine)
        elif line.startswith("/"):
            click.echo(help_text if command == "/help" else f"{command}: not a command. {help_text}", err=True)
        elif line:
            turn = Message.user(line, images, videos)
            try:
                text, verdict = say(engine, [*dialogue, turn], gate, config, conversation)
            except InputError as err:  # the chat goes on after a prompt that does not fit
                click.echo(f"error: {err}", err=True)
            except KeyboardInterrupt:  # ends the answer, not the chat
                click.echo("\n(interrupted; the turn is forgotten)", err=True)
            else:
                if verdict.action is Action.PASS:
                    dialogue += [turn, Message.assistant(text, trusted=True)]
                else:
                    click.echo("(the turn is forgotten)", err=True)
                images, videos = [], []


def typed_path(text: str) -> Path:
    """The path that was typed, or that a terminal wrote for a file dropped on it: quoted, or with backslashes."""
    path = _at_home(text.strip())
    with contextlib.suppress(ValueError):  # an unclosed quote
        words = shlex.split(text)
        if len(words) == 1 and not os.path.exists(path):
            return _at_home(words[0])
    return path


def _at_home(name: str) -> Path:
    """A path whose ~ is a home folder; as it is where there is no such user."""
    return Path(os.path.expanduser(name))


def verdict_line(verdict: Verdict) -> str:
    """[STEER  p_unsafe 0.993 > 0.500 at layer 6, strength 0.1]"""
    if verdict.p_unsafe is None:
        return "[no gate: --policy off]"
    above = ">" if verdict.p_unsafe > verdict.threshold else "is no probability; limit"
    relation = above if verdict.unsafe else "<="
    line = f"[{verdict.action.value.upper()}  p_unsafe {verdict.p_unsafe:.3f} {relation} {verdict.threshold:.3f}"
    line += f" at layer {verdict.split_layer}"
    if verdict.action.value == "steer":
        line += f", strength {verdict.strength:g}"
    if verdict.unsafe and verdict.mode.value == "monitor":
        line += "; unsafe, but --policy monitor only watches"
    return line + "]"


def monitor_line(seen: Watched, verdict: Verdict) -> str:
    """[ANSWER STOPPED  p_unsafe 0.931 > 0.700 in a window]"""
    above = ">" if seen.p_unsafe > seen.threshold else "is no probability; limit"
    line = "[ANSWER STOPPED" if verdict.action.value == "stop" else "[ANSWER"
    line += f"  p_unsafe {seen.p_unsafe:.3f} {above if seen.unsafe else '<='} {seen.threshold:.3f} in a window"
    if seen.unsafe and verdict.mode.value == "monitor":
        line += "; unsafe, but --policy monitor only watches"
    return line + "]"


def stats_line(last: Chunk, stats: Stats) -> str:
    """[52 + 7 tokens, first after 31 ms (vision 20, lower 6, gate 0.1, upper 4), then 410 tok/s, on
    CPUExecutionProvider]
    """
    upper = "decoder_upper never ran" if stats.upper_ms is None else f"upper {stats.upper_ms:.0f}"
    stages = f"vision {stats.vision_ms:.0f}, lower {stats.lower_ms:.0f}, gate {stats.gate_ms:.1f}, {upper}"
    speed = f", then {stats.decode_tok_s:.0f} tok/s" if stats.decode_tok_s else ""
    first = f"first after {stats.ttft_ms:.0f} ms ({stages})"
    reused = f" ({stats.reused_tokens} known)" if stats.reused_tokens else ""
    drafted = f" ({stats.accepted_tokens} of {stats.drafted_tokens} drafts held)" if stats.drafted_tokens else ""
    tokens = f"{stats.prompt_tokens}{reused} + {stats.completion_tokens}{drafted} tokens"
    return f"[{tokens}, {first}{speed}, {last.finish_reason}, on {stats.device}]"


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """What --json prints of a verdict."""
    return dataclasses.asdict(verdict) | {"action": verdict.action.value, "mode": verdict.mode.value}


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


# --- autosteer-check -------------------------------------------------------------------------------------------------


@click.command("autosteer-check", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("package", required=False, type=PackagePath())
@click.option("--host", is_flag=True, help="Print what this machine is, and how to install the runtime; then exit.")
@device_option
@threads_option
@json_option
@debug_option
def check(package: Path | None, host: bool, device: Any, threads: int | None, as_json: bool) -> None:
    """Verify the files of PACKAGE and replay its golden prompts on this machine.

    Compares every file with its hash, every graph with the manifest, and every answer with the recorded one.
    """
    from .check import about_pictures, check_package
    from .host import describe_host

    if host:
        facts = describe_host()
        click.echo(dumps(facts) if as_json else "\n".join(f"{key:12} {value}" for key, value in facts.items()))
        return
    if package is None:
        raise click.UsageError("give a PACKAGE, or --host")
    engine = load(package, device, threads)  # checks hashes, graphs and the gate's proof
    results = check_package(engine, package)
    if as_json:
        click.echo(dumps({"package": str(package), "checks": [dataclasses.asdict(r) for r in results]}))
    else:
        rows = [
            (r.name, f"{r.value:g}", "" if r.limit is None else f"{r.limit:g}", "ok" if r.passed else "FAILED")
            for r in results
        ]
        click.echo(table(("check", "value", "limit", ""), rows))
    if failed := [r.name for r in results if not r.passed]:
        raise CheckError(
            f"{package}: {', '.join(failed)}: not as on the exporting machine; do not deploy this package here"
            f"{about_pictures(engine, package)}"
        )


# --- autosteer-bench -------------------------------------------------------------------------------------------------


@click.command("autosteer-bench", context_settings={"help_option_names": ["-h", "--help"]})
@package_argument
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of text in a prompt, about."
)
@click.option("--new-tokens", type=click.IntRange(3), default=64, show_default=True, help="Of an answer.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="The medians are printed.")
@device_option
@threads_option
@json_option
@debug_option
def bench(
    package: Path, prompt_tokens: int, new_tokens: int, rounds: int, device: Any, threads: int | None, as_json: bool
) -> None:
    """Measure PACKAGE on this machine: the first token by stages, decoding, memory, and what the gate costs.

    PACKAGE is a folder made by autosteer-export, or hf:owner/name[@revision] on the Hugging Face hub. No answer is
    printed.
    """
    from .bench import bench as measure

    engine = load(package, device, threads)
    found = measure(engine, package, tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    click.echo(dumps(found) if as_json else bench_text(found))


def bench_text(found: dict[str, Any]) -> str:
    """A table with a column for each prompt, and a line about the machine."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.3g} %"

    cases = found["cases"]
    rows = [("prompt, tokens", [str(case["prompt_tokens"]) for case in cases])]
    for stage in cases[0]["first_token_ms"]:
        name = "first token" if stage == "total" else f"  {stage}"
        rows.append((f"{name}, ms", [f"{case['first_token_ms'][stage]:.3g}" for case in cases]))
    rows += [
        ("gate, of the first token", [percent(case["gate_share"]) for case in cases]),
        ("decode, tok/s", [f"{1000 / case['decode_ms']:.3g}" for case in cases]),
        ("steering, of a step", [percent(case["steering_share"]) for case in cases]),
        ("of the memory's bandwidth", [percent(case["read_share"]) for case in cases]),
    ]
    rows += [
        (f"{together['answers']} together, tok/s", [f"{together['tok_s']:.3g}", *[""] * (len(cases) - 1)])
        for together in found["together"][1:]
    ]
    memory, machine = found["peak_memory_mib"], found["machine"]
    used = "" if memory is None else f", {memory:.0f} MiB at most"
    return "\n".join(
        [
            table(("", *(case["prompt"] for case in cases)), [(name, *values) for name, values in rows]),
            f"{found['precision']} on {found['device']}, {found['threads']} threads{used}; "
            f"{machine['cpu']}, {found['read_gb_s']:.3g} GB/s read; onnxruntime {machine['onnxruntime']}",
        ]
    )


def bench_main() -> None:
    """Entry point of autosteer-bench."""
    run_command(bench)


def run_main() -> None:
    """Entry point of autosteer-run."""
    run_command(run)


def check_main() -> None:
    """Entry point of autosteer-check."""
    run_command(check)
