"""autosteer.json: everything that the export knows about a package. A loader in any language must parse it.

The runtime never guesses what is not here. Unknown keys, missing keys and wrong types are errors: a runtime that
ignored a key might run the gate wrongly.

`split_layer` = k means: `decoder_lower` runs layers 0..k-1, the prober reads the residual stream *entering* layer k
(Hugging Face's `hidden_states[k]`), `decoder_upper` runs layers k..N-1 and the final norm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from .errors import PackageError
from .strict_json import decode, json_schema, parse, shown

FORMAT_VERSION = 2
MANIFEST_FILE = "autosteer.json"
LARGE_FILE = 16 << 20  # bytes: larger files are hashed while the graphs load
MAX_P_UNSAFE_TOLERANCE = 0.05  # a gate whose scores differ more between machines is not the one that was measured
WEIGHTS_FILE = "weights.bin"  # the large tensors of all graphs
REQUIRED_GRAPHS = ("embed_tokens", "decoder_lower", "decoder_upper", "lm_head")
PREFILL_GRAPHS = {
    "decoder_lower": "prefill_lower",
    "decoder_upper": "prefill_upper",
}  # both or neither
GATE_GRAPHS = ("prober", "refusal_head")
# Exactly one, if the model takes images; and the output that it gives for each tile.
IMAGE_GRAPHS = {"vision_encoder": "image_features", "image_tokenizer": "input_ids"}

LARGEST_TILE, LARGEST_GRID = 1 << 14, 1 << 16  # pixels along a side: a wrong manifest must not take all memory
ACTIVATIONS = ("float32", "float16")  # types of hidden states; all graphs of a package have the same
Precision = Literal["fp32", "fp16", "int8", "int4"]
CacheType = Literal["float32", "float16", "int8"]  # numpy names
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic"]
Shape: TypeAlias = "tuple[int | str | None, ...]"  # of a tensor; None: any size
Need: TypeAlias = "Callable[[bool, str], None]"  # raises PackageError with the text unless the condition holds
Tensors: TypeAlias = "dict[str, tuple[str, Shape]]"  # name -> numpy's dtype, shape


@dataclass(frozen=True)
class Source:
    """The checkpoint a package was made from."""

    repo: str  # hub id or the name of the local folder
    revision: str | None  # commit on the hub; None for a local folder
    model_type: str  # Hugging Face config.model_type
    licence: str | None


@dataclass(frozen=True)
class Dims:
    """Sizes of the decoder."""

    hidden_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # most tokens of a prompt and its answer together


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph. Symbolic dimensions are strings."""

    name: str
    dtype: str  # numpy name
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file."""

    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[int, int] | None  # decoder halves: first layer, one past the last
    precision: Precision


@dataclass(frozen=True)
class DataFile:
    """A file of the package that is not a graph: weights, tokenizer, golden pictures, proof states."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class KVCacheSpec:
    """Past and present of one layer are one buffer (1, num_key_value_heads, capacity, head_dim); you choose capacity.

    For int8 caches allocate int8 buffers; the graphs have the scales and quantise what they write.
    """

    dtype: CacheType
    layout: Literal["BNSH"]


@dataclass(frozen=True)
class AnyresSpec:
    """How ImageSpec.kind "anyres" cuts one image into tiles and lays their features out among the tokens."""

    tokens_per_side: int  # image_features of one tile: tokens_per_side ** 2 rows
    grid_pinpoints: tuple[tuple[int, int], ...]  # (height, width) in pixels, in the checkpoint's order
    max_tiles_side: int  # anyres_max_9 -> 9: larger feature grids are shrunk to about this many tiles


@dataclass(frozen=True)
class SplitSpec:
    """How ImageSpec.kind "split" cuts an image into tiles, and adds the whole image as one more."""

    longest_edge: int  # pixels; every picture is scaled to it first
    tiles: bool  # false: only the whole image


@dataclass(frozen=True)
class TileSeparators:
    """The token ids around and between the tiles of an image that was cut into `grid` (rows, columns)."""

    grid: tuple[int, int]
    token_ids: tuple[tuple[int, ...], ...]  # [i]: before the rows of tile i; the last: after all tiles


