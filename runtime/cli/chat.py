"""A dialogue on the terminal."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import InputError
from .answer import say

if TYPE_CHECKING:
    from ..engine import Engine
    from ..gate import GatePolicy
    from ..picture_file import ImageLike
    from ..sampling import SamplingConfig
    from ..text import Message
    from ..video import Video


def chat(
    engine: Engine,
    gate: GatePolicy,
    config: SamplingConfig,
    images: list[ImageLike],
    videos: list[Video],
    frames: int,
) -> None:
    """A dialogue on the terminal. Pictures and videos (at most `frames` frames each) go into the next turn.

    A turn that was steered or stopped is forgotten: as part of the dialogue it would make every later turn unsafe.
    """
    from ..conversation import Conversation
    from ..gate import Action
    from ..picture_file import open_image
    from ..text import Message
    from ..video import open_video

    help_text = "Type a message. /image FILE or /video FILE adds to it, /new starts over, Ctrl-D leaves."
    click.echo(help_text, err=True)
    with contextlib.suppress(ImportError):  # input() then edits the line, and has its history
        import readline  # noqa: F401
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
                click.echo(f"error: {err}{' (/new starts over)' if dialogue else ''}", err=True)
            except KeyboardInterrupt:  # ends the answer, not the chat
                click.echo("\n(interrupted; the turn is forgotten)", err=True)
            else:
                if verdict.action is Action.PASS:
                    trusted = not (config.answer_is_judged or (verdict.answer and verdict.answer.unsafe))
                    dialogue += [turn, Message.assistant(text, trusted=trusted)]
                else:
                    click.echo("(the turn is forgotten)", err=True)
                images, videos = [], []


def typed_path(text: str) -> Path:
    """The path that was typed, or that a terminal wrote for a file dropped on it: quoted, or with backslashes. Raises
    InputError for none.
    """
    name = text.strip()
    with contextlib.suppress(ValueError):  # an unclosed quote
        words = shlex.split(text)
        if len(words) == 1 and not os.path.exists(_at_home(name)):
            name = words[0]
    if not name:  # Path("") would be the current folder
        raise InputError("the name of the file is empty")
    return _at_home(name)


def _at_home(name: str) -> Path:
    """A path whose ~ is a home folder; as it is where there is no such user."""
    return Path(os.path.expanduser(name))
