"""Take a chat template apart, once, at export: the device never sees Jinja.

The processor renders a few dialogues around marker texts; differences between the renderings are the pieces. The
pieces are then rendered by the *runtime's* code and compared, token by token, with Hugging Face's own rendering of
other dialogues.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.manifest import Piece, PromptSpec, TurnSpec
from autosteer.runtime.text import IMAGE, ImagePart, Message, load_tokenizer, render

FIRST, REPLY, SECOND, SYSTEM = "\u2402first\u2403", "\u2402reply\u2403", "\u2402second\u2403", "\u2402system\u2403"


def take_apart(processor: Any, end_token_ids: tuple[int, ...], folder: Path) -> PromptSpec:
    """PromptSpec of a Hugging Face processor, checked against it. `folder` holds the tokenizer.json the runtime will
    read.

    Raises UnsupportedModelError where the template does more than the pieces can say.
    """
    image_token = getattr(processor, "image_token", None)

    def split(text: str) -> tuple[Piece, ...]:
        return _pieces(text, processor.tokenizer, image_token)

    one = _rendered(processor, ("user", FIRST))
    two = _rendered(processor, ("user", FIRST), ("assistant", REPLY))
    three = _rendered(processor, ("user", FIRST), ("assistant", REPLY), ("user", SECOND))
    user = _after(three, two).replace(SECOND, FIRST)
    begin = one.removesuffix(user)
    if begin == one and user:
        raise UnsupportedModelError("the chat template writes the first user turn unlike later ones")
    image = _image_part(processor) if image_token else ""
    spec = PromptSpec(
        begin=split(begin),
        system=_system_turn(processor, split, user),
        user=_turn(split, user, FIRST, image=image, lead=_text_lead(processor)),
        assistant=_turn(split, _after(two, one), REPLY),
        generation=split(_after(_rendered(processor, ("user", FIRST), generation=True), one)),
        images_first=_images_first(processor) if image_token else False,
        strip_text=f" {FIRST} " not in _rendered(processor, ("user", f" {FIRST} ")),
        end_token_ids=end_token_ids,
    )
    check(spec, processor, folder)
    return spec


def check(spec: PromptSpec, processor: Any, folder: Path) -> None:
    """Compare the runtime's rendering with Hugging Face's on dialogues that the pieces were not made from.

    Also: text that looks like a special token must not become one.
    """
    tokenizer = load_tokenizer(folder / spec.tokenizer)
    image_token = getattr(processor, "image_token", None)
    image_id = processor.tokenizer.convert_tokens_to_ids(image_token) if image_token else None
    image = ImagePart("unused")
    dialogues: list[list[Message]] = [
        [Message.user("Hello!")],
        [Message.user("two\nlines, ünïcode 漢字 ")],
        [Message.user("one"), Message.assistant("An answer."), Message.user("and 2?")],
    ]
    if image_token:
        dialogues += [
            [Message("user", (image, "what is this?"))],
            [Message("user", (image, image, "compare"))],
            [Message("user", (image, "a")), Message.assistant("b"), Message.user("c")],
        ]
    if spec.system:
        dialogues += [[Message("system", ("Be kind.",)), Message.user("hi")]]
    for dialogue in dialogues:
        for generation in (False, True):
            text = processor.apply_chat_template(_hf(dialogue), add_generation_prompt=generation)
            expected = processor.tokenizer(text, add_special_tokens=False).input_ids
            ours = render(dialogue, spec, tokenizer, generation=generation)
            flat = [i for run in ours for i in ([image_id] if run is IMAGE else run)]  # type: ignore[union-attr]
            if flat != expected:
                raise UnsupportedModelError(
                    f"the chat template cannot be taken apart: {text!r} is {expected} in Hugging Face, {flat} in pieces"
                )
    specials = _special_tokens(processor.tokenizer)
    reserved = {*specials.values(), *_template_ids(spec)}
    for forged in specials:
        if reserved & set(tokenizer.encode(forged, add_special_tokens=False).ids):
            raise UnsupportedModelError(f"the tokenizer turns the user's text {forged!r} into a special token")


def _template_ids(spec: PromptSpec) -> tuple[int, ...]:
    """Ids that only the template may produce, besides the tokenizer's own special ones."""
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


def _rendered(processor: Any, *turns: tuple[str, str], images: int = 0, generation: bool = False) -> str:
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"][:0] = [{"type": "image"}] * images  # type: ignore[index]
    return str(processor.apply_chat_template(messages, add_generation_prompt=generation))


def _hf(dialogue: list[Message]) -> list[dict[str, Any]]:
    def part(p: str | ImagePart) -> dict[str, str]:
        return {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"}

    return [{"role": m.role, "content": [part(p) for p in m.parts]} for m in dialogue]


def _after(longer: str, shorter: str) -> str:
    if not longer.startswith(shorter):
        raise UnsupportedModelError("the chat template rewrites earlier turns when the dialogue grows")
    return longer[len(shorter) :]


def _image_part(processor: Any) -> str:
    """What one image adds to a turn, found by comparing one image with none and two with one."""
    none, one, two = (_rendered(processor, ("user", FIRST), images=n) for n in range(3))
    added = _inserted(none, one)
    if len(two) - len(one) != len(added) or added * 2 not in two:
        raise UnsupportedModelError("the chat template writes a second image unlike the first")
    return added


def _inserted(shorter: str, longer: str) -> str:
    """The text that stands in `longer` and not in `shorter`."""
    start = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
    return longer[start : start + len(longer) - len(shorter)]


def _images_first(processor: Any) -> bool:
    """Whether the template moves an image that comes after the text to the front."""
    content = [{"type": "text", "text": FIRST}, {"type": "image"}]
    after = processor.apply_chat_template([{"role": "user", "content": content}])
    return bool(after == _rendered(processor, ("user", FIRST), images=1))


def _system_turn(processor: Any, split: Any, user: str) -> TurnSpec | None:
    try:
        text = _rendered(processor, ("system", SYSTEM), ("user", FIRST))
    except Exception:  # templates raise what they like where a role is not theirs
        return None
    if SYSTEM not in text or not text.endswith(user):
        return None
    return _turn(split, text.removesuffix(user), SYSTEM)


def _text_lead(processor: Any) -> str:
    """What the template writes before each text of a turn: what stands between two of them."""
    content = [{"type": "text", "text": text} for text in (FIRST, SECOND)]
    text = str(processor.apply_chat_template([{"role": "user", "content": content}]))
    return text.split(FIRST)[1].split(SECOND)[0]


def _turn(split: Any, text: str, marker: str, *, image: str = "", lead: str = "") -> TurnSpec:
    """Cut a rendered turn at its marker; `lead` is the literal that belongs to the text part."""
    before, after = text.split(marker)
    if not before.endswith(lead):
        raise UnsupportedModelError("the chat template writes a turn's first text unlike its second")
    return TurnSpec(
        prefix=split(before.removesuffix(lead)),
        image=split(image),
        text=(*split(lead), Piece("text")),
        suffix=split(after),
    )


def _pieces(text: str, tokenizer: Any, image_token: str | None) -> tuple[Piece, ...]:
    """Special tokens, the image token and literal text, in order."""
    specials = _special_tokens(tokenizer)
    found = [p for p in re.split("(" + "|".join(map(re.escape, specials)) + ")", text) if p]

    def piece(part: str) -> Piece:
        if part == image_token:
            return Piece("image")
        if part in specials:
            return Piece("token", part, specials[part])
        return Piece("literal", part)

    return tuple(map(piece, found))


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Special tokens and their ids, longest first. (`all_special_tokens` lacks those without a role.)"""
    found = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))