@dataclass(frozen=True)
class ImageSpec:
    """How an RGB image becomes pixel_values (see image.py).

    The image graph `vision_encoder` turns them into rows for the decoder; `image_tokenizer` turns them into token ids,
    which go through embed_tokens like text.
    """

    kind: Literal["anyres", "centre_crop", "split"]
    tile_size: int  # pixels; the image graph's input is (tiles, 3, tile_size, tile_size)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float
    resample: Resample
    anyres: AnyresSpec | None  # if kind is "anyres"
    split: SplitSpec | None = None  # if kind is "split"
    tile_separators: tuple[TileSeparators, ...] = ()  # one for each grid; empty: no separators


@dataclass(frozen=True)
class VideoSpec:
    """How a video's frames become pixel_values, and the vision_encoder's features become rows (see video.py)."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float
    pooled_side: int  # ImageSpec.anyres.tokens_per_side ** 2 rows of a frame are pooled to pooled_side ** 2


@dataclass(frozen=True)
class TemplatePiece:
    """One piece of the chat template.

    Kinds: `token` is the special token `id` (its string in `text`); `literal` is the plain text `text`; `text`, `image`
    and `video` stand for the user's text, an image's rows and a video's rows. Adjacent literal and user text are
    tokenised together, as plain text.
    """

    kind: Literal["token", "literal", "text", "image", "video"]
    text: str = ""
    id: int = -1


@dataclass(frozen=True)
class TurnSpec:
    """How one role's turn is written: prefix, parts (each an image, a video or a text), suffix."""

    prefix: tuple[TemplatePiece, ...]
    image: tuple[TemplatePiece, ...]
    text: tuple[TemplatePiece, ...]
    suffix: tuple[TemplatePiece, ...]
    lead: tuple[TemplatePiece, ...] = ()  # after the prefix, if the turn's first part is a text
    video: tuple[TemplatePiece, ...] = ()


@dataclass(frozen=True)
class PromptSpec:
    """The chat template as pieces. The export checks that they render as Hugging Face's template does."""

    begin: tuple[TemplatePiece, ...]  # opens a dialogue without a system turn
    system: TurnSpec | None
    user: TurnSpec
    assistant: TurnSpec
    generation: tuple[TemplatePiece, ...]  # opens the answer
    images_first: bool  # reorder a turn's parts: images, videos, texts
    strip_text: bool  # the template strips white space around a turn's text
    end_token_ids: tuple[int, ...]  # generation ends at any of these
    tokenizer: str = "tokenizer.json"

    def turns(self) -> tuple[TurnSpec, ...]:
        """The turns of all roles that the model has."""
        return tuple(turn for turn in (self.system, self.user, self.assistant) if turn)

    def outside(self) -> tuple[TemplatePiece, ...]:
        """Every piece that is not inside a part of a turn."""
        around = [(*turn.prefix, *turn.lead, *turn.suffix) for turn in self.turns()]
        return (*self.begin, *(piece for pieces in around for piece in pieces), *self.generation)

    def inside(self) -> list[tuple[str, tuple[TemplatePiece, ...]]]:
        """(kind, pieces) of every part that a turn can have. Turns that take no images or videos have none of them."""
        kinds = [pair for turn in self.turns() for pair in (("image", turn.image), ("video", turn.video))]
        return [*((kind, part) for kind, part in kinds if part), *(("text", turn.text) for turn in self.turns())]

    def pieces(self) -> tuple[TemplatePiece, ...]:
        """Every piece of the template."""
        return (*self.outside(), *(piece for _, part in self.inside() for piece in part))


@dataclass(frozen=True)
class ProberSpec:
    """What the prober reads, and when it fires."""

    token_offset: int  # position of hidden_states that it reads, from the end of the prompt with its generation prompt
    pooling: Literal["last", "mean"]  # "mean": over that position and all text positions of the turn before it
    threshold: float  # safe = 0 <= p_unsafe <= threshold
    calibration: dict[str, float]  # measured by autosteer-fit on held-out data


