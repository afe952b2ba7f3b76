"""Take a chat template apart, once, at export: the device never sees Jinja.

The processor renders a few dialogues around marker texts; differences between the renderings are the pieces. The
pieces are then rendered by the *runtime's* code and compared, token by token, with what Hugging Face's processor makes
of other dialogues.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.manifest import Piece, PromptSpec, TurnSpec
from autosteer.runtime.text import IMAGE, ImagePart, Message, load_tokenizer, render

FIRST, REPLY, SECOND, SYSTEM = "\u2402first\u2403", "\u2402reply\u2403", "\u2402second\u2403", "\u2402system\u2403"


class Renderer:
    """A Hugging Face processor as a renderer of dialogues: its chat template, and what it adds to that on its own.

    Processors may write a begin token, a separator after the last turn, a frame around each image. These are found by
    looking at token ids, and stand in the renderings below as if the template had written them.
    """

    def __init__(self, processor: Any):
        self._processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token: str | None = getattr(processor, "image_token", None)
        self.special_tokens = _special_tokens(self.tokenizer)
        if self.image_token:
            self.image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
            self.special_tokens[self.image_token] = self.image_id
        plain, whole = self.tokenizer(FIRST, add_special_tokens=False).input_ids, self.ids(FIRST)
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
        if start is None:
            raise UnsupportedModelError(f"the processor turns the text {FIRST!r} into other tokens than its tokenizer")
        before, after = whole[:start], whole[start + len(plain) :]
        framed = self.ids(self.image_token, images=1) if self.image_token else []
        frame = framed[len(before) : len(framed) - len(after)]
        self._before, self._after, self._image = map(self._strings, (before, after, frame))

    def _strings(self, ids: list[int]) -> str:
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        self.special_tokens |= dict(zip(tokens, ids, strict=True))
        return "".join(tokens)

    def text(self, messages: list[dict[str, Any]], *, generation: bool = False) -> str:
        """A dialogue in Hugging Face's form, as the processor's tokenizer sees it, with one image token per image."""
        text = self.template(messages, generation=generation)
        return self._before + (text.replace(self.image_token, self._image) if self.image_token else text) + self._after

    def turns(self, *turns: tuple[str, str], images: int = 0, generation: bool = False) -> str:
        """The text of turns (role, text), with `images` before the first turn's."""
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        messages[0]["content"][:0] = [{"type": "image"}] * images  # type: ignore[index]
        return self.text(messages, generation=generation)

    def template(self, messages: list[dict[str, Any]], *, generation: bool) -> str:
        """What the chat template alone makes of a dialogue."""
        return str(self._processor.apply_chat_template(messages, add_generation_prompt=generation))

    def ids(self, text: str, *, images: int = 0) -> list[int]:
        """The processor's own token ids for a template's text, with the placeholders of each image as one."""
        pictures = [[Image.new("RGB", (32, 32))] * images] if images else None
        ids = list(map(int, self._processor(text=[text], images=pictures)["input_ids"][0]))
        if not images:
            return ids
        each = ids.count(self.image_id) // images  # pictures of one size take equally many
        seen = itertools.count()
        return [i for i in ids if i != self.image_id or next(seen) % each == 0]


def save_tokenizer(processor: Any, folder: Path, never_generated: tuple[int, ...] = ()) -> None:
    """Write `folder`/tokenizer.json. What a prompt's frame is made of, and what only images are made of, is special
    there, and so nothing that a user can type (checkpoints may list it among ordinary added tokens).
    """
    names = {*Renderer(processor).special_tokens, *processor.tokenizer.convert_ids_to_tokens(list(never_generated))}
    data = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] |= token["content"] in names
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def take_apart(processor: Any, end_token_ids: tuple[int, ...], folder: Path) -> PromptSpec:
    """PromptSpec of a Hugging Face processor, checked against it. `folder` holds the tokenizer.json the runtime will
    read.

    Raises UnsupportedModelError where the template does more than the pieces can say.
    """
    renderer = Renderer(processor)

    def split(text: str) -> tuple[Piece, ...]:
        return _pieces(text, renderer)

    one = renderer.turns(("user", FIRST))
    two = renderer.turns(("user", FIRST), ("assistant", REPLY))
    three = renderer.turns(("user", FIRST), ("assistant", REPLY), ("user", SECOND))
    user = _after(three, two).replace(SECOND, FIRST)
    begin = one.removesuffix(user)
    if begin == one and user:
        raise UnsupportedModelError("the chat template writes the first user turn unlike later ones")
    image = _image_part(renderer) if renderer.image_token else ""
    spec = PromptSpec(
        begin=split(begin),
        system=_system_turn(renderer, split, user),
        user=_turn(split, user, FIRST, image=image, lead=text_lead(renderer)),
        assistant=_turn(split, _after(two, one), REPLY),
        generation=split(_after(renderer.turns(("user", FIRST), generation=True), one)),
        images_first=_images_first(renderer) if renderer.image_token else False,
        strip_text=f" {FIRST} " not in renderer.turns(("user", f" {FIRST} ")),
        end_token_ids=end_token_ids,
    )
    check(spec, renderer, folder)
    return spec


