"""From a dialogue to token ids and image slots, and from token ids back to text.

The export took the chat template apart into pieces (PromptSpec). Special tokens enter a prompt only as pieces of the
template. In user text they are plain text, so nobody can forge a turn or an image by typing `<|im_end|>` or `<image>`.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .errors import InputError, PackageError
from .manifest import PromptSpec, TemplatePiece, TurnSpec
from .picture_file import ImageLike
from .video import Video, VideoLike, group_times, moments, open_video


@dataclass(frozen=True)
class Message:
    """One turn: its role and its parts in order, each a text, an image or a video."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]
    # Your program wrote it itself, so the gate does not judge it, unless it is the last. Never a user turn.
    trusted: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.parts, str):
            raise InputError(f"parts = {self.parts!r:.60}: give a tuple of texts, images and videos")
        if not isinstance(self.trusted, bool):
            raise InputError(f"trusted = {self.trusted!r:.60}: give True or False")

    @staticmethod
    def system(text: str, *, trusted: bool = False) -> Message:
        """A system turn. `trusted`: it is your program's own text."""
        return Message("system", (text,), trusted)

    @staticmethod
    def user(text: str, images: Sequence[ImageLike] = (), videos: Sequence[VideoLike] = ()) -> Message:
        """A user turn: images, videos, then a text.

        A video is a file or folder, from which open_video takes frames, or a list of frames, all of which are used: a
        Video, if it is known when each is shown (`videos=[open_video(path)]`). Raises InputError if `images` or
        `videos` is one thing, not a list, and what open_video raises. Files of images are opened when an answer begins.
        """
        for name, given in (("images", images), ("videos", videos)):
            if isinstance(given, (str, bytes, Path, Video)) or not isinstance(given, Sequence):
                raise InputError(f"{name} = {given!r:.60}: give a list of them")
        opened = (open_video(video) if isinstance(video, (str, Path)) else video for video in videos)
        return Message("user", (*map(ImagePart, images), *map(VideoPart.of, opened), text))

    @staticmethod
    def assistant(text: str, *, trusted: bool = False) -> Message:
        """An earlier answer. `trusted`: it came from this engine, as it is, in this dialogue, and no sampling option
        dictated it (SamplingConfig.answer_is_judged).
        """
        return Message("assistant", (text,), trusted)

    @property
    def texts(self) -> list[str]:
        """The turn's texts, in order."""
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def images(self) -> list[ImageLike]:
        """The turn's images, in order."""
        return [part.image for part in self.parts if isinstance(part, ImagePart)]

    @property
    def videos(self) -> list[tuple[ImageLike, ...]]:
        """The frames of the turn's videos, in order."""
        return [video.frames for video in self.video_parts]

    @property
    def video_parts(self) -> list[VideoPart]:
        """The turn's videos with their times, in order."""
        return [part for part in self.parts if isinstance(part, VideoPart)]


@dataclass(frozen=True)
class ImagePart:
    """An image among a turn's parts."""

    image: ImageLike


@dataclass(frozen=True)
class VideoPart:
    """A video among a turn's parts."""

    frames: tuple[ImageLike, ...]
    seconds: tuple[float, ...] = ()  # when each frame is shown; see Video

    @staticmethod
    def of(frames: Sequence[ImageLike]) -> VideoPart:
        """Frames, with their times if they are a Video."""
        return VideoPart(tuple(frames), frames.seconds if isinstance(frames, Video) else ())


Part: TypeAlias = "str | ImagePart | VideoPart"

SPACE = "\u2581"  # SentencePiece's letter for one
# Mark the place of an image, and of a video or a group of its frames, in a rendered prompt.
IMAGE, VIDEO = object(), object()
SLOTS = {"image": IMAGE, "video": VIDEO}  # by TemplatePiece.kind
Rendered = list["list[int] | object"]  # runs of token ids, and IMAGE and VIDEO


