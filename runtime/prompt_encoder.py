"""A dialogue, its pictures and its videos -> the decoder's input embeddings.

    text    -> token ids ------------------------------------------> embed_tokens -> rows
    picture -> tiles -> pixels -> vision_encoder ---------------------------------> rows, and token ids between them
                                  image_tokenizer (where images are tokens) -> ids -> embed_tokens -> rows
    video   -> frames -> pixels -> vision_encoder, pooled -------------------------> rows

Pixels are made and encoded a few tiles at a time, so that a large picture needs no more memory than its rows.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from . import image as images_
from . import video as videos_
from .conversation import Conversation
from .errors import InputError, PackageError
from .generation import EncodedPrompt, Float, Key, ShownPicture, Stats, ms_since
from .image import ImageLike
from .manifest import ImageSpec, Manifest, ProberSpec, VideoSpec
from .subgraph import Subgraph
from .text import IMAGE, VIDEO, AskedTurn, Message, asked_turns, render

TILES_PER_RUN = 2  # bounds the image graph's activations: 4 take 120 MB more at SigLIP-so400m's size, and as long


class PromptEncoder:
    """Encodes prompts for one package. Keeps no state of a dialogue."""

    def __init__(
        self, manifest: Manifest, tokenizer: Tokenizer, image: ImageSpec | None, graph: Callable[[str], Subgraph]
    ):
        """`image`: how pictures are cut, None if the model takes none. `graph`: returns a loaded graph by name."""
        self.manifest, self._tokenizer, self._image, self._graph = manifest, tokenizer, image, graph

    def prepare(
        self, messages: Sequence[Message], stats: Stats, conversation: Conversation | None = None
    ) -> EncodedPrompt:
        """Render a dialogue, encode its images and videos, and lay everything out as the decoder's input.

        Raises InputError for an unusable message, image or video.
        """
        pictures = [images_.open_image(picture) for message in messages for picture in message.images]
        if pictures and self.manifest.image is None:
            raise InputError("this model takes no images")
        self._check_videos(messages)
        runs = render(messages, self.manifest.prompt, self._tokenizer)
        before = time.perf_counter()
        videos = [self._tiles(frames) for message in messages for frames in message.videos]
        alone = len(pictures) == 1
        digests = [images_.digest(picture, alone=alone) for picture in pictures]
        video_digests = [images_.digest(video, alone=False) for video in videos]
        encoders = {
            **{d: functools.partial(self.encode_image, p, alone=alone) for d, p in zip(digests, pictures, strict=True)},
            **{d: functools.partial(self.encode_video, v) for d, v in zip(video_digests, videos, strict=True)},
        }
        encoded, tiles = self._encode(encoders, stats, conversation)
        stats.vision_ms = ms_since(before)
        framing = [sum(len(part) for part in encoded[digest] if isinstance(part, list)) for digest in digests]
        before = time.perf_counter()
        rows: list[Float] = []
        keys: list[Key] = []
        token_ids: list[int] = []
        slots = {IMAGE: iter(digests), VIDEO: iter(video_digests)}
        for run in runs:
            digest = b"" if isinstance(run, list) else next(slots[run])
            row = itertools.count()  # of the picture
            for part in [run] if isinstance(run, list) else encoded[digest]:
                if isinstance(part, list):
                    rows.append(self.embed(part))
                    keys += part
                    token_ids += part
                else:
                    rows.append(part)
                    keys += [(digest, next(row)) for _ in part]
        embeds = np.concatenate([np.empty((0, self.manifest.dims.hidden_size), np.float32), *rows])[None]
        stats.embed_ms = ms_since(before)
        stats.prompt_tokens = embeds.shape[1]
        text = [position for position, key in enumerate(keys) if isinstance(key, int)]
        shown = tuple(ShownPicture(sum(map(len, encoded[d])), tiles[d]) for d in (*digests, *video_digests))
        return EncodedPrompt(embeds, token_ids, keys, self._probed_positions(messages, text, framing), shown)

    def prepare_ids(self, token_ids: Sequence[int], stats: Stats) -> EncodedPrompt:
        """A prompt of one user turn without pictures, given as the token ids of the whole rendered prompt."""
        before = time.perf_counter()
        embeds, messages = self.embed(list(token_ids))[None], [Message("user", ())]
        (empty,) = asked_turns(messages, self.manifest.prompt, self._tokenizer)
        turn = AskedTurn(0, empty.before, len(token_ids))
        probed = probed_positions(self.manifest.prober, turn, messages, range(len(token_ids)), [])
        stats.embed_ms = ms_since(before)
        stats.prompt_tokens = len(token_ids)
        return EncodedPrompt(embeds, list(token_ids), list(token_ids), [probed])

    def _probed_positions(
        self, messages: Sequence[Message], text: Sequence[int], framing: Sequence[int]
    ) -> list[list[int]]:
        """The positions that the prober reads, for each user turn.

        `text`: the positions of token ids. `framing`: how many of them are separators of each picture.
        """
        turns = asked_turns(messages, self.manifest.prompt, self._tokenizer)
        return [probed_positions(self.manifest.prober, turn, messages, text, framing) for turn in turns]

    def _check_videos(self, messages: Sequence[Message]) -> None:
        """Raise InputError for videos that this model cannot take, before any frame is opened."""
        videos = [frames for message in messages for frames in message.videos]
        if not videos:
            return
        if self.manifest.video is None:
            raise InputError("this model takes no videos")
        if not all(videos):
            raise InputError("a video has no frames")
        rows = sum(len(frames) * self.manifest.video.pooled_side**2 + 1 for frames in videos)
        if rows >= self.manifest.dims.context_length:
            raise InputError(
                f"the video takes {rows} tokens ({sum(map(len, videos))} frames); "
                f"the model's context holds {self.manifest.dims.context_length}; take fewer frames"
            )

    def _encode(
        self,
        encoders: Mapping[bytes, Callable[..., images_.Runs]],
        stats: Stats,
        conversation: Conversation | None,
    ) -> tuple[dict[bytes, images_.Runs], dict[bytes, int]]:
        """Rows and token ids of pictures and videos, by digest. A conversation has some already: then they took
        no tiles. The second dictionary has how many each took.
        """
        known = conversation.images if conversation else {}
        encoded: dict[bytes, images_.Runs] = {}
        tiles: dict[bytes, int] = {}
        for digest, encode in encoders.items():
            before = stats.image_tiles
            encoded[digest] = known[digest] if digest in known else encode(stats=stats)
            tiles[digest] = stats.image_tiles - before
        if conversation:
            conversation.images = encoded
        return encoded, tiles

    def encode_image(self, picture: images_.Uint8, *, alone: bool, stats: Stats) -> images_.Runs:
        """One image (H, W, 3) uint8 -> its rows (n, D), with the token ids around and between them."""
        spec = self._image
        assert spec is not None
        tiles, grid = images_.cut(picture, spec, alone=alone)
        if "image_tokenizer" in self.manifest.graphs:
            rows = [self.embed(self.tokenize(tiles))]
        else:
            outputs = list(self._run("vision_encoder", tiles, spec))
            rows = [tile for out in outputs for tile in out[0]]
            if spec.anyres:
                rows = [images_.pack(np.stack(rows), outputs[0][1], (picture.shape[0], picture.shape[1]), spec)]
        stats.image_tiles += len(tiles)
        return images_.lay_out(rows, grid, spec)

    def _tiles(self, frames: Sequence[ImageLike]) -> images_.Uint8:
        """The frames of a video -> (frames, tile_size, tile_size, 3) uint8."""
        assert self._image is not None
        return videos_.tiles(frames, self._image.tile_size)

    def encode_video(self, frames: images_.Uint8, *, stats: Stats) -> images_.Runs:
        """A video's tiles (frames, tile_size, tile_size, 3) uint8 -> its rows (n, D)."""
        spec = self.manifest.video
        assert spec is not None
        rows: list[Float] = []
        for features, newline in self._run("vision_encoder", frames, spec):
            rows[-1:] = [
                videos_.pool(features, spec.pooled_side),
                newline[None],
            ]  # the newline ends the video, not the batch
        stats.image_tiles += len(frames)
        return [np.concatenate(rows)]

    def tokenize(self, tiles: Sequence[images_.Uint8]) -> list[int]:
        """The tiles of one image -> its token ids, in order."""
        assert self._image is not None
        ids = np.concatenate([out[0] for out in self._run("image_tokenizer", tiles, self._image)])
        return [int(i) for i in ids.ravel()]

    def _run(
        self, graph: str, tiles: Sequence[images_.Uint8] | images_.Uint8, spec: ImageSpec | VideoSpec
    ) -> Iterator[list[npt.NDArray[Any]]]:
        """Run an image graph on `tiles`, a few at a time; the outputs of each run."""
        loaded = self._graph(graph)
        assert self._image is not None
        rows = self._image.anyres.tokens_per_side**2 if self._image.anyres else None
        for first in range(0, len(tiles), TILES_PER_RUN):
            pixel_values = images_.normalise(list(tiles[first : first + TILES_PER_RUN]), spec)
            outputs = loaded.run({"pixel_values": pixel_values})
            if graph == "vision_encoder":
                shapes = [(len(pixel_values), rows, self.manifest.dims.hidden_size), (self.manifest.dims.hidden_size,)]
                for output, shape in zip(outputs, shapes, strict=False):  # only anyres has a newline
                    self._check_shape(graph, output, shape)
            yield outputs

    def embed(self, token_ids: list[int]) -> Float:
        """Token ids (n) -> their embeddings (n, D) float32."""
        (out,) = self._graph("embed_tokens").run({"input_ids": np.array([token_ids], np.int64)})
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
    prober: ProberSpec | None,
    turn: AskedTurn,
    messages: Sequence[Message],
    text: Sequence[int],
    framing: Sequence[int],
) -> list[int]:
    """The positions that the prober reads of one turn, ascending: the same as if the dialogue ended there. Without a
    prober, the last one: a conversation continues from it.

    `text`: the positions of token ids; framing[i] of them are separators of the dialogue's picture i. A mean leaves out
    pictures: their many rows would outweigh the text, whose hidden states have attended to them.
    """
    earlier = sum(len(message.images) for message in messages[: turn.index])
    shown = earlier + len(messages[turn.index].images)
    before, through = turn.before + sum(framing[:earlier]), turn.through + sum(framing[:shown])
    asked = text[:through]
    last = (asked[-1] if asked else -1) + 1 + (prober.token_offset if prober else -1)
    if prober is None or prober.pooling == "last":
        return [last] if last >= 0 else []
    return [position for position in asked[before:] if position <= last]
