"""Whether a manifest is consistent: sizes, graphs and their tensors, files, the gate, golden prompts, the template."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import TypeAlias

from .draft_table import ENTRY_BYTES
from .errors import PackageError
from .manifest_format import (
    ATTENTION_BIAS,
    GATE_GRAPHS,
    IMAGE_GRAPHS,
    MONITOR_GRAPH,
    PREFILL_GRAPHS,
    REQUIRED_GRAPHS,
    ROTARY_TABLES,
    Contents,
)

MAX_P_UNSAFE_TOLERANCE = 0.05  # a gate whose scores differ more between machines is not the one that was measured
MOST_PIXELS, MOST_FRAMES = 50_000_000, 16  # of a "native" picture; that an image graph reads as one
MOST_PER_SECOND = 1000  # positions of a video's time axis
LARGEST_TILE, LARGEST_GRID = 1 << 14, 1 << 16  # pixels along a side: a wrong manifest must not take all memory
MOST_TILES = 1 << 8  # of a picture
MOST_SIDE = 1 << 12  # rows of features on a side of a tile
MOST_LAYERS = 1 << 10
LARGEST_WINDOW = 1 << 8  # tokens of an answer that are held back: each holds a chunk and a hidden state
ACTIVATIONS = ("float32", "float16")  # types of hidden states; all graphs of a package have the same
Shape: TypeAlias = "tuple[int | str | None, ...]"  # of a tensor; None: any size
Need: TypeAlias = "Callable[[bool, str], None]"  # raises PackageError with the text unless the condition holds
Tensors: TypeAlias = "dict[str, tuple[str, Shape]]"  # name -> numpy's dtype, shape


def check_consistency(manifest: Contents, where: str) -> None:
    """Raise PackageError with the first thing that contradicts another. `where`: the file, for the message."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise PackageError(f"{where}: {what}")

    for check in (
        _check_sizes,
        _check_rotary,
        _check_graphs,
        _check_image,
        _check_video,
        _check_gate,
        _check_proof,
        _check_drafts,
        _check_files,
        _check_golden,
        _check_prompt,
        _check_tensors,
    ):
        check(manifest, need)


def _check_sizes(manifest: Contents, need: Need) -> None:
    """Sizes are above zero, and onnxruntime's version is one."""
    for name, size in _sizes(manifest):
        need(0 < size < 2**31, f"{name} is {size}, which is no size")
    if manifest.image and (anyres := manifest.image.anyres):
        need(anyres.tokens_per_side <= MOST_SIDE, f"image: tokens_per_side is above {MOST_SIDE}")
    need(
        re.fullmatch(r"\d{1,4}\.\d{1,4}", manifest.onnxruntime) is not None,
        f"onnxruntime: {manifest.onnxruntime!r} is not a version like '1.23'",
    )


def _check_graphs(manifest: Contents, need: Need) -> None:
    """The graphs that this runtime runs, and no others; each half has its layers."""
    gate = GATE_GRAPHS if manifest.guarded else ()
    for name in (*REQUIRED_GRAPHS, *gate):
        need(name in manifest.graphs, f"graph {name!r} is missing; the package cannot run without it")
    known = {*REQUIRED_GRAPHS, *PREFILL_GRAPHS.values(), *GATE_GRAPHS, MONITOR_GRAPH, *IMAGE_GRAPHS}
    strange = ", ".join(map(repr, sorted(set(manifest.graphs) - known)))
    need(
        not strange,
        f"this runtime has no use for graph {strange}; without it answers might not be the package's",
    )
    image = [name for name in IMAGE_GRAPHS if name in manifest.graphs]
    need(
        len(image) == (1 if manifest.image else 0),
        f"'image' comes with one graph of {', '.join(IMAGE_GRAPHS)}; found: {', '.join(image) or 'none'}",
    )
    k, n = manifest.split_layer, manifest.dims.num_hidden_layers
    need(n <= MOST_LAYERS, f"dims: num_hidden_layers {n} is above {MOST_LAYERS}")  # each layer's tensors are listed
    need(0 < k < n, f"split_layer {k} is not between 1 and {n - 1}")
    prefill = [name for name in PREFILL_GRAPHS.values() if name in manifest.graphs]
    need(len(prefill) != 1, f"of prefill_lower and prefill_upper there are both or neither; found: {prefill}")
    plain = not (manifest.rotary.windowed or manifest.rotary.long or manifest.deepstack)
    plain = plain and manifest.activations == "float32"
    need(plain or not manifest.reads_in_packs, "attention_bias goes with no windowed or long frequencies, no deepstack")
    for half, layers in {"decoder_lower": (0, k), "decoder_upper": (k, n)}.items():
        for name in (half, manifest.prefill_graph(half)):
            need(manifest.graphs[name].layers == layers, f"{name} must hold layers {layers[0]}..{layers[1] - 1}")