def load_tokenizer(path: Path) -> Tokenizer:
    """Load tokenizer.json, with special tokens in text treated as plain text. Raises PackageError if it is damaged."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:  # tokenizers raises plain Exception
        raise PackageError(f"{path}: not a tokenizer ({err})") from err
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@dataclass(frozen=True)
class Place:
    """A place in a rendered prompt: what stands before it."""

    tokens: int  # text tokens
    slots: int  # images, and videos or groups of their frames


@dataclass(frozen=True)
class JudgedTurn:
    """A turn that the prober scores, counted as if the dialogue ended there."""

    content: Place  # where its content begins, behind its prefix
    end: Place  # where its answer would begin, behind the generation prompt
    unlike: int  # of the last tokens before `end`, those that the prompt has otherwise, because the dialogue goes on


def render(messages: Sequence[Message], spec: PromptSpec, tokenizer: Tokenizer, *, generation: bool = True) -> Rendered:
    """Token ids of a dialogue, with IMAGE and VIDEO in the places of images and videos.

    `generation`: add the tokens that open the answer.
    Raises InputError for an empty dialogue, an unknown role, an image or a video in a turn that takes none, a trusted
    user turn, or text that is not valid Unicode.
    """
    return _render(messages, spec, tokenizer, generation)[0]


def render_judged(
    messages: Sequence[Message], spec: PromptSpec, tokenizer: Tokenizer
) -> tuple[Rendered, list[JudgedTurn]]:
    """As `render`, with the turns that the prober scores: all but the trusted ones, and the last in any case."""
    rendered, turns = _render(messages, spec, tokenizer, True)
    return rendered, [turns[n] for n in judged(messages)]


def check_turns(messages: Sequence[Message]) -> None:
    """Raise InputError for a user turn without a word, an image or a video. Other turns may be empty."""
    for message in messages:
        if message.role == "user" and all(isinstance(part, str) and not part.strip() for part in message.parts):
            raise InputError("a user turn is empty: give it a text, or an image or a video")


def judged(messages: Sequence[Message]) -> list[int]:
    """Indices of the turns that the prober scores."""
    return [n for n, message in enumerate(messages) if not message.trusted or n == len(messages) - 1]


def _render(
    messages: Sequence[Message], spec: PromptSpec, tokenizer: Tokenizer, generation: bool
) -> tuple[Rendered, list[JudgedTurn]]:
    if not messages:
        raise InputError("the dialogue is empty")
    writer, ends = _Writer(tokenizer), []
    if messages[0].role != "system":
        writer.write(spec.begin)
    for message in messages:
        turn = {"system": spec.system, "user": spec.user, "assistant": spec.assistant}.get(message.role)
        if turn is None:
            raise InputError(f"this model's prompts have no {message.role!r} turn")
        if message.trusted and message.role == "user":
            raise InputError("a user turn cannot be trusted: it is what the gate judges")
        writer.write(turn.prefix)
        content = writer.place(len(writer.ahead()))
        _write_parts(writer, message, turn, spec)
        writer.write(turn.suffix)
        ends.append((content, writer.place(), writer.ahead(spec.generation)))
    if generation:
        writer.write(spec.generation)
    runs = writer.runs()
    rows = [row for run in runs for row in (run if isinstance(run, list) else [run])]
    return runs, [_judged(content, closed, ahead, rows) for content, closed, ahead in ends]


def _judged(content: Place, closed: Place, ahead: Sequence[int], rows: Sequence[object]) -> JudgedTurn:
    """`ahead`: the tokens between `closed` and the end. `rows`: the whole prompt's token ids, IMAGE and VIDEO."""
    first = closed.tokens + closed.slots
    pairs = enumerate(itertools.zip_longest(ahead, rows[first : first + len(ahead)]))
    same = next((n for n, (as_if, row) in pairs if as_if != row), len(ahead))
    return JudgedTurn(content, Place(closed.tokens + len(ahead), closed.slots), len(ahead) - same)


def _write_parts(writer: _Writer, message: Message, turn: TurnSpec, spec: PromptSpec) -> None:
    parts = list(message.parts)
    if spec.images_first:
        parts.sort(key=lambda part: (isinstance(part, str), isinstance(part, VideoPart)))  # stable
    if parts and isinstance(parts[0], str):
        writer.write(turn.lead)
    for part in parts:
        if isinstance(part, str):
            writer.write(turn.text, part.strip() if spec.strip_text else part)
            continue
        if not isinstance(part, (ImagePart, VideoPart)):
            raise InputError(f"a part of the {message.role!r} turn is no text, image or video: {type(part).__name__}")
        kind, slot = ("image", turn.image) if isinstance(part, ImagePart) else ("video", turn.video)
        if not slot:  # never drop a picture silently, nor move it to another turn
            raise InputError(f"this model's {message.role!r} turns take no {kind}s")
        for piece in slot:
            group = spec.frame_group if piece.kind == "video" else None
            if group is None or not isinstance(part, VideoPart):
                writer.write([piece])
                continue
            for time in group_times(moments(len(part.frames), part.seconds), group.frames):
                writer.write(group.pieces, f"{time:.1f}")


