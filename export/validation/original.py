"""Ask the PyTorch model what the package was asked: hidden states, logits, p_unsafe, greedy tokens.

The model is in memory (hf_model.load_hf_model), or its weights stay on disk (on_demand.py). One in memory can generate
(`run`). One on disk is teacher-forced (`follow`): one forward pass over the prompt and the package's answer gives the
token that PyTorch prefers at each position. If each is the answer's own token, PyTorch generates the same answer.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from autosteer.export.checkpoint.hf_model import changing_arguments, deepstack_arguments, placed, watching_inputs
from autosteer.export.checkpoint.renderer import hf_messages, runtime_tokenizer, video_arguments
from autosteer.export.graphs.decoder import BRANCHES
from autosteer.export.graphs.kv_scales import uncached
from autosteer.export.graphs.vision import VQTokenizer
from autosteer.export.safety.prober import p_unsafe
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime.gate import worst
from autosteer.runtime.image import cut
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.picture_file import ImageLike, open_image
from autosteer.runtime.prompt_encoder import probed_positions
from autosteer.runtime.text import IMAGE, Message, Place, Rendered, render_judged

from .metrics import MASKED_LOGIT, row_error, worse

ANSWER_TOKENS = 32  # per answer, at most
NEAR_TIE = 5e-5  # of the largest squared distance: torch and onnxruntime differ by 1.4e-5 at Chameleon's depth


@dataclass(frozen=True)
class ValidationPrompt:
    """A dialogue that package and PyTorch model both answer. Files are relative to the package.

    If the safety folder keeps a prompt's words secret, the prompt is given by `prompt_ids`: the token ids of a rendered
    user turn without images, generation prompt included. `messages` is then one empty turn.
    """

    messages: tuple[Message, ...]
    image_files: tuple[str, ...]
    video_files: tuple[tuple[str, ...], ...] = ()  # the frames of each
    prompt_ids: tuple[int, ...] = ()
    unsafe: bool | None = None  # its label in the safety folder; None: not from the safety folder
    fitted: float | None = None  # p_unsafe as autosteer-fit computed it

    @property
    def images(self) -> list[ImageLike]:
        """Its images, in the order of the dialogue."""
        return [image for message in self.messages for image in message.images]

    @property
    def videos(self) -> list[tuple[ImageLike, ...]]:
        """The frames of each of its videos, in the order of the dialogue."""
        return [frames for message in self.messages for frames in message.videos]

    @property
    def kind(self) -> tuple[object, ...]:
        """Whether it has images, several images, videos, several turns, and its label: see prompts.affordable."""
        return bool(self.images), len(self.images) > 1, bool(self.videos), len(self.messages) > 1, self.unsafe


@dataclass(frozen=True)
class ImageErrors:
    """How many of the package's image tokens differ from Hugging Face's."""

    wrong: int
    near_ties: int  # two codes were equally near, up to rounding: either is right


@dataclass(frozen=True)
class OriginalAnswer:
    """The PyTorch model's results for a prompt."""

    pixel_values: np.ndarray  # (n,) all numbers: of the tiles of all images, then of the frames of all videos
    image_errors: ImageErrors | None  # None unless images are tokens of the vocabulary
    embeds: np.ndarray  # (S, D)
    deepstack: np.ndarray  # (L, S, D) added to the output of the first L layers; L is 0 without pictures
    hidden: np.ndarray  # (D,) the prober's input for the last turn
    spread: np.ndarray  # (D,) standard deviation over the prompt's positions of the residual at the split
    logits: np.ndarray  # (n, V) after the prompt, and after each token of the answer but the last
    p_unsafe: float
    tokens: list[int]
    steered_tokens: list[int]


@dataclass(frozen=True)
class ForwardPass:
    """Hidden states and logits of one forward pass."""

    entering: dict[int, torch.Tensor]  # by layer: the residual (S, D) that enters it at the prompt's positions
    deepstack: torch.Tensor  # (L, S, D) added to the output of the first L layers there; L is 0 without pictures
    head: torch.Tensor  # (n, D) the LM head's input
    logits: torch.Tensor  # (n, V) after the prompt, and after each token of an answer but the last


