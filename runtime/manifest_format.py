"""What autosteer.json says, as dataclasses. manifest_checks.py has what they must satisfy, manifest.py reads the file.

`split_layer` = k means: `decoder_lower` runs layers 0..k-1, the prober reads the residual stream *entering* layer k
(Hugging Face's `hidden_states[k]`), `decoder_upper` runs layers k..N-1 and the final norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

REQUIRED_GRAPHS = ("embed_tokens", "decoder_lower", "decoder_upper", "lm_head")
ROTARY_TABLES = ("cos_cache", "sin_cache")  # inputs of the decoder halves; RotarySpec.by_table
ATTENTION_BIAS = "attention_bias"  # an input of decoder_lower, if several texts may share a pass (packed.py)
PREFILL_GRAPHS = {
    "decoder_lower": "prefill_lower",
    "decoder_upper": "prefill_upper",
}  # both or neither
GATE_GRAPHS = ("prober", "refusal_head")
MONITOR_GRAPH = "monitor"  # if Contents.monitor
# Exactly one, if the model takes images; and the output that it gives for each tile.
IMAGE_GRAPHS = {"vision_encoder": "image_features", "image_tokenizer": "input_ids"}

Precision = Literal["fp32", "fp16", "int8", "int4"]
CacheType = Literal["float32", "float16", "int8"]  # numpy names
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic"]


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

    @property
    def quantised(self) -> bool:
        """Whether its weights are rounded to 8 or 4 bits."""
        return self.precision in ("int8", "int4")


@dataclass(frozen=True)
class DataFile:
    """A file of the package that is not a graph: weights, tokenizer, golden pictures, proof states, drafts."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class KVCacheSpec:
    """Past and present of one layer are one buffer (batch, num_key_value_heads, capacity, head_dim); capacity is yours.

    For int8 caches allocate int8 buffers; the graphs have the scales and quantise what they write.
    """

    dtype: CacheType
    layout: Literal["BNSH"]


