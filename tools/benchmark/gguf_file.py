"""GGUF files for llama.cpp, from a Hugging Face checkpoint of a Llama, Qwen2 or Qwen3, alone or as the decoder of a
family in towers.py; and a list of one's tensors.

    python -m benchmark.gguf_file write CHECKPOINT FILE Q4_0
    python -m benchmark.gguf_file list FILE

Runs in the peers' interpreter (gguf, llama-cpp-python, safetensors, torch). A text model's file has no vocabulary:
prompts are token ids. That of a decoder of pictures has one, because llama.cpp looks up the tokens between tiles by
name. llama.cpp's own quantiser rounds the float32 weights.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from benchmark import towers

ARCHITECTURES = {  # of a decoder's model_type: llama.cpp's layer, and its way to split text
    "llama": (gguf.MODEL_ARCH.LLAMA, "smollm"),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, "qwen2"),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, "qwen2"),
    "qwen3_vl_text": (gguf.MODEL_ARCH.QWEN3VL, "qwen2"),
}
BREAKS = "\u010a\u010a"  # two line breaks, byte by byte
DECODER = re.compile(r"(model\.)?((language|text)_model\.)?(model\.)?")  # what precedes a decoder's own names


def write(checkpoint: Path, path: Path, file_type: str) -> None:
    """Write the checkpoint's weights to `path` as llama-quantize's `file_type` (F32, Q8_0, Q4_0, Q4_1)."""
    import llama_cpp as llama

    if file_type == "F32":
        write_float32(checkpoint, path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / "f32.gguf"
        write_float32(checkpoint, whole)
        params = llama.llama_model_quantize_default_params()
        params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{file_type}")
        if llama.llama_model_quantize(str(whole).encode(), str(path).encode(), params):
            raise RuntimeError(f"{path}: llama_model_quantize failed")


def write_float32(checkpoint: Path, path: Path) -> None:
    """The weights as they are."""
    whole = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config = whole.get("text_config", whole)
    arch, split = ARCHITECTURES[config["model_type"]]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
    if config is whole:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_vocabulary(writer, checkpoint, config["vocab_size"], split)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    if axes := rope.get("mrope_section"):
        writer.add_rope_dimension_sections([*axes, 0])
    if deepstack := whole.get("vision_config", {}).get("deepstack_visual_indexes"):
        writer.add_num_deepstack_layers(len(deepstack))
    pairs = arch is gguf.MODEL_ARCH.LLAMA
    if pairs:
        writer.add_rope_dimension_count(head_size)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in tensors(checkpoint):
        if towers.TENSORS.match(name):
            continue
        if pairs and (found := re.search(r"\.([qk])_proj\.weight$", name)):
            tensor = _interleaved(tensor, heads if found[1] == "q" else kv_heads)
        own = DECODER.sub("", name, count=1)
        given = (names.get_name(known, try_suffixes=(".weight", ".bias")) for known in (f"model.{own}", own))
        if (theirs := next(filter(None, given), None)) is None:
            raise ValueError(f"{name}: llama.cpp has no such tensor")
        writer.add_tensor(theirs, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Path, size: int, split: str) -> None:
    """The tokens of a byte-level tokenizer.json, special ones as such, and more up to `size`. llama.cpp wants some
    merge, and a token for the two line breaks in front of an Idefics3's whole picture. Where make_checkpoint.py's
    tokenizer has none, one that never applies and an unused token do.
    """
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    ids = dict(tokenizer["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = [*sorted(ids, key=lambda token: ids[token]), *(f"<unused {i}>" for i in range(len(ids), size))]
    if BREAKS not in ids:
        tokens[tokens.index(next(token for token in tokens if token.startswith("<unused")))] = BREAKS
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(merges or ["<unused> <unused>"])
    writer.add_add_bos_token(False)


def tensors(checkpoint: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Names and values of a checkpoint's tensors."""
    from safetensors import safe_open

    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open does not iterate)
                yield name, opened.get_tensor(name).float().numpy()


def _interleaved(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of queries or keys in the order of Meta's rotary embedding, which llama.cpp's "llama" uses: pairs, not
    halves.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def matrices(path: Path) -> list[dict[str, Any]]:
    """Every matrix that a decode step reads whole, as the fields of weights.Matrix."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    gathered = "token_embd.weight" if "output.weight" in stored else ""
    found = []
    for name, tensor in stored.items():
        if len(tensor.shape) == 2 and name != gathered:
            kind = tensor.tensor_type.name
            block_size = None if kind in ("F32", "F16", "BF16") else int(gguf.GGML_QUANT_SIZES[tensor.tensor_type][0])
            bits = int(re.search(r"\d+", kind)[0])  # type: ignore[index]
            found.append((bits, block_size, not kind.endswith("_1"), int(tensor.n_bytes)))
    return [dict(zip(("bits", "block_size", "symmetric", "bytes"), facts, strict=True)) for facts in found]


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        print(json.dumps(matrices(Path(sys.argv[2]))))