class OriginalModel:
    """The PyTorch model, its processor, and the gate that the package should have."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        manifest: Manifest,
        safety: SafetyArtifact | None,
        caching: Callable[[Any], dict[str, Any]] = uncached,
    ):
        """`caching` maps the model to forward's KV cache arguments: no cache, or caches that round to int8."""
        self.caching = caching
        self.model, self.processor, self.manifest, self.safety = model, processor, manifest, safety

    def inputs(self, prompt: ValidationPrompt) -> dict[str, Any]:
        """The processor's tensors for a prompt."""
        if prompt.prompt_ids:
            ids = torch.tensor([prompt.prompt_ids])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        text = self.processor.apply_chat_template(hf_messages(prompt.messages), add_generation_prompt=True)
        shown: dict[str, Any] = {}
        if prompt.images:
            shown["images"] = [[Image.fromarray(open_image(image)) for image in prompt.images]]
        if videos := [video for message in prompt.messages for video in message.video_parts]:
            frames = [np.stack([open_image(frame) for frame in video.frames]) for video in videos]
            shown |= video_arguments(frames, [video.seconds for video in videos])
        return dict(self.processor(text=[text], **shown, return_tensors="pt"))

    def run(self, prompt: ValidationPrompt, ours: list[list[int]] | None = None) -> OriginalAnswer:
        """PyTorch's results, with its own greedy answers. The model must be in memory.

        `ours` are the package's image tokens. If they differ from Hugging Face's at near ties only, PyTorch continues
        with ours, so that everything after the images can still be compared.
        """
        inputs, errors = self._with_our_image_tokens(self.inputs(prompt), ours)
        strength = self.safety.facts.strength if self.safety else 0.0
        steered = self.generate(inputs, strength=strength) if strength else []
        passed = self.forward(inputs, self._layers)
        return self._original_answer(prompt, errors, passed, self.generate(inputs), steered)

    def follow(
        self,
        prompt: ValidationPrompt,
        answer: Sequence[int],
        steered: Sequence[int],
        ours: list[list[int]] | None = None,
    ) -> OriginalAnswer:
        """As `run`, for a model on disk: `tokens` and `steered_tokens` are the tokens that PyTorch prefers at each
        position of the package's answers, plain and steered. An empty `steered` is skipped. An answer is followed up to
        its first image placeholder, for which Hugging Face would expect an image.
        """
        inputs, errors = self._with_our_image_tokens(self.inputs(prompt), ours)
        passed = self.forward(inputs, self._layers, self._until_image(answer))
        steered_tokens: list[int] = []
        if steered:
            steered_pass = self.forward(inputs, (), self._until_image(steered))
            steered_tokens = self._steered_choices(steered_pass, passed.logits[0])
        return self._original_answer(prompt, errors, passed, passed.logits.argmax(-1).tolist(), steered_tokens)

    def _original_answer(
        self,
        prompt: ValidationPrompt,
        errors: ImageErrors | None,
        passed: ForwardPass,
        tokens: list[int],
        steered: list[int],
    ) -> OriginalAnswer:
        inputs = self.inputs(prompt)
        probed = self._prober_inputs(prompt, inputs, passed)
        return OriginalAnswer(
            pixel_values=self._pixels(inputs).numpy(),
            image_errors=errors,
            embeds=passed.entering[0].numpy(),
            deepstack=passed.deepstack.numpy(),
            hidden=probed[-1].numpy(),
            spread=passed.entering[self.manifest.split_layer][1:].std(dim=0).numpy(),  # position 0 is an outlier
            logits=passed.logits.numpy(),
            p_unsafe=worst(map(self.p_unsafe, probed)),
            tokens=tokens,
            steered_tokens=steered,
        )

    def _pixels(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The pixels of a prompt's images and videos in the runtime's order, (n,). A "native" picture becomes whole."""
        given = [inputs[name] for name in ("pixel_values", "pixel_values_videos") if name in inputs]
        if not given or self.manifest.image is None or self.manifest.image.native is None:
            return torch.cat([torch.empty(0), *(_without_filling(pixels.flatten(0, -4)).flatten() for pixels in given)])
        frames, vision, found = self.manifest.image.native.frames, self.model.config.vision_config, []
        patch, merge = vision.patch_size, vision.spatial_merge_size
        sizes = [inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs]
        for pixels, grids in zip(given, sizes, strict=True):
            for patches, (groups, rows, columns) in zip(
                pixels.split(grids.prod(1).tolist()), grids.tolist(), strict=True
            ):
                shape = (groups, rows // merge, columns // merge, merge, merge, 3, frames, patch, patch)
                found.append(patches.reshape(shape).permute(0, 6, 5, 1, 3, 7, 2, 4, 8).flatten())
        return torch.cat(found)

    @torch.no_grad()
    def forward(self, inputs: dict[str, Any], layers: Sequence[int], answer: Sequence[int] = (0,)) -> ForwardPass:
        """One forward pass over a prompt and all but the last token of an answer; keeps what enters `layers`."""
        length, entering = inputs["input_ids"].shape[1], dict[int | str, torch.Tensor]()
        decoder = self.model.get_decoder()
        watched: dict[int | str, Any] = {i: decoder.layers[i] for i in layers} | {"head": self.model.lm_head}
        given: dict[str, Any] = {}  # to the decoder

        def note(arguments: dict[str, Any]) -> dict[str, Any]:
            given.update(arguments)
            return arguments

        with watching_inputs(watched, entering.__setitem__), changing_arguments(decoder, note):
            out = self.model(**_extended(inputs, answer[:-1]), **self.caching(self.model), logits_to_keep=len(answer))
        added = given.get("deepstack_visual_embeds") or []
        deepstack = torch.zeros(len(added), length, entering["head"].shape[-1])
        if added:
            deepstack[:, given["visual_pos_masks"][0, :length]] = torch.stack(added)
        return ForwardPass({i: entering[i][0, :length] for i in layers}, deepstack, entering["head"][0], out.logits[0])

    @torch.no_grad()
    def branch_errors(
        self,
        prompt: ValidationPrompt,
        embeds: np.ndarray,
        deepstack: np.ndarray,
        given: Mapping[str, np.ndarray],
        logits: np.ndarray,
        error: Callable[[np.ndarray, np.ndarray], float] = row_error,
    ) -> dict[str, float]:
        """Error of each branch of the decoder by itself: attention and MLP of every layer, the final norm, the LM head.

        PyTorch computes each branch on the output of the package's earlier branches. So errors do not add up from layer
        to layer, and a small branch's error is not hidden by a large residual stream.

        `embeds` (S, D) of `prompt` enter the decoder, `deepstack` (L, S, D) behind its first layers. `inputs_embeds` of
        `given`, the tokens of an answer but the last, follow in passes of their own. The rest of `given` are the
        package's branch outputs at the last positions, by name ("<layer>.self_attn", "<layer>.mlp": HF's modules;
        `last_hidden_state`). `logits` (n, V) are the package's, after prompt and tokens. Returns `error` (row_error or
        share_lost) for each of these names: the prompt's or the answer's, whichever is worse; infinite for a branch
        that is missing in `given`.
        """
        decoder, me, answered = self.model.get_decoder(), threading.get_ident(), len(logits) - 1

        def separate_errors(ours: np.ndarray, theirs: np.ndarray) -> float:
            prefill = len(ours) - answered  # rows of the prompt
            parts = (slice(prefill), slice(prefill, None)) if answered else (slice(None),)
            return functools.reduce(worse, (error(ours[rows], theirs[rows]) for rows in parts))

        def take_over(name: str) -> Callable[..., Any]:
            def hook(module: Any, args: tuple[Any, ...], out: Any) -> Any:
                if threading.get_ident() != me:
                    return out
                theirs = out[0] if isinstance(out, tuple) else out
                ours = torch.from_numpy(given[name].astype(np.float32))
                mixed = theirs.clone()
                mixed[:, -ours.shape[1] :] = ours
                errors[name] = separate_errors(ours[0].numpy(), theirs[0, -ours.shape[1] :].numpy())
                return (mixed, *out[1:]) if isinstance(out, tuple) else mixed

            return hook

        prefix = next(name for name, module in self.model.named_modules() if module is decoder)
        modules = {
            f"{prefix}.layers.{i}.{branch}": getattr(layer, branch)
            for i, layer in enumerate(decoder.layers)
            for branch in BRANCHES
        } | {"last_hidden_state": decoder.norm}
        errors = dict.fromkeys((*modules, "logits"), math.inf)
        handles = [module.register_forward_hook(take_over(name)) for name, module in modules.items() if name in given]
        try:
            rows = np.concatenate([embeds[None], *([given["inputs_embeds"]] if answered else [])], axis=1)
            entering = torch.from_numpy(rows.astype(np.float32))
            more = placed(self.model.base_model, _extended(self.inputs(prompt), [0] * answered))
            padded = torch.from_numpy(np.pad(deepstack, ((0, 0), (0, answered), (0, 0))))
            added = deepstack_arguments(list(padded[:, None]))
            with changing_arguments(decoder, lambda arguments: arguments | added):
                out = self.model(inputs_embeds=entering, **more, **self.caching(self.model), logits_to_keep=len(logits))
        finally:
            for handle in handles:
                handle.remove()
        theirs = out.logits[0].numpy()
        possible = theirs[0] > MASKED_LOGIT
        centred = [x[:, possible] - x[:, possible].mean(1, keepdims=True) for x in (logits, theirs)]
        errors["logits"] = separate_errors(*centred)
        return errors

    @torch.no_grad()
    def _steered_choices(self, passed: ForwardPass, plain: torch.Tensor) -> list[int]:
        """The steered choice at every position of the LM head's input, by the authors' formula: argmax of
        h (E + strength * E W)^T, computed in blocks of E. Tokens that are masked in `plain` (V,) stay masked.
        """
        assert self.safety is not None
        strength, matrix = self.safety.facts.strength, self.safety.steer_matrix
        blocks = self.model.lm_head.blocks()
        logits = torch.cat([passed.head @ (block + strength * block @ matrix).T for block in blocks], dim=-1)
        return logits.masked_fill(plain < MASKED_LOGIT, MASKED_LOGIT).argmax(-1).tolist()

    @torch.no_grad()
    def image_tokens(self, pixel_values: torch.Tensor) -> list[list[int]]:
        """Token ids of images (n, 3, size, size)."""
        return self.model.get_image_tokens(pixel_values).tolist() if len(pixel_values) else []

    @torch.no_grad()
    def image_errors(self, pixel_values: torch.Tensor, ours: list[list[int]]) -> ImageErrors:
        """Compare the package's tokens of images (n, 3, size, size) with HF's."""
        theirs = torch.tensor(self.image_tokens(pixel_values)).flatten()
        differ = (theirs != torch.tensor(ours).flatten()).nonzero().flatten()
        if not len(differ):
            return ImageErrors(0, 0)
        wrapper = VQTokenizer(self.model)
        code = {int(token): i for i, token in enumerate(wrapper.constants["token_ids"])}
        distances = wrapper.distances(pixel_values)[differ]
        chosen = torch.tensor([code[token] for token in torch.tensor(ours).flatten()[differ].tolist()])
        excess = distances.gather(1, chosen[:, None])[:, 0] - distances.amin(1)
        ties = int((excess <= NEAR_TIE * distances.amax(1)).sum())
        return ImageErrors(len(differ) - ties, ties)

    def _with_our_image_tokens(
        self, inputs: dict[str, Any], ours: list[list[int]] | None
    ) -> tuple[dict[str, Any], ImageErrors | None]:
        """The inputs; with our image tokens in place of pixels if they differ from HF's at near ties only."""
        if not ours:
            return inputs, None
        errors = self.image_errors(inputs["pixel_values"], ours)
        if errors.wrong or not errors.near_ties:
            return inputs, errors
        ids = inputs["input_ids"].clone()
        ids[ids == self.processor.image_token_id] = torch.tensor(ours).flatten()
        return {name: t for name, t in inputs.items() if name != "pixel_values"} | {"input_ids": ids}, errors

    def _prober_inputs(
        self, prompt: ValidationPrompt, inputs: dict[str, Any], passed: ForwardPass
    ) -> list[torch.Tensor]:
        """The prober's input (D,) for each turn."""
        states = passed.entering[self.manifest.split_layer]
        return [states[rows].mean(dim=0) for rows in self._probed(prompt, inputs["input_ids"][0])]

    def p_unsafe(self, hidden: torch.Tensor) -> float:
        """The prober's score of one hidden state (D,); NaN without a gate."""
        if self.safety is None:
            return float("nan")
        return float(p_unsafe(self.safety.prober, hidden[None])[0])

    def generate(self, inputs: dict[str, Any], strength: float = 0.0, tokens: int = ANSWER_TOKENS) -> list[int]:
        """Greedy tokens. Steering replaces the LM head E by E + strength * E W, as the authors do."""
        head, plain = self.model.lm_head, self.model.lm_head.weight
        if strength:
            assert self.safety is not None
            steered = plain + strength * plain @ self.safety.steer_matrix
            head.weight = torch.nn.Parameter(steered, requires_grad=False)
        try:
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        finally:
            head.weight = plain
        return list(map(int, out[0, inputs["input_ids"].shape[1] :]))

    def _until_image(self, answer: Sequence[int]) -> Sequence[int]:
        first = next((at for at, token in enumerate(answer) if token in self._placeholders), len(answer))
        return answer[: first + 1]

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(json.dumps(runtime_tokenizer(self.processor.tokenizer)))

    @property
    def _placeholders(self) -> list[int]:
        """Token ids of HF's placeholders for image and video rows."""
        names = ("image_token_id", "video_token_id") if self.manifest.video else ("image_token_id",)
        return [token for name in names if (token := getattr(self.processor, name, None)) is not None]

    @property
    def _layers(self) -> tuple[int, int]:
        return 0, self.manifest.split_layer

    def _probed(self, prompt: ValidationPrompt, ids: torch.Tensor) -> list[list[int]]:
        """Positions whose mean the prober reads, for each turn. `ids` (S,) are HF's, with a placeholder for each image
        row.
        """
        text = (~torch.isin(ids, torch.tensor(self._placeholders, dtype=ids.dtype))).nonzero()[:, 0].tolist()
        runs, turns = render_judged(prompt.messages, self.manifest.prompt, self._tokenizer)
        if prompt.prompt_ids:  # the empty turn in `messages` begins at the right token, but ends too early
            turns = [replace(turn, end=Place(len(prompt.prompt_ids), 0)) for turn in turns]
        sizes = _slot_rows(runs, text, len(ids), self._framing(prompt))
        if group := self.manifest.prompt.frame_group:
            groups = [math.ceil(len(video) / group.frames) for video in prompt.videos]
            between = _between_groups((ids == self.processor.video_token_id).tolist(), groups)
            text = [position for position in text if position not in between]
        return probed_positions(self.manifest.prober, turns, text, sizes)

    def _framing(self, prompt: ValidationPrompt) -> list[int]:
        """How many separator tokens each image has between its tiles."""
        spec, alone = self.manifest.image, len(prompt.images) == 1
        length = {frame.grid: sum(map(len, frame.token_ids)) for frame in spec.tile_separators} if spec else {}
        images = [image for message in prompt.messages for image in message.images]
        if spec is None or not length:
            return [0] * len(images)
        return [length[cut(open_image(image), spec, alone=alone)[1]] for image in images]


