"""Take a chat template apart, once, at export: the device never sees Jinja.

The processor renders a few dialogues around marker texts; differences between the renderings are the pieces. The
pieces are then rendered by the *runtime's* code and compared, token by token, with what Hugging Face's processor makes
of other dialogues.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
from PIL import Image
from transformers.utils import chat_template_utils

from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.image import cut
from autosteer.runtime.manifest import FrameGroup, ImageSpec, PromptSpec, TemplatePiece, TileSeparators, TurnSpec
from autosteer.runtime.text import IMAGE, VIDEO, ImagePart, Message, VideoPart, load_tokenizer, render
from autosteer.runtime.video import group_times

from .renderer import (
    FIRST,
    FRAME_SECONDS,
    REPLY,
    SECOND,
    SYSTEM,
    Renderer,
    around_text,
    hf_messages,
    inserted,
    runtime_tokenizer,
)

DAYS = datetime(2001, 2, 3, 4, 5, 6), datetime(2032, 11, 29, 18, 47, 58)  # they differ in every field


def image_frames(processor: Any, spec: ImageSpec) -> tuple[TileSeparators, ...]:
    """ImageSpec.tile_separators: what the processor writes around and between the tiles of an image, for each grid that
    the runtime may cut one into. None where it writes nothing.
    """
    renderer = Renderer(processor)

    def look(width: int, height: int) -> TileSeparators:
        picture = Image.new("RGB", (width, height))
        tiles, grid = cut(np.asarray(picture), spec, alone=True)
        frame = TileSeparators(grid, tuple(map(tuple, renderer.frame(picture))))
        runs = 1 if spec.anyres or spec.closest_grid else len(tiles)
        if any(frame.token_ids) and len(frame.token_ids) != runs + 1:
            raise UnsupportedModelError(
                f"the processor makes {len(frame.token_ids) - 1} runs of image tokens of {len(tiles)} tiles "
                f"({spec.kind})"
            )
        return frame

    square = look(32, 32)
    side = square.grid[0]  # the longest side determines how many tiles there are along it
    sizes = [(32 * side, 32 * k - 16) for k in range(1, side + 1)]
    found = (
        [square, *(look(*size) for size in sizes), *(look(*reversed(size)) for size in sizes)] if side > 1 else [square]
    )
    frames = {frame.grid: frame for frame in found}
    return tuple(frames.values()) if any(any(frame.token_ids) for frame in found) else ()


def save_tokenizer(processor: Any, folder: Path, never_typed: tuple[int, ...] = ()) -> None:
    """Write `folder`/tokenizer.json. What a prompt's frame is made of is special there, and so nothing that a user can
    type (checkpoints may list it among ordinary added tokens), and so are those of `never_typed` that are added tokens.
    """
    names = {*Renderer(processor).special_tokens, *processor.tokenizer.convert_ids_to_tokens(list(never_typed))}
    data = runtime_tokenizer(processor.tokenizer)
    for token in data["added_tokens"]:
        token["special"] |= token["content"] in names
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def take_apart(
    processor: Any, end_token_ids: tuple[int, ...], folder: Path, video_token: str | None = None, group: int = 1
) -> PromptSpec:
    """PromptSpec of a Hugging Face processor, checked against it. `folder` holds the tokenizer.json the runtime will
    read; `video_token` is given where the model takes videos, `group` is how many frames its image graph reads as one.

    Raises UnsupportedModelError where the template does more than the pieces can say.
    """
    renderer = Renderer(processor, video_token)

    def split(text: str) -> tuple[TemplatePiece, ...]:
        return _pieces(text, renderer)

    one = renderer.turns(("user", FIRST))
    two = renderer.turns(("user", FIRST), ("assistant", REPLY))
    three = renderer.turns(("user", FIRST), ("assistant", REPLY), ("user", SECOND))
    user = _after(three, two).replace(SECOND, FIRST)
    begin = one.removesuffix(user)
    if begin == one and user:
        raise UnsupportedModelError("the chat template writes the first user turn unlike later ones")
    image, lead = _part(renderer, "image") if renderer.image_token else ("", "")
    video, _ = _part(renderer, "video") if renderer.video_token else ("", "")
    spec = PromptSpec(
        begin=split(begin),
        system=_system_turn(renderer, split, user),
        user=_turn(split, user, FIRST, image=image, video=video, lead=lead, around=around_text(renderer)),
        assistant=_turn(split, _after(two, one), REPLY),
        generation=split(_after(renderer.turns(("user", FIRST), generation=True), one)),
        images_first=_images_first(renderer) if renderer.image_token else False,
        strip_text=_strips(renderer),
        end_token_ids=end_token_ids,
        frame_group=_frame_group(renderer, group),
    )
    _refuse_what_changes(renderer, three)
    check(spec, renderer, folder)
    return spec


def check(spec: PromptSpec, renderer: Renderer, folder: Path) -> None:
    """Compare the runtime's rendering with Hugging Face's on dialogues that the pieces were not made from.

    Also: text that looks like a special token must not become one.
    """
    tokenizer = load_tokenizer(folder / spec.tokenizer)
    image, video = ImagePart("unused"), VideoPart(("unused",) * len(FRAME_SECONDS), FRAME_SECONDS)
    dialogues: list[list[Message]] = [
        [Message.user("Hello!")],
        [Message.user("two\nlines, ünïcode 漢字 ")],
        [Message.user("one"), Message.assistant("An answer."), Message.user("and 2?")],
    ]
    if renderer.image_token:
        dialogues += [
            [Message("user", (image, "what is this?"))],
            [Message("user", (image, image, "compare"))],
            [Message("user", ("first", image, "then", image, "compare"))],
            [Message("user", (image, "a")), Message.assistant("b"), Message.user("c")],
        ]
    if renderer.video_token:
        dialogues += [
            [Message("user", (video, "what happens?"))],
            [Message("user", (video, video, "compare"))],
            [Message("user", ("first", video, "then", image, "compare"))],
            [Message("user", (video, "a")), Message.assistant("b"), Message("user", (image, video, "c"))],
        ]
    if spec.system:
        dialogues += [[Message("system", ("Be kind.",)), Message.user("hi")]]
    ids = {IMAGE: renderer.image_id, VIDEO: renderer.video_id}
    for dialogue in dialogues:
        for generation in (False, True):
            text = renderer.template(hf_messages(dialogue), generation=generation)
            counts = {"images": sum(len(m.images) for m in dialogue), "videos": sum(len(m.videos) for m in dialogue)}
            expected = renderer.ids(text, **counts)
            ours = render(dialogue, spec, tokenizer, generation=generation)
            flat = [i for run in ours for i in (run if isinstance(run, list) else [ids[run]])]
            if flat != expected:
                raise UnsupportedModelError(
                    f"the chat template cannot be taken apart: {text!r} is {expected} in Hugging Face, {flat} in pieces"
                )
    specials = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    reserved = {*specials.values(), *_template_ids(spec)}
    for forged in specials:
        if reserved & set(tokenizer.encode(forged, add_special_tokens=False).ids):
            raise UnsupportedModelError(f"the tokenizer turns the user's text {forged!r} into a special token")


def _template_ids(spec: PromptSpec) -> tuple[int, ...]:
    """Token ids that only the template may produce, besides the tokenizer's special tokens."""
    pieces = (*spec.begin, *spec.user.prefix, *spec.user.suffix, *spec.assistant.suffix, *spec.generation)
    return (*spec.end_token_ids, *(p.id for p in pieces if p.kind == "token"))