def _check_rotary(manifest: Contents, need: Need) -> None:
    """A frequency for each pair of a head's numbers; each reads a position that there is."""
    rotary = manifest.rotary
    count, head_dim = len(rotary.frequencies), manifest.dims.head_dim
    need(0 < 2 * count <= head_dim, f"rotary: {count} frequencies, and head_dim is {head_dim}")
    need(len(rotary.axes) in (0, count), f"rotary: {len(rotary.axes)} axes, not one for each frequency")
    need(len(rotary.windowed) in (0, count), f"rotary: {len(rotary.windowed)} windowed frequencies, not {count}")
    need(set(rotary.axes) <= {0, 1, 2}, "rotary: an axis is not 0, 1 or 2")
    if rotary.long:
        need(0 < rotary.long.beyond < 2**31, f"rotary: beyond is {rotary.long.beyond}, which is no length")
        need(
            len(rotary.long.frequencies) == count,
            f"rotary: {len(rotary.long.frequencies)} long frequencies, not {count}",
        )
        need(not rotary.windowed, "rotary: long and windowed frequencies do not go together")


def _check_image(manifest: Contents, need: Need) -> None:
    """How pictures are cut."""
    if (image := manifest.image) is None:
        return
    for kind in ("anyres", "split", "closest_grid", "native"):
        need((image.kind == kind) == (getattr(image, kind) is not None), f"image: 'kind' and {kind!r} differ")
    need(all(0.0 <= mean <= 1.0 for mean in image.mean), "image: a mean is not from 0 to 1")
    if image.native:
        need("vision_encoder" in manifest.graphs, "image: 'native' pictures come with a vision_encoder")
        need(image.native.min_pixels <= image.native.max_pixels, "image: min_pixels is above max_pixels")
        need(image.native.max_pixels <= MOST_PIXELS, "image: max_pixels is too large")
        need(image.tile_size**2 <= image.native.max_pixels, "image: a tile has more than max_pixels")
        need(image.native.frames <= MOST_FRAMES, "image: too many frames are read as one")
        need(not image.tile_separators, "image: a 'native' picture has no tile_separators")
        need(0 <= manifest.deepstack < manifest.dims.num_hidden_layers, "image: deepstack has too many layers")
    if image.split:
        need(image.split.longest_edge <= LARGEST_TILE, "image: longest_edge is too large")
    if image.closest_grid:
        need(image.closest_grid.max_tiles <= MOST_TILES, "image: max_tiles is too large")
        need(image.closest_grid.max_tiles * image.tile_size <= LARGEST_GRID, "image: a grid is too large")
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
        all(0 <= i < manifest.dims.vocab_size for i in ids),
        "image: tile_separators have an id outside the vocabulary",
    )


def _check_video(manifest: Contents, need: Need) -> None:
    """How videos are scaled, and pooled."""
    image, video = manifest.image, manifest.video
    if video:
        fits = (image is not None and "vision_encoder" in manifest.graphs) and (image.anyres or image.native)
        need(bool(fits), "'video' comes with 'anyres' or 'native' images and a vision_encoder")
        assert image is not None
        need((video.native is not None) == (image.native is not None), "video: 'native' comes with 'native' images")
        need((video.pooled_side is not None) == (image.anyres is not None), "video: 'pooled_side' comes with 'anyres'")
        if video.pooled_side is not None and image.anyres:
            need(video.pooled_side <= image.anyres.tokens_per_side, "video: pooled_side is above tokens_per_side")
        if native := video.native:
            need(native.min_pixels <= native.max_pixels, "video: min_pixels is above max_pixels")
            need(native.max_pixels <= MOST_PIXELS, "video: max_pixels is too large")
            need(image.tile_size**2 <= native.max_pixels, "video: a tile has more than max_pixels")
            need(0 <= native.tokens_per_second <= MOST_PER_SECOND, "video: tokens_per_second is out of range")
        need(0.0 not in video.std, "video: std is zero")
    if group := manifest.prompt.frame_group:
        native_frames = image.native.frames if video and image and image.native else 0
        need(group.frames == native_frames, "prompt: frame_group has not the frames that the image graph reads as one")
    written = any(piece.kind == "video" for piece in manifest.prompt.pieces())
    need((manifest.video is not None) == written, "'video' and the prompt's pieces of that kind come together")