class _Writer:
    """Writes pieces as runs of token ids and slots.

    Adjacent literal and user text are tokenised together, as in the template's own rendering.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._encode = functools.cache(lambda text: _encode(text, tokenizer))  # `ahead` reads, too
        self._runs: Rendered = []
        self._text = ""  # literal and user text since the last token or slot
        self._tokens = self._slots = 0  # in the runs

    def write(self, pieces: Iterable[TemplatePiece], filling: str = "") -> None:
        """Add pieces; `filling` is the text of those of kind `text` or `seconds`."""
        for piece in pieces:
            if piece.kind in ("literal", "text", "seconds"):
                self._text += piece.text if piece.kind == "literal" else filling
                continue
            self._close_text()
            if piece.kind == "token":
                self._add([piece.id])
            else:
                self._runs.append(SLOTS[piece.kind])
                self._slots += 1

    def place(self, ahead: int = 0) -> Place:
        """The place `ahead` tokens behind the last token or slot."""
        return Place(self._tokens + ahead, self._slots)

    def ahead(self, more: Iterable[TemplatePiece] = ()) -> list[int]:
        """The tokens behind that place, if the prompt ended with `more`, which has no slots."""
        ids, text = list[int](), self._text
        for piece in more:
            if piece.kind == "literal":
                text += piece.text
                continue
            ids, text = [*ids, *self._encode(text), piece.id], ""
        return [*ids, *self._encode(text)]

    def runs(self) -> Rendered:
        """All that was written."""
        self._close_text()
        return self._runs

    def _close_text(self) -> None:
        if self._text:
            self._add(self._encode(self._text))
        self._text = ""

    def _add(self, ids: Sequence[int]) -> None:
        self._tokens += len(ids)
        last = self._runs[-1] if self._runs else None
        if isinstance(last, list):
            last.extend(ids)
        else:
            self._runs.append(list(ids))


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except (UnicodeEncodeError, TypeError) as err:  # a lone surrogate, as from a badly decoded argument
        raise InputError("the prompt is not valid Unicode text") from err
    except BaseException as err:
        if type(err).__name__ != "PanicException":  # of tokenizers, which exports no such name
            raise
        raise InputError("the prompt is too much for the tokenizer's regular expression") from err
    return ids


class _FallbackStream:
    """tokenizers' DecodeStream for SentencePiece's BPE with byte fallback.

    DecodeStream raises for byte tokens that are no character behind others that are one. Here, as for byte-level BPE,
    what is no character becomes U+FFFD. The first space of an answer is dropped where the decoder strips it.
    """

    def __init__(self, tokenizer: Tokenizer, strips: bool):
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes = b""  # of an incomplete character
        self._strips = strips

    def step(self, tokenizer: Tokenizer, token: int) -> str | None:
        """The text that `token` completes."""
        piece = "" if token in self._special else tokenizer.id_to_token(token) or ""
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        self._bytes += bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()
        if self._strips and self._bytes:
            self._bytes, self._strips = self._bytes.removeprefix(b" "), False
        text = self._bytes.decode(errors="replace")
        if text.endswith("\ufffd"):
            return None
        self._bytes = b""
        return text


def _decode_stream(tokenizer: Tokenizer) -> DecodeStream | _FallbackStream:
    steps = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    kinds = {step["type"] for step in steps.get("decoders", ())}
    return (
        _FallbackStream(tokenizer, "Strip" in kinds)
        if "ByteFallback" in kinds
        else DecodeStream(skip_special_tokens=True)
    )


class Detokeniser:
    """Turns token ids into text as they come. Emits whole characters only, and no part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._stream = _decode_stream(tokenizer)
        self._stop = stop
        self._held = ""  # text that may be the start of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` completes; sets `stopped` once a stop string is complete."""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [i for i in (self._held.find(stop) for stop in self._stop) if i >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def flush(self) -> str:
        """The text held back, if the answer ends without a stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
