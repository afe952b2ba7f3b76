"""A dialogue, its pictures and its videos -> the decoder's input embeddings.

    text    -> token ids ------------------------------------------> embed_tokens -> rows
    picture -> tiles -> pixels -> vision_encoder ---------------------------------> rows, and token ids between them
                                  image_tokenizer (where images are tokens) -> ids -> embed_tokens -> rows
    video   -> frames -> pixels -> vision_encoder (pooled) ------------------------> rows; with text between groups of
                                                                                     frames, if the template says so

Pictures are opened and encoded one after the other, a few tiles at a time, and only as long as the prompt fits the
context.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from . import image as images_
from . import picture_file
from . import video as videos_
from .arrays import Float, Uint8
from .conversation import Conversation
from .encoded_prompt import EncodedPrompt, Key, Probed, Seen
from .errors import InputError, PackageError
from .manifest import IMAGE_GRAPHS, ImageSpec, Manifest, ProberSpec, VideoSpec
from .picture_file import ImageLike
from .rotary import PositionCounter
from .stats import Stats, ms_since
from .subgraph import Subgraph
from .text import IMAGE, VIDEO, JudgedTurn, Message, Place, Rendered, VideoPart, render_judged

Encode = Callable[..., images_.Runs]

CHARACTERS_A_TOKEN = 16  # more than any text has, on average; English has 4 to 5
TILES_PER_RUN = 2  # bounds the image graph's activations: 4 take 120 MB more at SigLIP-so400m's size, and as long


class _Opened(NamedTuple):
    """A picture or a video that was opened, and not encoded yet."""

    sha256: str
    use: str  # how it is encoded
    encode: Encode
    grid: tuple[int, int] | None  # as in Seen
    times: tuple[int, ...] = (0,)
    apart: int = 1  # places in the prompt that it fills: of its runs, each has as many


class PromptEncoder:
    """Encodes prompts for one package. Keeps no state of a dialogue."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        graph: Callable[[str], Subgraph],
        max_tiles: int | None = None,
    ):
        """`graph`: returns a loaded graph by name. `max_tiles`: a picture, or a frame of a video for a model that takes
        them in any size, is cut into so many at most.
        """
        self.manifest, self._tokenizer, self._graph, self._max_tiles = manifest, tokenizer, graph, max_tiles
        self._image = manifest.image and images_.at_most(manifest.image, max_tiles)

    def prepare(
        self,
        messages: Sequence[Message],
        stats: Stats,
        conversation: Conversation | None = None,
    ) -> EncodedPrompt:
        """Render a dialogue, encode its images and videos, and lay everything out as the decoder's input.

        What does not fit the context is refused before anything is embedded. Raises InputError for that, and for an
        unusable message, image or video.
        """
        pictures = [image for message in messages for image in message.images]
        if pictures and self.manifest.image is None:
            raise InputError("this model takes no images")
        self._check_videos(messages)
        check_characters(self.manifest, messages)
        runs, turns = render_judged(messages, self.manifest.prompt, self._tokenizer)
        before = time.perf_counter()
        seen = self._see(runs, messages, stats, conversation)
        stats.vision_ms = ms_since(before)
        return self._assemble(runs, turns, seen, stats)

    def prepare_seen(
        self, messages: Sequence[Message], seen: Sequence[Seen], stats: Stats, probed: int = 1
    ) -> EncodedPrompt:
        """Turns of a dialogue as a prompt of their own that ends where the prober reads the last. `seen`: their
        pictures and videos as the dialogue has them, which are not opened or encoded again (EncodedPrompt.seen).
        `probed`: how many of the last judged turns the prober reads.

        Raises InputError if it does not fit the context.
        """
        runs, turns = render_judged(messages, self.manifest.prompt, self._tokenizer)
        length = sum(len(run) for run in runs if isinstance(run, list)) + sum(one.rows for one in seen)
        check_length(self.manifest, length)
        of_kind = {kind: deque(one for one in seen if one.video is (kind is VIDEO)) for kind in (IMAGE, VIDEO)}
        in_order = [of_kind[run].popleft() for run in runs if not isinstance(run, list)]  # as the template has them
        whole = self._assemble(runs, turns[-probed:], in_order, stats)
        end = whole.probed[-1][-1] + 1 if whole.probed[-1] else len(whole.keys)
        return replace(
            whole, inputs_embeds=whole.inputs_embeds[:, :end], keys=whole.keys[:end], positions=whole.positions[:, :end]
        )

    def _assemble(
        self, runs: Rendered, turns: Sequence[JudgedTurn], seen: Sequence[Seen], stats: Stats
    ) -> EncodedPrompt:
        """A rendered dialogue as the decoder's input. `seen`: what stands in its places for pictures and videos."""
        before = time.perf_counter()
        rows: list[Float] = []
        deepstack: dict[int, Float] = {}
        keys: list[Key] = []
        counter = PositionCounter(self.manifest.rotary)
        token_ids: list[int] = []
        text: list[int] = []
        width = self.manifest.dims.hidden_size

        def add_text(ids: list[int], *, probed: bool = True) -> None:
            rows.append(self.embed(ids))
            text.extend(range(len(keys), len(keys) + len(ids)) if probed else ())
            keys.extend(ids)
            token_ids.extend(ids)
            counter.text(len(ids))

        def add_rows(part: Float, one: Seen, first: int) -> None:
            rows.append(part[:, :width])
            if self.manifest.deepstack:
                deepstack[len(keys)] = part[:, width:]
            counter.picture(len(part), one.grid, one.times)
            keys.extend((one.key, first + i) for i in range(len(part)))

        slots = deque(seen)
        for run in runs:
            if isinstance(run, list):
                between_frames = bool(slots and slots[0].first)  # the groups of a video's
                add_text(run, probed=not between_frames)
                continue
            one = slots.popleft()
            row = one.first
            for part in one.runs:
                if isinstance(part, list):
                    add_text(part)
                else:
                    add_rows(part, one, row)
                    row += len(part)
        embeds = np.concatenate([np.empty((0, width), np.float32), *rows])[None]
        stats.embed_ms = ms_since(before)
        stats.prompt_tokens = embeds.shape[1]
        probed = probed_positions(self.manifest.prober, turns, text, [one.rows for one in seen])
        return EncodedPrompt(embeds, token_ids, keys, counter.positions(), probed, tuple(seen), deepstack)

    def prepare_ids(self, token_ids: Sequence[int], stats: Stats) -> EncodedPrompt:
        """A prompt of one user turn without pictures, given as the token ids of the whole rendered prompt."""
        before = time.perf_counter()
        check_length(self.manifest, len(token_ids))
        _, (empty,) = render_judged([Message("user", ())], self.manifest.prompt, self._tokenizer)
        turn = replace(empty, end=Place(len(token_ids), 0))
        embeds = self.embed(list(token_ids))[None]
        probed = probed_positions(self.manifest.prober, [turn], range(len(token_ids)), [])
        stats.embed_ms = ms_since(before)
        stats.prompt_tokens = len(token_ids)
        counter = PositionCounter(self.manifest.rotary)
        counter.text(len(token_ids))
        return EncodedPrompt(embeds, list(token_ids), list(token_ids), counter.positions(), probed)

    def _see(
        self,
        runs: Rendered,
        messages: Sequence[Message],
        stats: Stats,
        conversation: Conversation | None,
    ) -> list[Seen]:
        """The dialogue's pictures and videos, in the order of `runs`.

        One is opened and encoded after the other, so one is in memory at a time; and only as long as they fit the
        context. A picture that is shown twice, or that the conversation knows, is not encoded again.
        """
        pictures = [image for message in messages for image in message.images]
        videos = [part for message in messages for part in message.video_parts]
        least = {IMAGE: self._least_rows(), VIDEO: 0}  # `_check_videos` has counted videos
        length = sum(len(run) if isinstance(run, list) else least[run] for run in runs)
        check_length(self.manifest, length, exact=not pictures)
        known, encoded = conversation.images if conversation else {}, dict[bytes, images_.Runs]()
        alone, seen, further = len(pictures) == 1, list[Seen](), deque[Seen]()
        to_open: dict[object, Iterator[Callable[[int], _Opened]]] = {
            IMAGE: (functools.partial(self._open_picture, picture, alone) for picture in pictures),
            VIDEO: (functools.partial(self._open_frames, video) for video in videos),
        }
        left = len(pictures) + len(videos)
        for run in (run for run in runs if not isinstance(run, list)):
            if further:  # of the video before, whose places in the prompt follow each other
                seen.append(further.popleft())
                continue
            others = length - least[run]
            opened = next(to_open[run])(others)
            key, before = f"{opened.use} {opened.sha256}".encode(), stats.image_tiles
            if key not in encoded:
                encoded[key] = known[key] if key in known else opened.encode(stats=stats)
            further.extend(_places(key, encoded[key], opened, stats.image_tiles - before, run is VIDEO))
            seen.append(further.popleft())
            left -= 1
            length = others + sum(map(len, encoded[key]))
            check_length(self.manifest, length, exact=not left)
        if conversation:
            conversation.images = encoded
        return seen

    def _open_picture(self, picture: ImageLike, alone: bool, others: int) -> _Opened:
        """`others`: how many positions the rest of the prompt takes at least."""
        assert self._image is not None
        pixels, use = picture_file.open_image(picture), "a picture" if alone or self._image.native else "one of several"
        size, grid = (pixels.shape[0], pixels.shape[1]), None
        if self._image.native:
            grid = images_.native_grid(size, self._image)
            check_length(self.manifest, others + math.prod(grid), exact=False)  # before it is encoded
        return _Opened(images_.digest([pixels]), use, functools.partial(self.encode_image, pixels, alone=alone), grid)

    def _open_frames(self, part: VideoPart, others: int) -> _Opened:
        """`others` as in `_open_picture`."""
        image, video, frames = self._image, self.manifest.video, part.frames
        assert image is not None and video is not None
        if image.native is None or video.native is None:
            tiles = videos_.tiles(frames, image.tile_size, image.tile_size)
            return _Opened(images_.digest(tiles), "a video", functools.partial(self.encode_video, tiles), None)
        moments = videos_.moments(len(frames), part.seconds)
        times = videos_.group_positions(moments, image.native.frames, video.native.tokens_per_second)
        first = picture_file.open_image(frames[0])
        grid = videos_.frame_grid((first.shape[0], first.shape[1]), len(frames), image, video, self._max_tiles)
        check_length(self.manifest, others + len(times) * math.prod(grid), exact=False)  # before others are opened
        tiles = videos_.scaled([first, *frames[1:]], grid, image.tile_size)
        encode = functools.partial(self.encode_frames, tiles)
        if self.manifest.prompt.frame_group:
            return _Opened(images_.digest(tiles), "a video", encode, grid, apart=len(times))
        use = f"a video at {times}"  # the KV caches hold its rows turned by their times
        return _Opened(images_.digest(tiles), use, encode, grid, times)

    def _least_rows(self) -> int:
        """Rows of the smallest picture: those of one tile."""
        shapes = [
            tensor.shape
            for name, output in IMAGE_GRAPHS.items()
            if name in self.manifest.graphs
            for tensor in self.manifest.graphs[name].outputs
            if tensor.name == output
        ]
        return next((shape[1] for shape in shapes if len(shape) > 1 and isinstance(shape[1], int)), 1)

    def _check_videos(self, messages: Sequence[Message]) -> None:
        """Raise InputError for videos that this model cannot take, before any frame is opened."""
        videos = [part for message in messages for part in message.video_parts]
        if not videos:
            return
        if self.manifest.video is None:
            raise InputError("this model takes no videos")
        counts = [len(part.frames) for part in videos]
        if not all(counts):
            raise InputError("a video has no frames")
        for count, part in zip(counts, videos, strict=True):
            videos_.check_seconds(count, part.seconds)  # whether the model reads them or not
        rows = sum(self._least_rows_of(count, self.manifest.video) for count in counts)
        if rows >= self.manifest.dims.context_length:
            raise InputError(
                f"the video takes {rows} tokens ({sum(counts)} frames); "
                f"the model's context holds {self.manifest.dims.context_length}; take fewer frames"
            )

    def _least_rows_of(self, frames: int, video: VideoSpec) -> int:
        """Rows of a video of so many frames, which may be larger where pictures have any size."""
        native = self._image.native if self._image else None
        if native:
            return math.ceil(frames / native.frames)
        assert video.pooled_side is not None
        return frames * video.pooled_side**2 + 1

    def encode_image(self, picture: Uint8, *, alone: bool, stats: Stats) -> images_.Runs:
        """One image (H, W, 3) uint8 -> its rows (n, D), with the token ids around and between them.

        With deepstack (deepstack.py) the rows are (n, (1 + L) * D).
        """
        spec = self._image
        assert spec is not None
        tiles, grid = images_.cut(picture, spec, alone=alone)
        if "image_tokenizer" in self.manifest.graphs:
            rows = [self.embed(self.tokenize(tiles))]
        else:
            outputs = list(self._run("vision_encoder", tiles, spec))
            rows = [tile for out in outputs for tile in out["image_features"]]
            if spec.anyres:
                newline, size = outputs[0]["image_newline"], (picture.shape[0], picture.shape[1])
                rows = [images_.pack(np.stack(rows), newline, size, spec)]
            elif spec.closest_grid:
                rows = [np.concatenate(rows)]
        stats.image_tiles += math.prod(grid) if spec.native else len(tiles)
        return images_.lay_out(rows, grid, spec)

    def encode_video(self, frames: Uint8, *, stats: Stats) -> images_.Runs:
        """A video's tiles (frames, tile_size, tile_size, 3) uint8 -> its rows (n, D)."""
        spec = self.manifest.video
        assert spec is not None and spec.pooled_side is not None
        rows: list[Float] = []
        for out in self._run("vision_encoder", frames, spec):
            rows[-1:] = [
                videos_.pool(out["image_features"], spec.pooled_side),
                out["image_newline"][None],
            ]  # the newline ends the video, not the batch
        stats.image_tiles += len(frames)
        return [np.concatenate(rows)]

    def encode_frames(self, frames: Uint8, *, stats: Stats) -> images_.Runs:
        """A video's frames (frames, height, width, 3) uint8, in whole tiles for a model that takes any size -> its rows
        (n, D), with deepstack (n, (1 + L) * D): one run, or one for each group of frames if text stands between them.
        """
        image, video = self._image, self.manifest.video
        assert image is not None and image.native is not None and video is not None
        outputs = self._run("vision_encoder", videos_.filled(frames, image.native.frames), video)
        rows = [out["image_features"][0] for out in outputs]
        stats.image_tiles += sum(map(len, rows))
        return [*rows] if self.manifest.prompt.frame_group else [np.concatenate(rows)]

    def single_frames(self, video: VideoPart, seen: Sequence[Seen]) -> Iterator[tuple[VideoPart, Seen]]:
        """The frames of a video, or those groups of them that the model reads as one, each as a video of its own;
        nothing if there is only one. `seen`: the video, as a prompt has it. Its rows are cut into equal shares; a
        newline row, if there is one, ends each. It stands as if it were shown first. Nothing is encoded.
        """
        at_a_time = self._image.native.frames if self._image and self._image.native else 1
        starts = range(0, len(video.frames), at_a_time)
        rows = np.concatenate([part for one in seen for part in one.runs])
        each = len(rows) // len(starts)
        newline = rows[each * len(starts) :]  # where rows are pooled
        for i, start in enumerate(starts if len(starts) > 1 else ()):
            own = np.concatenate([rows[i * each : (i + 1) * each], newline])
            key = seen[0].key + f" frame {start}".encode()
            end = start + at_a_time
            yield VideoPart(video.frames[start:end]), seen[0]._replace(key=key, runs=[own], times=(0,), tiles=0)

    def tokenize(self, tiles: Sequence[Uint8]) -> list[int]:
        """The tiles of one image -> its token ids, in order."""
        assert self._image is not None
        ids = np.concatenate([out["input_ids"] for out in self._run("image_tokenizer", tiles, self._image)])
        return [int(i) for i in ids.ravel()]

    def _run(
        self, graph: str, tiles: Sequence[Uint8] | Uint8, spec: ImageSpec | VideoSpec
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Run an image graph on `tiles`, a few at a time; the outputs of each run, by name."""
        loaded = self._graph(graph)
        assert self._image is not None
        hidden, anyres, native = self.manifest.dims.hidden_size, self._image.anyres, self._image.native
        width = (1 + self.manifest.deepstack) * hidden
        rows = anyres.tokens_per_side**2 if anyres else None
        at_a_time = native.frames if native else TILES_PER_RUN
        for first in range(0, len(tiles), at_a_time):
            pixel_values = images_.normalise(list(tiles[first : first + at_a_time]), spec)
            outputs = loaded.run({"pixel_values": pixel_values})
            count = len(pixel_values)
            if native:
                count, rows = 1, math.prod(pixel_values.shape[2:]) // self._image.tile_size**2
            shapes = {"image_features": (count, rows, width), "image_newline": (hidden,)}
            for name in outputs.keys() & shapes.keys():
                self._check_shape(graph, outputs[name], shapes[name])
            yield outputs

    def embed(self, token_ids: list[int]) -> Float:
        """Token ids (n) -> their embeddings (n, D) float32."""
        out = self._graph("embed_tokens").run({"input_ids": np.array([token_ids], np.int64)})["inputs_embeds"]
        self._check_shape("embed_tokens", out, (1, len(token_ids), self.manifest.dims.hidden_size))
        rows: Float = out[0].astype(np.float32, copy=False)
        return rows

    def _check_shape(self, graph: str, output: npt.NDArray[Any], shape: tuple[int | None, ...]) -> None:
        """Raise PackageError if a graph's output has another shape; None matches any size.

        A missing row would shift the positions that the prober reads.
        """
        fits = [n in (size, None) for size, n in zip(output.shape, shape, strict=False)]
        if output.ndim != len(shape) or not all(fits):
            raise PackageError(
                f"{self.manifest.graphs[graph].file}: its output has not the size that the manifest implies"
            )


def probed_positions(
    prober: ProberSpec | None, turns: Sequence[JudgedTurn], text: Sequence[int], sizes: Sequence[int]
) -> Probed:
    """For each turn the positions that the prober reads, ascending: the same as if the dialogue ended there. An empty
    list where a turn is too short, or where the text that follows changed the tokens that the prober would have read.
    Without a prober, the last position: a conversation continues from it.

    `text`: the positions of token ids, but those between groups of a video's frames. `sizes`: the rows of each picture,
    video and group, separators included. A mean leaves out pictures and videos: their many rows, and times, would
    outweigh the text, whose hidden states have attended to them.
    """
    before = [0, *itertools.accumulate(sizes)]  # rows of the first n pictures and videos
    length = turns[-1].end.tokens + before[turns[-1].end.slots]
    probed: Probed = []
    for turn in turns if prober else turns[-1:]:
        offset = prober.token_offset if prober else -1
        last = turn.end.tokens + before[turn.end.slots] + offset
        if not 0 <= last < length or -offset <= turn.unlike:
            probed.append([])
        elif prober is None or prober.pooling == "last":
            probed.append([last])
        else:
            first = turn.content.tokens + before[turn.content.slots]
            probed.append(list(text[bisect.bisect_left(text, first) : bisect.bisect_right(text, last)]))
    return probed


def check_characters(manifest: Manifest, messages: Sequence[Message]) -> None:
    """Raise InputError for texts that cannot fit the context, before tokens are counted: of 4 MB that takes 1.5 GB."""
    characters = sum(len(text) for message in messages for text in message.texts)
    most = CHARACTERS_A_TOKEN * manifest.dims.context_length
    if characters > most:
        raise InputError(f"the prompt has {characters} characters; for this model's context at most {most} are read")


def check_length(manifest: Manifest, length: int, *, exact: bool = True) -> None:
    """Raise InputError for a prompt of `length` tokens, or of at least as many, that does not fit the context."""
    if length == 0:
        raise InputError("the prompt is empty")
    context = manifest.dims.context_length
    if length >= context:
        raise InputError(
            f"the prompt takes {'' if exact else 'at least '}{length} tokens (images included); "
            f"the model's context holds {context}"
        )


def _places(key: bytes, runs: images_.Runs, opened: _Opened, tiles: int, video: bool) -> Iterator[Seen]:
    """What stands in each of the places in the prompt that a picture or a video fills."""
    each, first = len(runs) // opened.apart, 0
    for at in range(0, len(runs), each):
        own = runs[at : at + each]
        yield Seen(key, own, opened.grid, opened.times, first, 0 if first else tiles, opened.sha256, video)
        first += sum(map(len, own))