def _check_gate(manifest: Contents, need: Need) -> None:
    """Prober, Refusal Head and monitor."""
    need(
        manifest.guarded == (manifest.prober is not None) == (manifest.refusal is not None),
        "'guarded', 'prober' and 'refusal' contradict each other",
    )
    if manifest.prober and manifest.refusal:
        need(
            0.0 <= manifest.prober.threshold < 1.0,
            f"prober: threshold {manifest.prober.threshold:g} is not from 0 to 1",
        )
        judged = manifest.prober.judge_threshold
        need(
            judged is None or 0.0 <= judged <= manifest.prober.threshold,
            f"prober: judge_threshold {judged} is not from 0 to the threshold",
        )
        need(manifest.prober.token_offset < 0, "prober: token_offset counts from the end of the prompt: below zero")
        need(manifest.refusal.strength > 0.0, "refusal: strength must be above zero, or nothing is steered")
        need(bool(manifest.refusal.text.strip()), "refusal: text is empty")
    need((manifest.monitor is not None) == (MONITOR_GRAPH in manifest.graphs), "'monitor' and its graph come together")
    if manifest.monitor:
        need(manifest.guarded, "a monitor comes with a gate")
        need(manifest.monitor.window <= LARGEST_WINDOW, "monitor: window is too large")
        need(
            0.0 <= manifest.monitor.threshold < 1.0,
            f"monitor: threshold {manifest.monitor.threshold:g} is not from 0 to 1",
        )


def _check_files(manifest: Contents, need: Need) -> None:
    """Every file is inside the package, and has one hash."""
    paths = manifest.paths()
    for file in paths:
        pure = PurePosixPath(file)
        inside = not pure.is_absolute() and ".." not in pure.parts and not {"\\", "\0"} & set(file)
        need(bool(file) and inside, f"path {file!r} leaves the package")
    for file, digest in manifest.hashes():
        need(paths[file] == digest, f"{file!r} has two hashes")
    for file in (manifest.prompt.tokenizer, *(file for golden in manifest.golden for file in golden.pictures())):
        need(file in paths, f"{file!r} is used but has no hash in 'files'")


def _check_golden(manifest: Contents, need: Need) -> None:
    """The golden prompts, and how far another machine may be off."""
    for golden in manifest.golden:
        need(bool(golden.token_ids), "golden: an answer without tokens")
        need(len(golden.seconds) in (0, len(golden.videos)), "golden: not the seconds of each video")
        need(not (golden.prompt_ids and (golden.prompt or golden.pictures())), "golden: a prompt is given twice")
        need(
            all(0 <= i < manifest.dims.vocab_size for i in (*golden.token_ids, *golden.prompt_ids)),
            "golden: an id outside the vocabulary",
        )
    need(
        0.0 < manifest.tolerance.p_unsafe <= MAX_P_UNSAFE_TOLERANCE,
        f"tolerance: p_unsafe is not above 0, up to {MAX_P_UNSAFE_TOLERANCE:g}",
    )
    need(0 <= manifest.tolerance.answers <= len(manifest.golden), "tolerance: more answers than golden prompts")


def _check_prompt(manifest: Contents, need: Need) -> None:
    """The pieces of the chat template."""
    for piece in manifest.prompt.outside():
        need(
            piece.kind in ("token", "literal"),
            f"prompt: a piece {piece.kind!r} stands where no part of a turn goes",
        )
    for kind, part in manifest.prompt.inside():
        slots = [piece.kind for piece in part if piece.kind not in ("token", "literal")]
        need(slots == [kind], f"prompt: a turn's {kind!r} must have one piece of that kind and no other")
    if group := manifest.prompt.frame_group:
        slots = [piece.kind for piece in group.pieces if piece.kind not in ("token", "literal")]
        need(slots == ["seconds", "video"], "prompt: frame_group must have one 'seconds', then one 'video'")
    for piece in manifest.prompt.pieces():
        fits = piece.kind != "token" or 0 <= piece.id < manifest.dims.vocab_size
        need(fits, f"prompt: {piece.text!r} has id {piece.id}; the vocabulary ends at {manifest.dims.vocab_size - 1}")


