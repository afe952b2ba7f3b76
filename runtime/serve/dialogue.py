"""A body's messages -> the engine's, with pictures from data URLs.

What does not fit the limits is refused when a request comes in, from the headers of its pictures. Pixels are decoded
in the request's turn, so that requests that wait hold no more memory than their bodies.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, UnidentifiedImageError

from ..arrays import Uint8
from ..errors import InputError, first_line
from ..picture_file import FORMATS as FILE_FORMATS
from ..picture_file import MAX_PIXELS, check_shape, open_content, to_rgb
from ..text import ImagePart, Message, VideoPart
from .faults import ApiError
from .limits import Limits
from .protocol import ChatMessage, Item, OnePart

FORMATS = tuple(name for name in FILE_FORMATS if name != "TIFF")  # its many decoders are not for strangers
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Picture:
    """A picture whose header was read and whose pixels were not."""

    where: str  # its path in the body
    data: bytes

    def open(self) -> Uint8:
        """Its pixels, RGB (H, W, 3) uint8. Raises InputError for a picture that is damaged, or of an extreme shape."""
        try:
            with open_content(self.data, FORMATS) as opened:
                check_shape(opened.size)
                return to_rgb(opened)
        except Exception as err:  # on damaged files Pillow's decoders raise any exception
            raise InputError(f"{self.where}: not a readable picture ({first_line(err)})") from err


@dataclass(frozen=True)
class Clip:
    """A video: its frames, and when each is shown."""

    frames: tuple[Picture, ...]
    seconds: tuple[float, ...]


Part = str | Picture | Clip


@dataclass(frozen=True)
class Turn:
    """A message before its pictures are opened."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    def open(self) -> Message:
        """The engine's message, whose pictures the engine opens, one at a time."""
        return Message(self.role, tuple(map(_open, self.parts)))

    def digest(self, earlier: bytes) -> bytes:
        """SHA-256 of this turn and the turns before it, whose digest is `earlier`."""
        sha = hashlib.sha256(earlier + self.role.encode())
        for part in self.parts:
            pieces: tuple[str | Picture, ...] = (
                (*part.frames, repr(part.seconds)) if isinstance(part, Clip) else (part,)
            )
            for piece in pieces:
                data = piece.encode() if isinstance(piece, str) else piece.data
                sha.update(f"{type(part).__name__} {len(data)}:".encode() + data)
        return sha.digest()


def _open(part: Part) -> str | ImagePart | VideoPart:
    if isinstance(part, str):
        return part
    if isinstance(part, Picture):
        return ImagePart(part.open)
    return VideoPart(tuple(frame.open for frame in part.frames), part.seconds)


def digests(turns: Sequence[Turn]) -> list[bytes]:
    """The digest of each beginning of a dialogue: of its first turn, of its first two, and so on."""
    found = [b""]
    for turn in turns:
        found.append(turn.digest(found[-1]))
    return found[1:]


class Reader:
    """Reads the messages of one request, and counts its pictures and frames against the limits."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._pictures = self._frames = 0

    def messages(self, messages: Sequence[ChatMessage | Item], where: str) -> list[Turn]:
        """The turns of a body's messages; a refused answer's text is its refusal.

        Raises ApiError 400 or 413 for a picture that is none, or beyond the limits.
        """
        turns = []
        for n, message in enumerate(messages):
            parts = [self.part(part, f"{where}[{n}].content[{i}]") for i, part in enumerate(message.content)]
            if isinstance(message, ChatMessage) and message.refusal is not None:
                parts.append(message.refusal)
            turns.append(Turn(ROLES[message.role], tuple(parts)))
        return turns

    def part(self, part: OnePart, where: str) -> Part:
        """A text, a picture, or the frames of a video."""
        if part.frames is not None:
            self._frames += len(part.frames)
            _within(self._frames, self._limits.max_frames, "frames of videos", f"{where}.video")
            frames = tuple(self._picture(url, f"{where}.video[{i}]") for i, url in enumerate(part.frames))
            return Clip(frames, tuple(part.moments))
        if part.picture is not None:
            self._pictures += 1
            _within(self._pictures, self._limits.max_images, "pictures", f"{where}.image_url")
            return self._picture(part.picture, f"{where}.image_url")
        return (part.text if part.refusal is None else part.refusal) or ""

    def _picture(self, url: str, where: str) -> Picture:
        data = _data_of(url, where)
        try:
            with open_content(data, FORMATS) as opened:
                width, height = opened.size
        except Image.DecompressionBombError:  # of more pixels than Pillow opens, by its header
            most = min(self._limits.max_megapixels, MAX_PIXELS / 1e6)
            raise ApiError(
                413,
                f"{where}: a picture of far too many pixels; this server takes {most:g} million",
                param=where,
                code="picture_too_large",
            ) from None
        except Exception as err:
            why = "" if isinstance(err, UnidentifiedImageError) else f" ({err})"  # it has an address in memory
            raise ApiError(
                400, f"{where}: no {', '.join(FORMATS)} picture{why}", param=where, code="invalid_value"
            ) from None
        if width * height > self._limits.max_megapixels * 1e6:
            raise ApiError(
                413,
                f"{where}: a picture of {width}x{height} pixels; this server takes "
                f"{self._limits.max_megapixels:g} million",
                param=where,
                code="picture_too_large",
            )
        return Picture(where, data)


def _data_of(url: str, where: str) -> bytes:
    """The bytes in a data URL. Raises ApiError 400 for any other URL: this server fetches nothing."""
    head, comma, payload = url.partition(",")
    head = head.lower()
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise ApiError(
            400,
            f"{where}: give the picture itself, as data:image/png;base64,...; this server fetches no addresses",
            param=where,
            code="unsupported_image_url",
        )
    try:
        return base64.b64decode(payload.replace("\r", "").replace("\n", ""), validate=True)  # `base64` writes lines
    except (binascii.Error, ValueError) as err:
        raise ApiError(400, f"{where}: damaged base64 ({err})", param=where, code="invalid_value") from None


def _within(count: int, limit: int, what: str, where: str) -> None:
    if count > limit:
        raise ApiError(
            413, f"{where}: more than {limit} {what} in a request", param=where, code=f"too_many_{what.split()[0]}"
        )