@dataclass(frozen=True)
class RefusalSpec:
    """steered = hidden_states + strength * hidden_states @ W.T, before lm_head (the paper's Refusal Head)."""

    strength: float  # the paper's epsilon
    text: str  # the answer to an unsafe prompt under --policy stop
    formula: str = "hidden_states + strength * hidden_states @ W.T"


@dataclass(frozen=True)
class Golden:
    """A prompt and the package's greedy answer to it under --policy steer, on the exporting machine's CPU.

    A prompt whose words must not ship is given as `prompt_ids`: the token ids of the whole rendered prompt. Then
    `prompt` is empty.
    """

    prompt: str
    images: tuple[str, ...]
    threshold: float | None  # the policy's; None: the package's; -1: every prompt is steered
    p_unsafe: float | None
    action: Literal["pass", "steer"]
    token_ids: tuple[int, ...]  # of the answer; if the action is "steer", the unsteered answer differs
    videos: tuple[tuple[str, ...], ...] = ()  # the frames of each
    prompt_ids: tuple[int, ...] = ()

    def pictures(self) -> tuple[str, ...]:
        """All its picture files, frames of videos included."""
        return (*self.images, *(frame for video in self.videos for frame in video))


@dataclass(frozen=True)
class Tolerance:
    """How far results on another machine may differ from the golden ones."""

    p_unsafe: float  # largest difference
    answers: int  # how many golden answers may differ: those with a near tie between tokens


@dataclass(frozen=True)
class SteeredState:
    """lm_head's output for one hidden state, unsteered, and steered at the package's strength."""

    token: int  # the most likely
    steered_token: int  # the most likely after steering; always another one
    shift: float  # root mean square over the vocabulary of what steering adds to the logits


@dataclass(frozen=True)
class GateProof:
    """Hidden states and the gate's outputs for them, to show on any machine and without text that the gate works.

    `file` holds little-endian float32 vectors of hidden_size: what the prober read of a prompt, one for each of
    `p_unsafe`; the last hidden state of a prompt, one for each of `steered`; and the same after the Refusal Head.
    """

    file: str
    p_unsafe: tuple[float, ...]
    steered: tuple[SteeredState, ...]


@dataclass(frozen=True)
class Check:
    """One line of the validation table."""

    name: str
    value: float
    limit: float | None  # None: reported, not enforced
    passed: bool