def generation_length(spec: PromptSpec, folder: Path) -> int:
    """Tokens of the generation prompt: the distance from the last token without it to the end of the full prompt."""
    tokenizer = load_tokenizer(folder / spec.tokenizer)
    dialogue = [Message.user("x")]
    with_it, without = (
        sum(len(run) for run in render(dialogue, spec, tokenizer, generation=g) if isinstance(run, list))
        for g in (True, False)
    )
    return with_it - without


def _strips(renderer: Renderer) -> bool:
    """Whether the template strips white space around texts. The manifest has one setting for all roles."""
    dialogues = {"user": [("user", FIRST)], "assistant": [("user", FIRST), ("assistant", REPLY), ("user", SECOND)]}
    found: dict[str, bool] = {}
    for role, turns in dialogues.items():
        marker = {"user": FIRST, "assistant": REPLY}[role]
        plain = renderer.turns(*turns)
        padded = renderer.turns(*((who, text.replace(marker, f" \n{marker} \n")) for who, text in turns))
        found[role] = padded == plain
        if padded not in (plain, plain.replace(marker, f" \n{marker} \n")):
            raise UnsupportedModelError(f"the chat template changes white space inside the {role}'s turns")
    if found["user"] != found["assistant"]:
        which, other = sorted(found, key=lambda role: not found[role])
        raise UnsupportedModelError(
            f"the chat template strips white space around the {which}'s texts and not around the {other}'s; "
            "make it do the same for both"
        )
    return found["user"]


def _refuse_what_changes(renderer: Renderer, three: str) -> None:
    """Raise UnsupportedModelError where the template leaves out parts of earlier answers, or writes what day it is.

    `three` is its rendering of the turns FIRST, REPLY and SECOND.
    """
    for opening, closing in (("<think>", "</think>"), ("[THINK]", "[/THINK]")):
        thinking = f"{opening}why{closing}{REPLY}"
        text = renderer.turns(("user", FIRST), ("assistant", thinking), ("user", SECOND))
        if text != three.replace(REPLY, thinking):
            raise UnsupportedModelError(
                f"the chat template leaves out what earlier answers thought ({opening}...{closing}), so a dialogue is "
                "not written as it was read; give the checkpoint a template that leaves answers as they are"
            )
    dialogues = [[("user", FIRST)], [("system", SYSTEM), ("user", FIRST)]]
    for turns in dialogues:
        try:
            some_day, another = (_rendered_on(day, renderer, turns) for day in DAYS)
        except Exception:  # templates raise any exception for a role that they do not support
            continue
        if some_day != another:
            raise UnsupportedModelError(
                "the chat template writes today's date (strftime_now); a package would write that of its export for "
                "ever; set a fixed date in the template, as {% set date_string = '26 Jul 2024' %}"
            )