def _check_tensors(manifest: Contents, need: Need) -> None:
    """Every graph has the tensors that the loop names, and no others."""
    need(
        manifest.activations in ACTIVATIONS, f"hidden_states are {manifest.activations}, not {' or '.join(ACTIVATIONS)}"
    )
    for name, both_sides in _expected_tensors(manifest).items():
        graph = manifest.graphs[name]
        for expected, tensors in zip(both_sides, (graph.inputs, graph.outputs), strict=True):
            found = {t.name: (t.dtype, t.shape) for t in tensors}
            strange = ", ".join(map(repr, sorted(found.keys() - expected.keys())))
            for tensor, described in expected.items():
                need(tensor in found, f"graph {name!r} has no {tensor!r}")
                need(_fits(found[tensor], described), f"graph {name!r}: {tensor!r} is not {described} as 'dims' says")
            need(not strange, f"graph {name!r}: this runtime has no use for {strange}")
            need(len(found) == len(tensors), f"graph {name!r} has two tensors of one name")


def _sizes(manifest: Contents) -> Iterator[tuple[str, int]]:
    """(place, value) of everything that must be above 0, and small enough that products of sizes fit 64 bits."""
    yield from ((f"dims: {name}", size) for name, size in dataclasses.asdict(manifest.dims).items())
    if manifest.image:
        yield "image: tile_size", manifest.image.tile_size
        if anyres := manifest.image.anyres:
            yield "image: tokens_per_side", anyres.tokens_per_side
            yield "image: max_tiles_side", anyres.max_tiles_side
            yield from (("image: grid_pinpoints", side) for grid in anyres.grid_pinpoints for side in grid)
        if native := manifest.image.native:
            sizes = {n: size for n, size in dataclasses.asdict(native).items() if n != "deepstack"}
            yield from ((f"image: {name}", size) for name, size in sizes.items())
        if manifest.image.split:
            yield "image: longest_edge", manifest.image.split.longest_edge
        if grid := manifest.image.closest_grid:
            yield "image: min_tiles", grid.min_tiles
            yield "image: max_tiles", grid.max_tiles
    if manifest.video:
        if manifest.video.pooled_side is not None:
            yield "video: pooled_side", manifest.video.pooled_side
        if scaled := manifest.video.native:
            yield "video: min_pixels", scaled.min_pixels
            yield "video: max_pixels", scaled.max_pixels
    if manifest.monitor:
        yield "monitor: window", manifest.monitor.window
    if manifest.drafts:
        yield "drafts: ngrams", manifest.drafts.ngrams


def _check_proof(manifest: Contents, need: Need) -> None:
    """The states that prove the gate on another machine."""
    need(manifest.guarded == (manifest.proof is not None), "'guarded' and 'proof' contradict each other")
    if manifest.proof is None:
        return
    need(bool(manifest.proof.p_unsafe), "proof: no hidden state for the prober")
    both = (*manifest.proof.p_unsafe, *manifest.proof.monitor)
    need(all(0.0 <= p <= 1.0 for p in both), "proof: a p_unsafe is not from 0 to 1")
    watched = len(manifest.proof.p_unsafe) if manifest.monitor else 0
    need(len(manifest.proof.monitor) == watched, "proof: 'monitor' has not a number for each of 'p_unsafe'")
    need(bool(manifest.proof.steered), "proof: no hidden state for the Refusal Head")
    for state in manifest.proof.steered:
        ids = (state.token, state.steered_token)
        need(all(0 <= i < manifest.dims.vocab_size for i in ids), "proof: an id outside the vocabulary")
        need(
            state.token != state.steered_token,
            "proof: a state whose token steering leaves as it was proves nothing",
        )
        need(state.shift > 0.0, "proof: a shift is not above zero")
    size = 4 * manifest.dims.hidden_size * (len(manifest.proof.p_unsafe) + 2 * len(manifest.proof.steered))
    found = next((file.bytes for file in manifest.files if file.file == manifest.proof.file), None)
    need(found == size, f"proof: {manifest.proof.file!r} must be in 'files' with {size} bytes")


def _check_drafts(manifest: Contents, need: Need) -> None:
    """The table of n-grams has as many as it says."""
    if drafts := manifest.drafts:
        found = next((file.bytes for file in manifest.files if file.file == drafts.file), None)
        size = ENTRY_BYTES * drafts.ngrams
        need(found == size, f"drafts: {drafts.file!r} must be in 'files' with {size} bytes")