def _without_filling(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (n, 3, size, size) without those of zeros, with which a processor fills up the tiles of a picture that has
    fewer than another. No colour is zero after it was normalised.
    """
    return tiles[tiles.flatten(1).any(dim=1)]


def _slot_rows(runs: Rendered, text: Sequence[int], length: int, framing: Sequence[int]) -> list[int]:
    """Rows of each image and video in HF's prompt of `length`, separators included. Where nothing stands between
    several, the first has those of all. `text`: positions of what is no placeholder; framing[i] of them are separators
    of image i.
    """
    left, before, rows = iter(framing), 0, list[int]()
    for is_text, group in itertools.groupby(runs, key=lambda run: isinstance(run, list)):
        if is_text:
            before += sum(len(run) for run in group if isinstance(run, list))
            continue
        slots, first = list(group), text[before - 1] + 1 if before else 0
        before += sum(next(left) for slot in slots if slot is IMAGE)
        end = text[before] if before < len(text) else length
        rows += [end - first, *[0] * (len(slots) - 1)]
    return rows


def _between_groups(shown: Sequence[bool], groups: Sequence[int]) -> set[int]:
    """Positions of text between the groups of a video's frames. `shown`: whether a position is a row of a video's.
    `groups`: how many each video has.
    """
    runs = [[at for at, _ in run] for row, run in itertools.groupby(enumerate(shown), key=lambda pair: pair[1]) if row]
    found, first = set[int](), 0
    for count in groups:
        own = runs[first : first + count]
        found |= {at for a, b in itertools.pairwise(own) for at in range(a[-1] + 1, b[0])}
        first += count
    return found


def _extended(inputs: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """The processor's tensors with text tokens appended."""
    more = torch.tensor([list(tokens)], dtype=torch.int64)
    fill = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    shape = inputs["input_ids"].shape
    return {
        name: torch.cat([value, fill.get(name, torch.zeros_like(more)).to(value.dtype)], 1)
        if value.shape == shape
        else value
        for name, value in inputs.items()
    }