def _rendered_on(day: datetime, renderer: Renderer, turns: list[tuple[str, str]]) -> str:
    """Render turns as on the date `day`: Hugging Face's `strftime_now` uses `datetime`."""

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return day

    with patch.object(chat_template_utils, "datetime", Then):
        return renderer.turns(*turns, generation=True)


def _after(longer: str, shorter: str) -> str:
    if not longer.startswith(shorter):
        raise UnsupportedModelError("the chat template rewrites earlier turns when the dialogue grows")
    return longer[len(shorter) :]


def _part(renderer: Renderer, kind: Literal["image", "video"]) -> tuple[str, str]:
    """What one image (or video) adds to a turn, found by comparing two with one; and what a turn without them has where
    they would be ("User: hi", but "User:<image>hi").
    """
    counts: list[dict[str, Any]] = [{kind: n} for n in range(4)]
    none, one, two, three = (renderer.turns(("user", FIRST), **count) for count in counts)
    added = inserted(one, two)
    if added not in one or added * 3 not in three:
        raise UnsupportedModelError(f"the chat template writes a second {kind} unlike the first")
    return added, inserted(one.replace(added, ""), none)


def text_lead(renderer: Renderer) -> str:
    """What the template writes between the opening of a turn without pictures and its text. It counts with the text:
    the first word and a blank before it may be one token.
    """
    _, lead = _part(renderer, "image") if renderer.image_token else ("", "")
    return lead + around_text(renderer)[0]


def _frame_group(renderer: Renderer, frames: int) -> FrameGroup | None:
    """What the processor writes for each group of a video's frames; None where all rows of a video are one run."""
    if not any(renderer.around_frames):
        return None
    before, *between, after = (
        renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in renderer.around_frames
    )
    first, second = (f"{time:.1f}" for time in group_times(FRAME_SECONDS, 2))
    opening, found, closing = before.partition(first)
    if frames != 2 or not found or between != [after + before.replace(first, second)]:
        raise UnsupportedModelError(
            f"what the processor writes between the frames of a video is not supported yet: {[before, *between, after]}"
        )
    around = [_pieces(text, renderer) for text in (opening, closing, after)]
    return FrameGroup(frames, (*around[0], TemplatePiece("seconds"), *around[1], TemplatePiece("video"), *around[2]))


def _images_first(renderer: Renderer) -> bool:
    """Whether the template moves an image that comes after the text to the front."""
    content = [{"type": "text", "text": FIRST}, {"type": "image"}]
    after = renderer.text([{"role": "user", "content": content}])
    return after == renderer.turns(("user", FIRST), image=1)


def _system_turn(renderer: Renderer, split: Any, user: str) -> TurnSpec | None:
    try:
        text = renderer.turns(("system", SYSTEM), ("user", FIRST))
    except Exception:  # templates raise any exception for a role that they do not support
        return None
    if SYSTEM not in text or not text.endswith(user):
        return None
    return _turn(split, text.removesuffix(user), SYSTEM)


def _turn(
    split: Any,
    text: str,
    marker: str,
    *,
    image: str = "",
    video: str = "",
    lead: str = "",
    around: tuple[str, str] = ("", ""),
) -> TurnSpec:
    """Cut a rendered turn at its marker; `around` are the literals before and behind each text, `lead` is that before a
    text that comes first.
    """
    before, after = text.split(marker)
    before_text, after_text = around
    if not (before.endswith(lead + before_text) and after.startswith(after_text)):
        raise UnsupportedModelError("the chat template writes a turn's first text unlike its second")
    return TurnSpec(
        prefix=split(before.removesuffix(lead + before_text)),
        image=split(image),
        video=split(video),
        text=(*split(before_text), TemplatePiece("text"), *split(after_text)),
        suffix=split(after.removeprefix(after_text)),
        lead=split(lead),
    )


def _pieces(text: str, renderer: Renderer) -> tuple[TemplatePiece, ...]:
    """Special tokens, the image token and literal text, in order."""
    specials = renderer.special_tokens
    slots: dict[str | None, Any] = {renderer.image_token: "image", renderer.video_token: "video"}
    longest_first = sorted(specials, key=len, reverse=True)
    found = [p for p in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if p]

    def piece(part: str) -> TemplatePiece:
        if part in slots:
            return TemplatePiece(slots[part])
        if part in specials:
            return TemplatePiece("token", part, specials[part])
        return TemplatePiece("literal", part)

    return tuple(map(piece, found))