@dataclass(frozen=True)
class LongRotary:
    """Other frequencies of long prompts (HF: longrope). They turn all positions, so an answer to a shorter prompt ends
    where they would begin.
    """

    beyond: int  # positions; longer prompts have these frequencies
    frequencies: tuple[float, ...]  # as RotarySpec's


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding: cos and sin of position * frequency, both times `scale` (see rotary.py)."""

    # Radians a position, float32 values: one for each pair of a head's numbers that is rotated, at most head_dim / 2.
    # The pairs are the number i and that behind it by as many as there are frequencies; later ones stay as they are.
    frequencies: tuple[float, ...]
    scale: float  # HF: attention_scaling
    # By frequency: which of a row's three positions it reads: 0 time, 1 row, 2 column (HF: mrope_section). Empty: a row
    # has one position, its index in the sequence, in text and pictures alike.
    axes: tuple[int, ...]
    long: LongRotary | None = None
    windowed: tuple[float, ...] = ()  # other frequencies, as many, of layers with a window (Gemma 3); empty: the same

    def by_table(self) -> dict[str, RotarySpec]:
        """That of each pair of tables that the graphs read: "" for `cos_cache` and `sin_cache`, and "windowed_" for
        `windowed_cos_cache` and `windowed_sin_cache`, if layers with a window read others.
        """
        windowed = {"windowed_": replace(self, frequencies=self.windowed, windowed=())} if self.windowed else {}
        return {"": replace(self, windowed=()), **windowed}

    def is_long(self, length: int) -> bool:
        """Whether a prompt of `length` has the other frequencies."""
        return self.long is not None and length > self.long.beyond

    def of(self, length: int) -> RotarySpec:
        """That of a prompt of `length`."""
        return replace(self, frequencies=self.long.frequencies) if self.long and self.is_long(length) else self

    def longest_answer(self, length: int, context: int) -> int:
        """Most tokens of an answer to a prompt of `length`: the last one has no position yet."""
        most = context - length
        return most if self.long is None or self.is_long(length) else min(most, self.long.beyond + 1 - length)


@dataclass(frozen=True)
class AnyresSpec:
    """How ImageSpec.kind "anyres" cuts one image into tiles and lays their features out among the tokens."""

    tokens_per_side: int  # image_features of one tile: tokens_per_side ** 2 rows
    grid_pinpoints: tuple[tuple[int, int], ...]  # (height, width) in pixels, in the checkpoint's order
    max_tiles_side: int  # anyres_max_9 -> 9: larger feature grids are shrunk to about this many tiles
    each: bool = False  # each of several pictures is cut like one alone; false: each becomes one square tile


@dataclass(frozen=True)
class SplitSpec:
    """How ImageSpec.kind "split" cuts an image into tiles, and adds the whole image as one more."""

    longest_edge: int  # pixels; every picture is scaled to it first
    tiles: bool  # false: only the whole image


@dataclass(frozen=True)
class ClosestGridSpec:
    """How kind "closest_grid" cuts an image into tiles; the whole image is one more, unless there is one tile.

    The rows of all tiles are one run.
    """

    min_tiles: int  # without the whole image
    max_tiles: int


@dataclass(frozen=True)
class NativeSpec:
    """How ImageSpec.kind "native" scales a picture: to whole tiles, at about its own size. The graph cuts it, and makes
    one row of each tile.
    """

    min_pixels: int  # smaller pictures are enlarged, larger ones than max_pixels shrunk
    max_pixels: int
    frames: int  # pictures that the graph reads as one: of a video, successive frames; a picture is given as often
    deepstack: int = 0  # first decoder layers to whose output a row adds a further part: see deepstack.py


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

    kind: Literal["anyres", "centre_crop", "closest_grid", "native", "pad_to_square", "split"]
    # Pixels. The image graph's input is (tiles, 3, tile_size, tile_size); for "native" (frames, 3, height, width), with
    # sides that are multiples of it.
    tile_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float
    resample: Resample
    anyres: AnyresSpec | None  # if kind is "anyres"
    split: SplitSpec | None = None  # if kind is "split"
    native: NativeSpec | None = None  # if kind is "native"
    tile_separators: tuple[TileSeparators, ...] = ()  # one for each grid; empty: no separators
    closest_grid: ClosestGridSpec | None = None  # if kind is "closest_grid"


@dataclass(frozen=True)
class NativeVideoSpec:
    """How the frames of a video are scaled, all alike, where pictures are "native"; and how its rows stand in time."""

    min_pixels: int  # smaller frames are enlarged, larger ones than max_pixels shrunk
    max_pixels: int
    whole: bool  # the two bound the pixels of all frames together; false: those of each
    tokens_per_second: float  # positions of the time axis; 0: one for each group of frames


@dataclass(frozen=True)
class VideoSpec:
    """How a video's frames become pixel_values, and the vision_encoder's features become rows (see video.py)."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float
    # If ImageSpec.kind is "anyres": tokens_per_side ** 2 rows of a frame are pooled to pooled_side ** 2.
    pooled_side: int | None
    native: NativeVideoSpec | None = None  # if it is "native"


@dataclass(frozen=True)
class TemplatePiece:
    """One piece of the chat template.

    Kinds: `token` is the special token `id` (its string in `text`); `literal` is the plain text `text`; `text`, `image`
    and `video` stand for the user's text, an image's rows and a video's rows; `seconds` for the time of a FrameGroup,
    as text with one decimal. Adjacent literal and user text are tokenised together, as plain text.
    """

    kind: Literal["token", "literal", "text", "image", "video", "seconds"]
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
class FrameGroup:
    """What is written for each group of a video's frames that the image graph reads as one."""

    frames: int  # of a group; the last one is filled up with the last frame
    pieces: tuple[TemplatePiece, ...]  # `video` stands for the group's rows, `seconds` for the mean of its ends' times


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
    frame_group: FrameGroup | None = None  # in the place of a turn's `video`; None: all rows of a video are one run

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
        grouped = self.frame_group.pieces if self.frame_group else ()
        return (*self.outside(), *(piece for _, part in self.inside() for piece in part), *grouped)