def _expected_tensors(manifest: Contents) -> dict[str, tuple[Tensors, Tensors]]:
    """By graph: the inputs that the loop binds, and the outputs that it reads. A graph has no others."""
    d, f32, act, batch = manifest.dims, "float32", manifest.activations, "batch"
    rows, last = ("sequence_length", d.hidden_size), ("num_logits", d.hidden_size)

    def caches(half: str, side: str, length: str) -> Tensors:
        layers = manifest.graphs[half].layers
        assert layers is not None
        described = manifest.kv_cache.dtype, (batch, d.num_key_value_heads, length, d.head_dim)
        return {f"{side}.{i}.{kind}": described for i in range(*layers) for kind in ("key", "value")}

    def half(name: str, source: str, target: str, made: Shape, more: Tensors) -> tuple[Tensors, Tensors]:
        lengths: Tensors = {"seqlens_k": ("int32", (batch,)), "total_sequence_length": ("int32", ())}
        table: Shape = ("rotary_length", len(manifest.rotary.frequencies))
        tables: Tensors = {
            f"{kind}{name}": (act, table) for kind in manifest.rotary.by_table() for name in ROTARY_TABLES
        }
        mask: Tensors = {ATTENTION_BIAS: (act, (1, 1, "sequence_length", "total_sequence_length"))}
        masked = mask if name == "decoder_lower" and manifest.reads_in_packs else {}
        past = caches(name, "past_key_values", "past_sequence_length")
        added: Tensors = {
            f"deepstack.{i}": (act, (1, "deepstack_length", d.hidden_size))
            for i in range(*manifest.graphs[name].layers or ())
            if i < manifest.deepstack
        }
        inputs = {source: (act, (batch, *rows)), **lengths, **tables, **masked, **added, **more, **past}
        return inputs, {target: (act, (batch, *made)), **caches(name, "present", "total_sequence_length")}

    ending: Tensors = {"last_hidden_state": (act, (1, *last))}
    ids: Tensors = {"input_ids": ("int64", (1, "sequence_length"))}
    expected: dict[str, tuple[Tensors, Tensors]] = {
        "embed_tokens": (ids, {"inputs_embeds": (act, (1, *rows))}),
        "decoder_lower": half("decoder_lower", "inputs_embeds", "hidden_states", rows, {}),
        "decoder_upper": half(
            "decoder_upper", "hidden_states", "last_hidden_state", last, {"num_logits": ("int64", (1,))}
        ),
        "lm_head": (ending, {"logits": (f32, (1, "num_logits", d.vocab_size))}),
    }
    expected |= {manifest.prefill_graph(half): expected[half] for half in PREFILL_GRAPHS}
    if manifest.guarded:
        expected["prober"] = {"hidden_states": (f32, (1, d.hidden_size))}, {"p_unsafe": (f32, (1,))}
        expected["refusal_head"] = (
            {**ending, "strength": (f32, (1,))},
            {"steered_hidden_state": ending["last_hidden_state"]},
        )
    if manifest.monitor:
        expected[MONITOR_GRAPH] = expected["prober"]
    return expected | _expected_of_images(manifest)


def _expected_of_images(manifest: Contents) -> dict[str, tuple[Tensors, Tensors]]:
    """The same of the image graph. How many rows or ids it gives for a tile is its own affair."""
    if manifest.image is None:
        return {}
    d, n = manifest.dims.hidden_size, manifest.image.tile_size
    native = manifest.image.native
    shape: Shape = (native.frames, 3, "height", "width") if native else ("tiles", 3, n, n)
    pixels: Tensors = {"pixel_values": ("float32", shape)}
    newline: Tensors = {"image_newline": ("float32", (d,))} if manifest.image.anyres else {}
    outputs: dict[str, Tensors] = {
        "vision_encoder": {"image_features": ("float32", (None, None, (1 + manifest.deepstack) * d)), **newline},
        "image_tokenizer": {"input_ids": ("int64", (None, None))},
    }
    return {name: (pixels, made) for name, made in outputs.items() if name in manifest.graphs}


def _fits(found: tuple[str, Shape], described: tuple[str, Shape]) -> bool:
    """Whether a tensor has the described dtype and shape, in which None is any size."""
    (dtype, shape), (expected, sizes) = found, described
    fits = (size in (None, n) for n, size in zip(shape, sizes, strict=False))
    return dtype == expected and len(shape) == len(sizes) and all(fits)