def check(spec: PromptSpec, renderer: Renderer, folder: Path) -> None:
    """Compare the runtime's rendering with Hugging Face's on dialogues that the pieces were not made from.

    Also: text that looks like a special token must not become one.
    """
    tokenizer = load_tokenizer(folder / spec.tokenizer)
    image = ImagePart("unused")
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
    if spec.system:
        dialogues += [[Message("system", ("Be kind.",)), Message.user("hi")]]
    for dialogue in dialogues:
        for generation in (False, True):
            text = renderer.template(_hf(dialogue), generation=generation)
            expected = renderer.ids(text, images=sum(len(message.images) for message in dialogue))
            ours = render(dialogue, spec, tokenizer, generation=generation)
            flat = [i for run in ours for i in ([renderer.image_id] if run is IMAGE else run)]  # type: ignore[union-attr]
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


def _hf(dialogue: list[Message]) -> list[dict[str, Any]]:
    def part(p: str | ImagePart) -> dict[str, str]:
        return {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"}

    return [{"role": m.role, "content": [part(p) for p in m.parts]} for m in dialogue]


def _after(longer: str, shorter: str) -> str:
    if not longer.startswith(shorter):
        raise UnsupportedModelError("the chat template rewrites earlier turns when the dialogue grows")
    return longer[len(shorter) :]


def _image_part(renderer: Renderer) -> str:
    """What one image adds to a turn, found by comparing one image with none and two with one."""
    none, one, two = (renderer.turns(("user", FIRST), images=n) for n in range(3))
    added = _inserted(none, one)
    if len(two) - len(one) != len(added) or added * 2 not in two:
        raise UnsupportedModelError("the chat template writes a second image unlike the first")
    return added


def _inserted(shorter: str, longer: str) -> str:
    """The text that stands in `longer` and not in `shorter`."""
    start = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
    return longer[start : start + len(longer) - len(shorter)]


def _images_first(renderer: Renderer) -> bool:
    """Whether the template moves an image that comes after the text to the front."""
    content = [{"type": "text", "text": FIRST}, {"type": "image"}]
    after = renderer.text([{"role": "user", "content": content}])
    return after == renderer.turns(("user", FIRST), images=1)


def _system_turn(renderer: Renderer, split: Any, user: str) -> TurnSpec | None:
    try:
        text = renderer.turns(("system", SYSTEM), ("user", FIRST))
    except Exception:  # templates raise what they like where a role is not theirs
        return None
    if SYSTEM not in text or not text.endswith(user):
        return None
    return _turn(split, text.removesuffix(user), SYSTEM)


def text_lead(renderer: Renderer) -> str:
    """What the template writes before each text of a turn: what stands between two of them."""
    content = [{"type": "text", "text": text} for text in (FIRST, SECOND)]
    text = renderer.text([{"role": "user", "content": content}])
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


def _pieces(text: str, renderer: Renderer) -> tuple[Piece, ...]:
    """Special tokens, the image token and literal text, in order."""
    specials = renderer.special_tokens
    longest_first = sorted(specials, key=len, reverse=True)
    found = [p for p in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if p]

    def piece(part: str) -> Piece:
        if part == renderer.image_token:
            return Piece("image")
        if part in specials:
            return Piece("token", part, specials[part])
        return Piece("literal", part)

    return tuple(map(piece, found))


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Special tokens and their ids. (`all_special_tokens` lacks those without a role.)"""
    return {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
