"""What Hugging Face's processor makes of dialogues and pictures: the text, and the token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import pre_tokenizers

from autosteer.runtime.errors import UnsupportedModelError
from autosteer.runtime.text import ImagePart, Message, Part

FRAME_SECONDS = (11.0, 12.0, 33.0, 34.0)  # seconds of frames that show what a processor writes of them
# Its ids, and what templates make of it, tell whether a gate was fitted on this tokenizer.
PROBE = "How do I boil 12 eggs?\n\nThanks (a lot); the and ing tion ABCDEFGHIJKLM 0123456789 .,:!-_/ \u00e9\u4f60\u0436"
# Texts that no template writes by itself, to find the user's texts in a rendering.
FIRST, REPLY, SECOND, SYSTEM = "\u2402first\u2403", "\u2402reply\u2403", "\u2402second\u2403", "\u2402system\u2403"


class Renderer:
    """A Hugging Face processor as a renderer of dialogues: its chat template, and what it adds to that on its own.

    Processors may write a begin token, and a separator after the last turn. These are found by looking at token ids,
    and stand in the renderings below as if the template had written them. So does the space that some tokenizers write
    before the text that begins a prompt, and before no other. What processors write around and between the rows of an
    image is its `frame`; in the renderings an image or a video is its one token in the template.
    """

    def __init__(self, processor: Any, video_token: str | None = None):
        """`video_token`: only if the family takes videos; processors have one even if it does not."""
        self._processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token: str | None = getattr(processor, "image_token", None)
        self.video_token = video_token
        self.special_tokens = _special_tokens(self.tokenizer)
        for token in filter(None, (self.image_token, self.video_token)):
            self.special_tokens[token] = self.tokenizer.convert_tokens_to_ids(token)
        self.image_id, self.video_id = (self.special_tokens.get(t or "") for t in (self.image_token, self.video_token))
        plain, whole = self.tokenizer(FIRST, add_special_tokens=False).input_ids, self.ids(FIRST)
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
        if start is None:
            raise UnsupportedModelError(f"the processor turns the text {FIRST!r} into other tokens than its tokenizer")
        self._begin, self._end = whole[:start], whole[start + len(plain) :]
        self._before, self._after = map(self._strings, (self._begin, self._end))
        self._space = " " if spaces_first_text(self.tokenizer) else ""
        frame = self.frame(Image.new("RGB", (32, 32))) if self.image_token else [[], []]
        self._lead, self._trail = len(frame[0]), len(frame[-1])
        # What the processor writes before each run of the rows of a video at FRAME_SECONDS, and after the last.
        self.around_frames: list[list[int]] = [[], []]
        if self.video_token:
            self.around_frames = self._between(self._ids(self.video_token, [], 1), self.video_id)

    def _strings(self, ids: list[int]) -> str:
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        self.special_tokens |= dict(zip(tokens, ids, strict=True))
        return "".join(tokens)

    def text(self, messages: list[dict[str, Any]], *, generation: bool = False) -> str:
        """A dialogue in Hugging Face's form, as the processor's tokenizer sees it: one token per image or video."""
        text = self.template(messages, generation=generation)
        spaced = text.startswith((" ", *self.special_tokens))  # already, or no text begins it
        return self._before + ("" if spaced else self._space) + text + self._after

    def turns(self, *turns: tuple[str, str], image: int = 0, video: int = 0, generation: bool = False) -> str:
        """Render turns (role, text), with `image` images and `video` videos before the first turn's text."""
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        messages[0]["content"][:0] = [{"type": "image"}] * image + [{"type": "video"}] * video  # type: ignore[index]
        return self.text(messages, generation=generation)

    def template(self, messages: list[dict[str, Any]], *, generation: bool) -> str:
        """Render a dialogue with the chat template alone."""
        return str(self._processor.apply_chat_template(messages, add_generation_prompt=generation))

    def ids(self, text: str, *, images: int = 0, videos: int = 0) -> list[int]:
        """The processor's own token ids for a template's text, with one token for each image and its frame, and for
        each run of a video's rows. Videos have four frames, at the seconds FRAME_SECONDS.
        """
        ids = self._ids(text, [Image.new("RGB", (32, 32))] * images, videos)
        if videos and self.video_id is not None:
            places = [at for at, i in enumerate(ids) if i == self.video_id]
            each = len(places) // (videos * (len(self.around_frames) - 1))
            for first, last in zip(places[-each::-each], places[::-each], strict=True):
                ids[first : last + 1] = [self.video_id]
        if images and self.image_id is not None:
            places = [at for at, i in enumerate(ids) if i == self.image_id]
            each = len(places) // images  # images of one size take equally many tokens
            for first, last in zip(places[-each::-each], places[::-each], strict=True):
                ids[first - self._lead : last + 1 + self._trail] = [self.image_id]
        return ids

    def frame(self, picture: Image.Image) -> list[list[int]]:
        """The ids that the processor writes before each run of an image's placeholders, and after the last."""
        assert self.image_token is not None
        return self._between(self._ids(self.image_token, [picture]), self.image_id)

    def _between(self, ids: list[int], placeholder: int | None) -> list[list[int]]:
        """The ids before each run of `placeholder`, and after the last, without begin and end."""
        between: list[list[int]] = [[]]
        for previous, i in zip([None, *ids], ids[: len(ids) - len(self._end)], strict=False):
            if i != placeholder:
                between[-1].append(i)
            elif previous != i:
                between.append([])
        between[0] = between[0][len(self._begin) :]
        return between

    def _ids(self, text: str, pictures: Sequence[Image.Image], videos: int = 0) -> list[int]:
        shown: dict[str, Any] = {"images": [list(pictures)]} if pictures else {}
        if videos:
            frames = np.zeros((len(FRAME_SECONDS), 32, 32, 3), np.uint8)
            shown |= video_arguments([frames] * videos, [FRAME_SECONDS] * videos)
        return list(map(int, self._processor(text=[text], **shown)["input_ids"][0]))