@dataclass(frozen=True)
class Manifest:
    """The whole package."""

    format_version: int
    source: Source
    precision: Precision
    guarded: bool  # False: made with --unguarded; runs only with --policy off
    split_layer: int
    dims: Dims
    graphs: dict[str, GraphSpec]
    files: tuple[DataFile, ...]
    kv_cache: KVCacheSpec
    prompt: PromptSpec
    image: ImageSpec | None
    prober: ProberSpec | None
    refusal: RefusalSpec | None
    golden: tuple[Golden, ...]
    tolerance: Tolerance
    proof: GateProof | None  # if guarded
    validation: dict[str, tuple[Check, ...]]  # by execution provider
    versions: dict[str, str]  # what exported it
    onnxruntime: str  # the oldest version that computes this package correctly, for example "1.23"
    video: VideoSpec | None = None

    def save(self, folder: Path) -> None:
        """Write autosteer.json into `folder`. Raises ValueError for NaN and infinities, which JSON does not have."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read and check autosteer.json. `verify` checks the files.

        Raises PackageError if it is missing, not JSON, of another format version, or inconsistent.
        """
        path = folder / MANIFEST_FILE
        try:
            if path.exists() and not path.is_file():
                raise ValueError("not a file")  # never wait for a pipe
            data = parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PackageError(
                f"{folder}: no {MANIFEST_FILE} here; is this a folder made by autosteer-export?"
            ) from None
        except (OSError, ValueError) as err:
            raise PackageError(f"{path}: not readable as JSON ({err})") from err
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise PackageError(
                f"{path}: format_version {shown(version)}, this runtime reads {FORMAT_VERSION}; export the model again"
            )
        manifest = decode(Manifest, data, str(path))
        manifest._check_consistency(path)
        return manifest

    def _check_consistency(self, path: Path) -> None:
        def need(condition: bool, what: str) -> None:
            if not condition:
                raise PackageError(f"{path}: {what}")

        for check in (
            self._check_sizes,
            self._check_graphs,
            self._check_image,
            self._check_video,
            self._check_gate,
            self._check_proof,
            self._check_files,
            self._check_golden,
            self._check_prompt,
            self._check_tensors,
        ):
            check(need)

    def _check_sizes(self, need: Need) -> None:
        """Sizes are above zero, and onnxruntime's version is one."""
        for name, size in self._sizes():
            need(0 < size < 2**31, f"{name} is {size}, which is no size")
        need(
            re.fullmatch(r"\d{1,4}\.\d{1,4}", self.onnxruntime) is not None,
            f"onnxruntime: {self.onnxruntime!r} is not a version like '1.23'",
        )

    def _check_graphs(self, need: Need) -> None:
        """The graphs that this runtime runs, and no others; each half has its layers."""
        gate = GATE_GRAPHS if self.guarded else ()
        for name in (*REQUIRED_GRAPHS, *gate):
            need(name in self.graphs, f"graph {name!r} is missing; the package cannot run without it")
        known = {*REQUIRED_GRAPHS, *PREFILL_GRAPHS.values(), *GATE_GRAPHS, *IMAGE_GRAPHS}
        strange = ", ".join(sorted(set(self.graphs) - known))
        need(
            not strange,
            f"this runtime has no use for graph {strange}; without it answers might not be the package's",
        )
        image = [name for name in IMAGE_GRAPHS if name in self.graphs]
        need(
            len(image) == (1 if self.image else 0),
            f"'image' comes with one graph of {', '.join(IMAGE_GRAPHS)}; found: {', '.join(image) or 'none'}",
        )
        k, n = self.split_layer, self.dims.num_hidden_layers
        need(0 < k < n, f"split_layer {k} is not between 1 and {n - 1}")
        prefill = [name for name in PREFILL_GRAPHS.values() if name in self.graphs]
        need(len(prefill) != 1, f"of prefill_lower and prefill_upper there are both or neither; found: {prefill}")
        for half, layers in {"decoder_lower": (0, k), "decoder_upper": (k, n)}.items():
            for name in (half, self.prefill_graph(half)):
                need(self.graphs[name].layers == layers, f"{name} must hold layers {layers[0]}..{layers[1] - 1}")

    def _check_image(self, need: Need) -> None:
        """How pictures are cut."""
        if (image := self.image) is None:
            return
        need((image.kind == "anyres") == (image.anyres is not None), "image: 'kind' and 'anyres' differ")
        need((image.kind == "split") == (image.split is not None), "image: 'kind' and 'split' differ")
        if image.split:
            need(image.split.longest_edge <= LARGEST_TILE, "image: longest_edge is too large")
        need(image.tile_size <= LARGEST_TILE, "image: tile_size is too large")
        need(0.0 not in image.std, "image: std is zero")
        if anyres := image.anyres:
            sides = [side for grid in anyres.grid_pinpoints for side in grid]
            need(bool(sides), "image: grid_pinpoints must be given")
            need(not any(side % image.tile_size for side in sides), "image: grid_pinpoints must be whole tiles")
            need(max(sides) <= LARGEST_GRID, "image: a grid is too large")
        grids = [separators.grid for separators in image.tile_separators]
        need(len(grids) == len(set(grids)), "image: two tile_separators for one grid")
        ids = [i for separators in image.tile_separators for run in separators.token_ids for i in run]
        need(
            all(0 <= i < self.dims.vocab_size for i in ids),
            "image: tile_separators have an id outside the vocabulary",
        )

    def _check_video(self, need: Need) -> None:
        """How videos are pooled."""
        if self.video:
            side = self.image.anyres.tokens_per_side if self.image and self.image.anyres else 0
            need(
                side > 0 and "vision_encoder" in self.graphs, "'video' comes with 'anyres' images and a vision_encoder"
            )
            need(self.video.pooled_side <= side, "video: pooled_side is above tokens_per_side")
            need(0.0 not in self.video.std, "video: std is zero")
        written = any(piece.kind == "video" for piece in self.prompt.pieces())
        need((self.video is not None) == written, "'video' and the prompt's pieces of that kind come together")

    def _check_gate(self, need: Need) -> None:
        """Prober and Refusal Head."""
        need(
            self.guarded == (self.prober is not None) == (self.refusal is not None),
            "'guarded', 'prober' and 'refusal' contradict each other",
        )
        if self.prober and self.refusal:
            need(0.0 <= self.prober.threshold < 1.0, f"prober: threshold {self.prober.threshold:g} is not from 0 to 1")
            need(self.prober.token_offset < 0, "prober: token_offset counts from the end of the prompt: below zero")
            need(self.refusal.strength > 0.0, "refusal: strength must be above zero, or nothing is steered")
            need(bool(self.refusal.text.strip()), "refusal: text is empty")

    def _check_files(self, need: Need) -> None:
        """Every file is inside the package, and has one hash."""
        paths = self.paths()
        for file in paths:
            pure = PurePosixPath(file)
            inside = not pure.is_absolute() and ".." not in pure.parts and not {"\\", "\0"} & set(file)
            need(bool(file) and inside, f"path {file!r} leaves the package")
        for file, digest in self._hashes():
            need(paths[file] == digest, f"{file!r} has two hashes")
        for file in (self.prompt.tokenizer, *(file for golden in self.golden for file in golden.pictures())):
            need(file in paths, f"{file!r} is used but has no hash in 'files'")

    def _check_golden(self, need: Need) -> None:
        """The golden prompts, and how far another machine may be off."""
        for golden in self.golden:
            need(bool(golden.token_ids), "golden: an answer without tokens")
            need(not (golden.prompt_ids and (golden.prompt or golden.pictures())), "golden: a prompt is given twice")
            need(
                all(0 <= i < self.dims.vocab_size for i in (*golden.token_ids, *golden.prompt_ids)),
                "golden: an id outside the vocabulary",
            )
        need(
            0.0 < self.tolerance.p_unsafe <= MAX_P_UNSAFE_TOLERANCE,
            f"tolerance: p_unsafe is not above 0, up to {MAX_P_UNSAFE_TOLERANCE:g}",
        )
        need(0 <= self.tolerance.answers <= len(self.golden), "tolerance: more answers than golden prompts")

    def _check_prompt(self, need: Need) -> None:
        """The pieces of the chat template."""
        for piece in self.prompt.outside():
            need(
                piece.kind in ("token", "literal"),
                f"prompt: a piece {piece.kind!r} stands where no part of a turn goes",
            )
        for kind, part in self.prompt.inside():
            slots = [piece.kind for piece in part if piece.kind not in ("token", "literal")]
            need(slots == [kind], f"prompt: a turn's {kind!r} must have one piece of that kind and no other")
        for piece in self.prompt.pieces():
            fits = piece.kind != "token" or 0 <= piece.id < self.dims.vocab_size
            need(fits, f"prompt: {piece.text!r} has id {piece.id}; the vocabulary ends at {self.dims.vocab_size - 1}")

    def _check_tensors(self, need: Need) -> None:
        """Every graph has the tensors that the loop names, and no others."""
        need(self.activations in ACTIVATIONS, f"hidden_states are {self.activations}, not {' or '.join(ACTIVATIONS)}")
        for name, both_sides in self._expected().items():
            graph = self.graphs[name]
            for expected, tensors in zip(both_sides, (graph.inputs, graph.outputs), strict=True):
                found = {t.name: (t.dtype, t.shape) for t in tensors}
                strange = ", ".join(map(repr, sorted(found.keys() - expected.keys())))
                for tensor, described in expected.items():
                    need(tensor in found, f"graph {name!r} has no {tensor!r}")
                    need(
                        _fits(found[tensor], described), f"graph {name!r}: {tensor!r} is not {described} as 'dims' says"
                    )
                need(not strange, f"graph {name!r}: this runtime has no use for {strange}")
                need(len(found) == len(tensors), f"graph {name!r} has two tensors of one name")

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """(place, value) of everything that must be above 0, and small enough that products of sizes fit 64 bits."""
        yield from ((f"dims: {name}", size) for name, size in dataclasses.asdict(self.dims).items())
        if self.image:
            yield "image: tile_size", self.image.tile_size
            if anyres := self.image.anyres:
                yield "image: tokens_per_side", anyres.tokens_per_side
                yield "image: max_tiles_side", anyres.max_tiles_side
                yield from (("image: grid_pinpoints", side) for grid in anyres.grid_pinpoints for side in grid)
            if self.image.split:
                yield "image: longest_edge", self.image.split.longest_edge
        if self.video:
            yield "video: pooled_side", self.video.pooled_side

    def _check_proof(self, need: Need) -> None:
        """The states that prove the gate on another machine."""
        need(self.guarded == (self.proof is not None), "'guarded' and 'proof' contradict each other")
        if self.proof is None:
            return
        need(bool(self.proof.p_unsafe), "proof: no hidden state for the prober")
        need(all(0.0 <= p <= 1.0 for p in self.proof.p_unsafe), "proof: a p_unsafe is not from 0 to 1")
        need(bool(self.proof.steered), "proof: no hidden state for the Refusal Head")
        for state in self.proof.steered:
            ids = (state.token, state.steered_token)
            need(all(0 <= i < self.dims.vocab_size for i in ids), "proof: an id outside the vocabulary")
            need(
                state.token != state.steered_token,
                "proof: a state whose token steering leaves as it was proves nothing",
            )
            need(state.shift > 0.0, "proof: a shift is not above zero")
        size = 4 * self.dims.hidden_size * (len(self.proof.p_unsafe) + 2 * len(self.proof.steered))
        found = next((file.bytes for file in self.files if file.file == self.proof.file), None)
        need(found == size, f"proof: {self.proof.file!r} must be in 'files' with {size} bytes")

    def _expected(self) -> dict[str, tuple[Tensors, Tensors]]:
        """By graph: the inputs that the loop binds, and the outputs that it reads. A graph has no others."""
        d, f32, act = self.dims, "float32", self.activations
        rows, last = (1, "sequence_length", d.hidden_size), (1, "num_logits", d.hidden_size)

        def caches(half: str, side: str, length: str) -> Tensors:
            layers = self.graphs[half].layers
            assert layers is not None
            described = self.kv_cache.dtype, (1, d.num_key_value_heads, length, d.head_dim)
            return {f"{side}.{i}.{kind}": described for i in range(*layers) for kind in ("key", "value")}

        def half(name: str, source: str, target: Tensors, more: Tensors) -> tuple[Tensors, Tensors]:
            lengths: Tensors = {"seqlens_k": ("int32", (1,)), "total_sequence_length": ("int32", ())}
            past = caches(name, "past_key_values", "past_sequence_length")
            return {source: (act, rows), **lengths, **more, **past}, target | caches(
                name, "present", "total_sequence_length"
            )

        ending: Tensors = {"last_hidden_state": (act, last)}
        ids: Tensors = {"input_ids": ("int64", (1, "sequence_length"))}
        expected: dict[str, tuple[Tensors, Tensors]] = {
            "embed_tokens": (ids, {"inputs_embeds": (act, rows)}),
            "decoder_lower": half("decoder_lower", "inputs_embeds", {"hidden_states": (act, rows)}, {}),
            "decoder_upper": half("decoder_upper", "hidden_states", ending, {"num_logits": ("int64", (1,))}),
            "lm_head": (ending, {"logits": (f32, (1, "num_logits", d.vocab_size))}),
        }
        expected |= {self.prefill_graph(half): expected[half] for half in PREFILL_GRAPHS}
        if self.guarded:
            expected["prober"] = {"hidden_states": (f32, (1, d.hidden_size))}, {"p_unsafe": (f32, (1,))}
            expected["refusal_head"] = {**ending, "strength": (f32, (1,))}, {"steered_hidden_state": (act, last)}
        return expected | self._expected_of_images()

    def _expected_of_images(self) -> dict[str, tuple[Tensors, Tensors]]:
        """The same of the image graph. How many rows or ids it gives for a tile is its own affair."""
        if self.image is None:
            return {}
        d, n = self.dims.hidden_size, self.image.tile_size
        pixels: Tensors = {"pixel_values": ("float32", ("tiles", 3, n, n))}
        newline: Tensors = {"image_newline": ("float32", (d,))} if self.image.anyres else {}
        outputs: dict[str, Tensors] = {
            "vision_encoder": {"image_features": ("float32", (None, None, d)), **newline},
            "image_tokenizer": {"input_ids": ("int64", (None, None))},
        }
        return {name: (pixels, made) for name, made in outputs.items() if name in self.graphs}

    def prefill_graph(self, half: str) -> str:
        """The graph that runs prefill for a decoder half: its copy at another precision, or else the half itself."""
        return PREFILL_GRAPHS[half] if PREFILL_GRAPHS[half] in self.graphs else half

    @property
    def activations(self) -> str:
        """numpy name of the type of hidden states: float16 in packages for CUDA, else float32."""
        return next((t.dtype for t in self.graphs["decoder_lower"].outputs if t.name == "hidden_states"), "float32")

    @property
    def exact(self) -> bool:
        """Whether all machines give the same tokens: float32 arithmetic, and no int8 or int4 weights or caches."""
        precisions = {self.precision, *(graph.precision for graph in self.graphs.values())}
        return {self.activations, self.kv_cache.dtype} == {"float32"} and precisions <= {"fp32", "fp16"}

    def paths(self) -> dict[str, str]:
        """sha256 of every file of the package, by relative path."""
        return dict(self._hashes())

    def _hashes(self) -> list[tuple[str, str]]:
        return [*((g.file, g.sha256) for g in self.graphs.values()), *((f.file, f.sha256) for f in self.files)]

    @contextlib.contextmanager
    def verifying(self, folder: Path) -> Iterator[None]:
        """Compare every file with its hash: small ones before the block, large ones in a thread while it runs.

        The block may load the large files, which are plain numbers, but must not answer from them: they are verified
        only when it ends. Raises PackageError naming a file that is missing or differs.
        """
        large = {file.file for file in self.files if file.bytes >= LARGE_FILE}
        self.verify(folder, self.paths().keys() - large)
        with ThreadPoolExecutor(1) as pool:
            checked = pool.submit(self.verify, folder, large)
            try:
                yield
            finally:
                checked.result()  # raise for a wrong hash rather than for what it broke in the block

    def verify(self, folder: Path, files: Collection[str] | None = None) -> None:
        """Compare `files` (default: all) with their hashes. Raises PackageError naming the first file that is missing
        or differs.
        """
        if WEIGHTS_FILE not in self.paths() and (folder / WEIGHTS_FILE).exists():  # graphs read it all the same
            raise PackageError(f"{folder / WEIGHTS_FILE}: has no hash in {MANIFEST_FILE}; export the package again")
        for file, expected in self.paths().items():
            if files is not None and file not in files:
                continue
            path = folder / file
            try:
                digest = sha256(path) if path.is_file() else None
            except OSError as err:
                raise PackageError(f"{path}: not readable ({err})") from err
            if digest is None:
                raise PackageError(f"{path}: missing; export the package again or copy it again")
            if digest != expected:
                raise PackageError(
                    f"{path}: sha256 differs from {MANIFEST_FILE} (package damaged or edited); "
                    "export it again or copy it again"
                )


def _fits(found: tuple[str, Shape], described: tuple[str, Shape]) -> bool:
    """Whether a tensor has the described dtype and shape, in which None is any size."""
    (dtype, shape), (expected, sizes) = found, described
    fits = (size in (None, n) for n, size in zip(shape, sizes, strict=False))
    return dtype == expected and len(shape) == len(sizes) and all(fits)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def schema_text() -> str:
    """The content of autosteer.schema.json, from the dataclasses above. To regenerate it:

    python -m autosteer.runtime.manifest > runtime/autosteer.schema.json
    """
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{MANIFEST_FILE} {FORMAT_VERSION}"}
    return json.dumps(head | json_schema(Manifest), indent=1) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
