"""autosteer-run: one prompt, or a chat."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..console import debug_option, dumps, json_option, run_command, version_option
from ..errors import InputError
from ..gate import verdict_json
from .answer import answer_json, say, verdict_line
from .chat import chat
from .options import (
    NamedPath,
    audit_option,
    audit_texts_option,
    device_option,
    judge_answers_option,
    load,
    package_argument,
    pieces_option,
    threads_option,
)


@click.command("autosteer-run", context_settings={"help_option_names": ["-h", "--help"]})
@package_argument
@click.option("-p", "--prompt", help="The prompt; '-' reads stdin. Without one, a terminal opens a chat.")
@click.option("-i", "--image", "images", multiple=True, type=NamedPath(), help="An image file; repeatable.")
@click.option(
    "--video",
    "videos",
    multiple=True,
    type=NamedPath(),
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
    type=click.Choice(["steer", "stop", "report", "off"]),
    default="steer",
    show_default=True,
    help="For an unsafe prompt: steer the answer towards a refusal, refuse outright, or only report it; or no gate.",
)
@click.option("--threshold", type=float, help="Unsafe above this p_unsafe. Default: the package's.")
@click.option("--strength", type=float, help="Strength of steering. Default: the package's.")
@pieces_option
@judge_answers_option
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Longest answer.")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="0 is greedy; above 1 the answer is judged before it is shown.",
)
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
    help="Subtracted from the logit of each token already in the answer.",
)
@click.option(
    "--frequency-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Subtracted once for each time that the token is already in the answer.",
)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1 discourages repeats.")
@click.option(
    "--json-schema",
    type=click.File(encoding="utf-8"),
    help="Answer with JSON of the schema in this file ('-': stdin). Unsafe prompts are then stopped, not steered.",
)
@click.option(
    "--regex", help="Answer with a text that this regular expression matches. Unsafe prompts are then stopped."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same text.")
@click.option("--stop", multiple=True, help="End the answer before this string; repeatable.")
@click.option(
    "--speculation/--no-speculation",
    "speculate",
    default=True,
    help="Draft tokens from the prompt and from autosteer-draft's table. Faster. "
    "At int8 and int4 an answer may differ where two tokens are almost equally likely.  [on]",
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
@version_option
def run(
    package: Path,
    prompt: str | None,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    frames: int,
    policy: str,
    threshold: float | None,
    strength: float | None,
    pieces: bool,
    judge_answers: bool | None,
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
    from ..picture_file import open_image
    from ..sampling import SamplingConfig
    from ..text import Message
    from ..video import open_video

    config = SamplingConfig(**sampling, json_schema=json_schema and read_schema(json_schema))
    if score_only and policy == "off":
        raise click.UsageError("--score-only needs a policy that scores; --policy off does not")
    chat_wanted = prompt is None and sys.stdin.isatty() and not as_json and not score_only
    if not chat_wanted and (prompt is None or prompt == "-"):
        if json_schema and getattr(json_schema, "name", "<stdin>") == "<stdin>":
            raise click.UsageError("--json-schema - reads stdin, so the prompt cannot: give it with --prompt TEXT")
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as err:
            raise InputError(f"stdin: the prompt is not valid {sys.stdin.encoding} text ({err})") from err
    if not (chat_wanted or images or videos or (prompt or "").strip()):
        raise InputError("the prompt is empty: give --prompt TEXT, or write it to stdin")
    shown = [open_video(video, frames) for video in videos]
    one_text = prompt is not None and not images and not videos  # no picture will need the image graph
    engine = load(package, device, threads, audit, audit_texts, low_memory=low_memory or one_text, max_tiles=max_tiles)
    gate = engine.policy(policy, threshold=threshold, strength=strength, pieces=pieces, judge_answers=judge_answers)
    if prompt is None:
        engine.grammars.start(config)  # a wrong one would fail at every turn
        chat(engine, gate, config, [open_image(image) for image in images], shown, frames)
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


def run_main() -> None:
    """Entry point of autosteer-run."""
    run_command(run)