def frame_digests(processor: Any) -> tuple[str, str, str]:
    """SHA-256 of a chat template, of three dialogues that it writes, and of the ids of a text: what a gate that reads
    prompts was fitted on.
    """
    user, reply = {"role": "user", "content": [{"type": "text", "text": PROBE}]}, {"role": "assistant"}
    answered = [user, {**reply, "content": [{"type": "text", "text": REPLY}]}, user]
    written = [
        processor.apply_chat_template(dialogue, add_generation_prompt=generation, tokenize=False)
        for dialogue, generation in (([user], False), ([user], True), (answered, True))
    ]
    ids = processor.tokenizer(PROBE, add_special_tokens=False).input_ids
    parts = (str(processor.chat_template), json.dumps(written), json.dumps(list(map(int, ids))))
    template, dialogues, text = (hashlib.sha256(part.encode()).hexdigest() for part in parts)
    return template, dialogues, text


def same_frame(fitted: Sequence[str], now: Sequence[str]) -> bool:
    """Whether two `frame_digests` are of one way to write and read prompts: the text's ids are equal, and so is the
    template, or what it writes (some write the date).
    """
    return fitted[2] == now[2] and (fitted[0] == now[0] or fitted[1] == now[1])


def video_arguments(videos: Sequence[np.ndarray], seconds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A processor's arguments for videos, all of whose frames it takes. `seconds`: when each frame is shown; of none of
    a video's, HF says 24 a second.
    """
    facts: list[dict[str, Any]] = []
    for frames, moments in zip(videos, seconds, strict=True):
        n = len(frames)
        facts.append({"total_num_frames": n, "fps": None, "frames_indices": list(range(n))})
        if moments:  # "the frames 1.5 and 2 of a video of one frame a second": HF divides by frames a second
            apart = (moments[-1] - moments[0]) / max(n - 1, 1)
            facts[-1] = {"total_num_frames": n * apart or n, "fps": 1.0, "frames_indices": list(moments)}
    return {"videos": [list(videos)], "video_metadata": [facts], "do_sample_frames": False}


def around_text(renderer: Renderer) -> tuple[str, str]:
    """The literals before and behind each text of a turn; one of them is empty.

    It is what the template writes between two texts. It stands behind each if it is not between an image and a text.
    """
    content = [{"type": "text", "text": text} for text in (FIRST, SECOND)]
    between = renderer.text([{"role": "user", "content": content}]).split(FIRST)[1].split(SECOND)[0]
    if renderer.image_token is None:
        return between, ""
    one, two = (renderer.turns(("user", FIRST), image=count).split(FIRST)[0] for count in (1, 2))
    return (between, "") if one.endswith(inserted(one, two) + between) else ("", between)


def inserted(shorter: str, longer: str) -> str:
    """The text that `longer` has in addition to `shorter`."""
    start = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
    return longer[start : start + len(longer) - len(shorter)]


def runtime_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of a Hugging Face tokenizer for the runtime, which tokenises each run of text by itself: a
    space before the first is not the tokenizer's there, but the template's (Renderer.text).
    """
    data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if spaces_first_text(tokenizer):
        data["pre_tokenizer"]["prepend_scheme"] = "never"
    return data


def spaces_first_text(tokenizer: Any) -> bool:
    """Whether the tokenizer writes a space before the text that begins a prompt, and before no other."""
    step = tokenizer.backend_tokenizer.pre_tokenizer
    return isinstance(step, pre_tokenizers.Metaspace) and step.prepend_scheme == "first"


def hf_messages(dialogue: Sequence[Message]) -> list[dict[str, Any]]:
    """A dialogue in Hugging Face's form."""

    def part(p: Part) -> dict[str, str]:
        if isinstance(p, str):
            return {"type": "text", "text": p}
        return {"type": "image" if isinstance(p, ImagePart) else "video"}

    return [{"role": m.role, "content": [part(p) for p in m.parts]} for m in dialogue]


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Special tokens and their ids. `all_special_tokens` omits those without a role."""
    return {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