@dataclass(frozen=True)
class ProberSpec:
    """What the prober reads, and when it fires."""

    token_offset: int  # position of hidden_states that it reads, from the end of the prompt with its generation prompt
    pooling: Literal["last", "mean"]  # "mean": over that position and all text positions of the turn before it
    threshold: float  # safe = 0 <= p_unsafe <= threshold
    calibration: dict[str, float]  # measured by autosteer-fit on held-out data
    judge_answers: bool = False  # whether requests that do not say it have their answers judged (gate.GatePolicy)
    judge_threshold: float | None = None  # an answer that is judged is unsafe above it, too; at most the threshold


@dataclass(frozen=True)
class MonitorSpec:
    """When the graph `monitor`, which has the prober's shape, stops an answer (see monitor.py)."""

    window: int  # tokens whose mean hidden state it reads
    threshold: float  # an answer goes on while 0 <= p_unsafe <= threshold
    calibration: dict[str, float]  # measured by autosteer-fit on held-out answers


@dataclass(frozen=True)
class DraftSpec:
    """N-grams of the model's own answers, from which free text is drafted (see draft_table.py)."""

    file: str
    ngrams: int


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
    seconds: tuple[tuple[float, ...], ...] = ()  # when each frame of each video is shown; empty: nothing says so

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
    monitor: tuple[float, ...] = ()  # the monitor's output for the states of `p_unsafe`, if there is a monitor


@dataclass(frozen=True)
class Check:
    """One line of the validation table."""

    name: str
    value: float
    limit: float | None  # None: reported, not enforced
    passed: bool


UNSIGNED = "0" * 64


@dataclass(frozen=True)
class Contents:
    """The whole package; `Manifest` (manifest.py) reads and verifies it."""

    format_version: int
    source: Source
    precision: Precision
    guarded: bool  # False: made with --unguarded; runs only with --policy off
    split_layer: int
    dims: Dims
    graphs: dict[str, GraphSpec]
    files: tuple[DataFile, ...]
    kv_cache: KVCacheSpec
    rotary: RotarySpec
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
    monitor: MonitorSpec | None = None  # None: nothing watches answers
    drafts: DraftSpec | None = None  # None: only what an answer copies is drafted
    manifest_sha256: str = field(default=UNSIGNED, compare=False)  # of this file's bytes with UNSIGNED in this place

    def prefill_graph(self, half: str) -> str:
        """The graph that runs prefill for a decoder half: its copy at another precision, or else the half itself."""
        return PREFILL_GRAPHS[half] if PREFILL_GRAPHS[half] in self.graphs else half

    def judges_answers(self, asked: bool | None, *, pieces: bool) -> bool:
        """Whether the answers of a request are judged that says `asked`, or nothing of it (None): as the prober's spec
        says, but not without pieces.
        """
        return asked if asked is not None else pieces and self.prober is not None and self.prober.judge_answers

    @property
    def deepstack(self) -> int:
        """How many decoder layers, the first ones, have an input that is added to their output."""
        return self.image.native.deepstack if self.image and self.image.native else 0

    @property
    def reads_in_packs(self) -> bool:
        """Whether decoder_lower can run over several texts in one pass."""
        return any(t.name == ATTENTION_BIAS for t in self.graphs["decoder_lower"].inputs)

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
        return dict(self.hashes())

    def hashes(self) -> list[tuple[str, str]]:
        """(path, sha256) of every entry; a file may have several."""
        return [*((g.file, g.sha256) for g in self.graphs.values()), *((f.file, f.sha256) for f in self.files)]
