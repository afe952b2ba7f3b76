"""The PyTorch original, asked the questions that the runtime is asked.

The model may be Hugging Face's as it comes (checkpoint.load_reference), or one whose weights stay on disk
(on_demand.py); the first can generate, the second can follow an answer: given the prompt and an answer in one forward
pass, it says which token it would have written at each place. As long as that is the answer's own token, the two agree
on every choice made so far; so "follows the whole answer" is "generates the same answer".
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from autosteer.export.checkpoint.chat_template import hf_messages
from autosteer.export.graphs.decoder import BRANCHES
from autosteer.export.graphs.kv_scales import uncached
from autosteer.export.graphs.vision import VQTokenizer
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime.gate import worst
from autosteer.runtime.image import ImageLike, cut, open_image
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.prompt_encoder import probed_positions
from autosteer.runtime.text import Message, asked_turns

ANSWER_TOKENS = 32
NEAR_TIE = 5e-5  # of the largest squared distance: torch and onnxruntime differ by 1.4e-5 at Chameleon's depth
NEVER = -1e38  # logits below it belong to tokens that HF masks with the lowest float32


@dataclass(frozen=True)
class Case:
    """A dialogue to compare on. Files are relative to the package.

    A prompt whose words are not known is given by its tokens: `prompt_ids` are those of a user turn without pictures as
    the template renders it, generation prompt included; `messages` is then one empty turn.
    """

    messages: tuple[Message, ...]
    image_files: tuple[str, ...]
    video_files: tuple[tuple[str, ...], ...] = ()  # the frames of each
    prompt_ids: tuple[int, ...] = ()
    unsafe: bool | None = None  # what the safety folder says of it; None: not one of its prompts

    @property
    def images(self) -> list[ImageLike]:
        return [image for message in self.messages for image in message.images]

    @property
    def videos(self) -> list[tuple[ImageLike, ...]]:
        return [frames for message in self.messages for frames in message.videos]

    @property
    def kind(self) -> tuple[object, ...]:
        """What it shows: one of each kind is compared, whatever that takes."""
        return bool(self.images), len(self.images) > 1, bool(self.videos), len(self.messages) > 1, self.unsafe


@dataclass(frozen=True)
class ImageErrors:
    """The package's image tokens that are not Hugging Face's."""

    wrong: int
    near_ties: int  # two codes were equally near, up to rounding; there is no right one


@dataclass(frozen=True)
class Original:
    """What PyTorch made of a case."""

    pixel_values: np.ndarray  # (tiles of all images, then frames of all videos; 3, size, size)
    image_errors: ImageErrors | None  # of the package's image tokens, where images are tokens
    embeds: np.ndarray  # (S, D)
    hidden: np.ndarray  # (D,) what the prober reads of the last turn
    spread: np.ndarray  # (D,) how much each of its numbers differs from row to row of the prompt: standard deviation
    logits: np.ndarray  # (n, V) after the prompt, and after each token of the answer but the last
    p_unsafe: float
    tokens: list[int]
    steered_tokens: list[int]


@dataclass(frozen=True)
class Pass:
    """What one forward pass showed."""

    entering: dict[int, torch.Tensor]  # by layer: the residual entering it, of the prompt's rows (S, D)
    head: torch.Tensor  # (n, D) what the head was given
    logits: torch.Tensor  # (n, V) after the prompt, and after each token of an answer but the last


class Reference:
    """The PyTorch original, asked the questions that the runtime is asked."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        manifest: Manifest,
        safety: SafetyArtifact | None,
        caching: Callable[[Any], dict[str, Any]] = uncached,
    ):
        """`caching` makes, of a model, the arguments of one pass that say what becomes of keys and values."""
        self.caching = caching
        self.model, self.processor, self.manifest, self.safety = model, processor, manifest, safety

    def inputs(self, case: Case) -> dict[str, Any]:
        """The processor's tensors for a case."""
        if case.prompt_ids:
            ids = torch.tensor([case.prompt_ids])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        text = self.processor.apply_chat_template(hf_messages(case.messages), add_generation_prompt=True)
        shown: dict[str, Any] = {}
        if case.images:
            shown["images"] = [[Image.fromarray(open_image(image)) for image in case.images]]
        if case.videos:
            shown["videos"] = [[np.stack([open_image(frame) for frame in frames]) for frames in case.videos]]
        return dict(self.processor(text=[text], **shown, return_tensors="pt"))

    def run(self, case: Case, ours: list[list[int]] | None = None) -> Original:
        """Everything PyTorch computes of a case, its own greedy answers among it; for a model in memory.

        `ours` are the package's image tokens. Where they differ from HF's at near ties only, PyTorch goes on with ours,
        so that what follows is still compared.
        """
        inputs, errors = self._agreed(self.inputs(case), ours)
        strength = self.safety.facts.strength if self.safety else 0.0
        steered = self.generate(inputs, strength=strength) if strength else []
        return self._original(case, errors, self.look(inputs, self._layers), self.generate(inputs), steered)

    def follow(
        self, case: Case, answer: Sequence[int], steered: Sequence[int], ours: list[list[int]] | None = None
    ) -> Original:
        """As `run`, but along the package's answers, plain and steered: `tokens` and `steered_tokens` are what PyTorch
        would have written at each of their places. An empty `steered` is not followed, and no answer beyond a token
        that stands for an image: HF would look for the image. For a model on demand.
        """
        inputs, errors = self._agreed(self.inputs(case), ours)
        seen = self.look(inputs, self._layers, self._until_image(answer))
        bent = (
            self._steered_choices(self.look(inputs, (), self._until_image(steered)), seen.logits[0]) if steered else []
        )
        return self._original(case, errors, seen, seen.logits.argmax(-1).tolist(), bent)

    def _original(
        self, case: Case, errors: ImageErrors | None, seen: Pass, tokens: list[int], steered: list[int]
    ) -> Original:
        inputs = self.inputs(case)
        pixels = [inputs[name].flatten(0, -4) for name in ("pixel_values", "pixel_values_videos") if name in inputs]
        read = self._read(case, inputs, seen)
        return Original(
            pixel_values=torch.cat(pixels or [torch.empty(0, 3, 1, 1)]).numpy(),
            image_errors=errors,
            embeds=seen.entering[0].numpy(),
            hidden=read[-1].numpy(),
            spread=seen.entering[self.manifest.split_layer][1:].std(dim=0).numpy(),  # the first row is like no other
            logits=seen.logits.numpy(),
            p_unsafe=worst(map(self.p_unsafe, read)),
            tokens=tokens,
            steered_tokens=steered,
        )

    @torch.no_grad()
    def look(self, inputs: dict[str, Any], layers: Sequence[int], answer: Sequence[int] = (0,)) -> Pass:
        """One forward pass over a prompt and all but the last token of an answer: what enters `layers`, and what comes
        out.
        """
        length, seen, me = inputs["input_ids"].shape[1], {}, threading.get_ident()

        def note(name: int | str) -> Callable[..., None]:
            def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if threading.get_ident() == me:
                    seen[name] = args[0] if args else kwargs["hidden_states"]

            return hook

        decoder = self.model.get_decoder()
        watched = {i: decoder.layers[i] for i in layers}
        handles = [
            module.register_forward_pre_hook(note(name), with_kwargs=True)
            for name, module in (*watched.items(), ("head", self.model.lm_head))
        ]
        try:
            out = self.model(**_extended(inputs, answer[:-1]), **self.caching(self.model), logits_to_keep=len(answer))
        finally:
            for handle in handles:
                handle.remove()
        return Pass({i: seen[i][0, :length] for i in watched}, seen["head"][0], out.logits[0])

    @torch.no_grad()
    def branches(self, embeds: np.ndarray, given: Mapping[str, np.ndarray], logits: np.ndarray) -> dict[str, float]:
        """How far each branch of the decoder (attention, MLP; the final norm; the head) is from what PyTorch makes of
        the very rows that the package's own branches before it made: errors do not add up from layer to layer, and
        none hides behind a residual stream that others have filled.

        `embeds` (S, D) enter the decoder. `given` are the last rows of the package's branches by name
        ("<layer>.self_attn", "<layer>.mlp": HF's modules) and `last_hidden_state`; `logits` (1, V) come after them. The
        errors (see `row_error`) by the same names; infinite where nothing is given.
        """
        decoder, me = self.model.get_decoder(), threading.get_ident()

        def take_over(name: str) -> Callable[..., Any]:
            def hook(module: Any, args: tuple[Any, ...], out: Any) -> Any:
                if threading.get_ident() != me:
                    return out
                theirs = out[0] if isinstance(out, tuple) else out
                ours = torch.from_numpy(given[name].astype(np.float32))
                mixed = theirs.clone()
                mixed[:, -ours.shape[1] :] = ours
                errors[name] = row_error(ours[0].numpy(), theirs[0, -ours.shape[1] :].numpy())
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
            rows = torch.from_numpy(embeds.astype(np.float32))[None]
            theirs = self.model(inputs_embeds=rows, **self.caching(self.model), logits_to_keep=1).logits[0].numpy()
        finally:
            for handle in handles:
                handle.remove()
        ours, possible = logits[0], theirs[0] > NEVER
        errors["logits"] = row_error(*(x[None, possible] - x[possible].mean() for x in (ours, theirs[0])))
        return errors

    @torch.no_grad()
    def _steered_choices(self, seen: Pass, plain: torch.Tensor) -> list[int]:
        """The tokens that the authors' formula prefers, logits = h (E + strength * E W)^T, for every row of the head's
        input; E in blocks. Tokens that `plain` (V,) masks stay masked.
        """
        assert self.safety is not None
        strength, matrix = self.safety.facts.strength, self.safety.steer_matrix
        blocks = self.model.lm_head.blocks()
        logits = torch.cat([seen.head @ (block + strength * block @ matrix).T for block in blocks], dim=-1)
        return logits.masked_fill(plain < NEVER, NEVER).argmax(-1).tolist()

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

    def _agreed(
        self, inputs: dict[str, Any], ours: list[list[int]] | None
    ) -> tuple[dict[str, Any], ImageErrors | None]:
        """The inputs, with our image tokens instead of pixels where they differ from HF's at near ties only."""
        if not ours:
            return inputs, None
        errors = self.image_errors(inputs["pixel_values"], ours)
        if errors.wrong or not errors.near_ties:
            return inputs, errors
        ids = inputs["input_ids"].clone()
        ids[ids == self.processor.image_token_id] = torch.tensor(ours).flatten()
        return {name: t for name, t in inputs.items() if name != "pixel_values"} | {"input_ids": ids}, errors

    def _read(self, case: Case, inputs: dict[str, Any], seen: Pass) -> list[torch.Tensor]:
        """What the prober reads, (D,) a turn."""
        states = seen.entering[self.manifest.split_layer]
        return [states[rows].mean(dim=0) for rows in self._probed(case, inputs["input_ids"][0])]

    def p_unsafe(self, hidden: torch.Tensor) -> float:
        """The authors' prober on one hidden state (D,); nan where the package has none."""
        if self.safety is None:
            return float("nan")
        w = self.safety.prober
        x = torch.relu(w["0.weight"] @ hidden + w["0.bias"])
        return float(torch.softmax(w["2.weight"] @ x + w["2.bias"], 0)[0])

    def generate(self, inputs: dict[str, Any], strength: float = 0.0, tokens: int = ANSWER_TOKENS) -> list[int]:
        """Greedy tokens; steered as the authors do, by an output embedding E + strength * E W."""
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

    @property
    def _placeholders(self) -> list[int]:
        """The tokens that stand for rows of images and videos in HF's input ids."""
        names = ("image_token_id", "video_token_id") if self.manifest.video else ("image_token_id",)
        return [token for name in names if (token := getattr(self.processor, name, None)) is not None]

    @property
    def _layers(self) -> tuple[int, int]:
        return 0, self.manifest.split_layer

    def _probed(self, case: Case, ids: torch.Tensor) -> list[list[int]]:
        """Rows whose mean the prober reads, turn by turn, of HF's own input ids (S,) with a placeholder for each row of
        a picture.
        """
        text = (~torch.isin(ids, torch.tensor(self._placeholders, dtype=ids.dtype))).nonzero()[:, 0].tolist()
        turns = asked_turns(case.messages, self.manifest.prompt, self.processor.tokenizer.backend_tokenizer)
        if case.prompt_ids:  # only the turn's beginning is the template's: it ends where the prompt does
            turns = [replace(turn, through=len(case.prompt_ids)) for turn in turns]
        framing = self._framing(case)
        return [probed_positions(self.manifest.prober, turn, case.messages, text, framing) for turn in turns]

    def _framing(self, case: Case) -> list[int]:
        """Token ids that frame each image."""
        spec, alone = self.manifest.image, len(case.images) == 1
        length = {frame.grid: sum(map(len, frame.token_ids)) for frame in spec.tile_separators} if spec else {}
        images = [image for message in case.messages for image in message.images]
        if spec is None or not length:
            return [0] * len(images)
        return [length[cut(open_image(image), spec, alone=alone)[1]] for image in images]


def _extended(inputs: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """A processor's tensors with text tokens added at the end."""
    more = torch.tensor([list(tokens)], dtype=torch.int64)
    fill = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    shape = inputs["input_ids"].shape
    return {
        name: torch.cat([value, fill.get(name, torch.zeros_like(more)).to(value.dtype)], 1)
        if value.shape == shape
        else value
        for name, value in inputs.items()
    }


def row_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far rows (R, D) are from the reference's, relative to each of those, on average over rows."""
    sizes = np.maximum(np.linalg.norm(theirs, axis=1), 1e-30)
    return float((np.linalg.norm(ours - theirs, axis=1) / sizes).mean())
