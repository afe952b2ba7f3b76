"""llama.cpp with pictures: a GGUF file and its mmproj (see peers.py), through libmtmd's C API of llama-cpp-python."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp as llama
import numpy as np
from llama_cpp import mtmd_cpp as mtmd
from PIL import Image

from benchmark.llama_cpp_subject import LlamaCpp

BATCH = 2048  # tokens: llama.cpp's default
PICTURE = 4096  # most positions of a picture's tiles and of what stands between them


class Mtmd(LlamaCpp):
    """One model with its tower, asked in its family's `turn` (towers.py). Tiles are encoded as llama-mtmd-cli does:
    as many at once as libmtmd takes, if no text stands between them.
    """

    def __init__(self, path: str, threads: int, max_tokens: int, mmproj: str, turn: str):
        super().__init__(path, threads, max_tokens + PICTURE)
        self._turn = turn
        self._marker = mtmd.mtmd_default_marker()
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.print_timings = False, threads, False
        mtmd.mtmd_helper_log_set(self._silence, ctypes.c_void_p(0))
        self._tower = mtmd.mtmd_init_from_file(mmproj.encode(), self._model, params)
        if not self._tower:
            raise RuntimeError(f"{mmproj}: libmtmd cannot load it")

    def round(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answer one prompt with a picture. Its decoding and resizing count, as ours do."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        start = time.perf_counter()
        chunks = self._chunks(job["prompt"], job["image"])
        parts = [mtmd.mtmd_input_chunks_get(chunks, number) for number in range(mtmd.mtmd_input_chunks_size(chunks))]
        position, vision_ms, tiles, batch = 0, 0.0, 0, None
        for number, part in enumerate(parts):
            reached = llama.llama_pos(position)
            if _is_tile(part):
                tiles += 1
                rows = batch and mtmd.mtmd_batch_get_output_embd(batch, part)
                if not rows:
                    mtmd.mtmd_batch_free(batch)
                    before = time.perf_counter()
                    batch = self._encoded(parts[number:])
                    vision_ms += 1000 * (time.perf_counter() - before)
                    rows = mtmd.mtmd_batch_get_output_embd(batch, part)
                no_callback, to = mtmd.mtmd_helper_post_decode_callback(), ctypes.byref(reached)
                at = (position, 0, BATCH, to, no_callback, None)
                code = mtmd.mtmd_helper_decode_image_chunk(self._tower, self._context, part, rows, *at)
            else:
                logits, to = number == len(parts) - 1, ctypes.byref(reached)
                code = mtmd.mtmd_helper_eval_chunk_single(
                    self._tower, self._context, part, position, 0, BATCH, logits, to
                )
            _check("decoding a chunk", code)
            position = reached.value
        prompt_tokens = mtmd.mtmd_helper_get_n_tokens(chunks)  # a picture may take fewer positions than rows
        mtmd.mtmd_batch_free(batch)
        mtmd.mtmd_input_chunks_free(chunks)
        tokens = [self._likeliest()]
        first = time.perf_counter()
        while len(tokens) < job["new_tokens"]:
            tokens.append(self._decode([tokens[-1]]))
        end = time.perf_counter()
        return {
            "prompt_tokens": prompt_tokens,
            "ttft_ms": 1000 * (first - start),
            "decode_ms": 1000 * (end - first),
            "token_ids": tokens,
            "image_tiles": tiles,
            "stages": {"vision": vision_ms},
        }

    def _encoded(self, parts: list[Any]) -> Any:
        """A batch of the tile at the front and of those right behind it that libmtmd takes with it, encoded."""
        batch = mtmd.mtmd_batch_init(self._tower)
        for part in parts:
            if not _is_tile(part) or mtmd.mtmd_batch_add_chunk(batch, part):
                break
        _check("mtmd_batch_encode", mtmd.mtmd_batch_encode(batch))
        return batch

    def _chunks(self, prompt: str, image: str) -> Any:
        """The prompt in pieces of text and tiles."""
        pixels = np.ascontiguousarray(Image.open(image).convert("RGB"))
        height, width = pixels.shape[:2]
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(width, height, data)
        text = self._turn.format(image=self._marker.decode(), text=prompt).encode()
        asked = mtmd.mtmd_input_text(text, len(text), add_special=False, parse_special=True)
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        _check("mtmd_tokenize", mtmd.mtmd_tokenize(self._tower, chunks, ctypes.byref(asked), bitmaps, 1))
        mtmd.mtmd_bitmap_free(bitmap)
        return chunks


def _is_tile(part: Any) -> bool:
    return bool(mtmd.mtmd_input_chunk_get_type(part) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE)


def _check(what: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{what} returned {code}")
