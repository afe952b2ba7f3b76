"""A whole package of a few KB, built with onnx.helper in milliseconds, whose every answer can be worked out by hand.

    embedding   token t is the unit vector e_t (template tokens and function words: like any other)
    lower       h_t = e_t + mean(content words so far) / 2      GroupQueryAttention with q = k = 0: a plain mean
    <gen>       embedded as zero, so the first answer token follows from the most frequent content word of the prompt
    lm_head     the word NEXT says: "red" is answered "orange yellow green <end>"
    prober      a table by word, read at the last word the user wrote: 0.1, and 0.9 for "bad"; "b4d" is another word
    monitor     sqrt(h . m), if there is one: "green" and "evil" are unsafe; "nan" and "crash" break it, "two" is no
                probability. It reads windows of 2 tokens
    head W      every word bends towards "please", whose next is "sorry": a steered answer is "sorry refuse <end>"

`attentive=True` makes a second package with random attention in both layers (rotary, two heads) and a random lm_head:
nothing there can be worked out by hand, but any mistake in a cache changes its logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from autosteer.runtime.manifest import (
    FORMAT_VERSION,
    AnyresSpec,
    DataFile,
    Dims,
    GateProof,
    GraphSpec,
    ImageSpec,
    KVCacheSpec,
    Manifest,
    MonitorSpec,
    ProberSpec,
    PromptSpec,
    RefusalSpec,
    RotarySpec,
    Source,
    SteeredState,
    TemplatePiece,
    TensorSpec,
    Tolerance,
    TurnSpec,
    VideoSpec,
    sha256,
)

CONTENT = "red orange yellow green tick tock hello world bad evil plan nan inf two negative crash please sorry refuse"
FUNCTION = "<unk> you: system: what look"
SPECIAL = ("<begin>", "<gen>", "<image>", "<end>")
WORDS = (*FUNCTION.split(), *CONTENT.split())
FILLERS = ("b4d", *(f"w{i}" for i in range(1, 32 - len(WORDS) - len(SPECIAL))))
VOCABULARY = (*WORDS, *FILLERS, *SPECIAL)
ID = {word: i for i, word in enumerate(VOCABULARY)}
V = D = len(VOCABULARY)  # 32
END = ID["<end>"]

NEXT = {
    "red": "orange",
    "orange": "yellow",
    "yellow": "green",
    "green": "<end>",
    "tick": "tock",
    "tock": "tick",  # never ends
    "hello": "world",
    "world": "<end>",
    **dict.fromkeys(("bad", "nan", "inf", "two", "negative", "crash"), "evil"),
    "evil": "plan",
    "plan": "<end>",
    "please": "sorry",
    "sorry": "refuse",
    "refuse": "<end>",
}
P_UNSAFE = {"bad": 0.9, "nan": float("nan"), "inf": float("inf"), "two": 2.0, "negative": -1.0}
P_SAFE = 0.1
CRASH = "crash"  # the prober raises here
UNSAFE_WORDS = {"green": 0.8, "evil": 0.8, "bad": 0.25, "nan": -1.0, "two": 100.0}  # m; 0 of others
WINDOW, ANSWER_THRESHOLD = 2, 0.5
REFUSAL_TEXT = "sorry refuse, i must not answer that."
STRENGTH = 0.1
BEND = 15.0  # times STRENGTH is 1.5: more than the 1 of a word, or the 0.5 of the prompt's

F32, I64, I32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
NUMPY = {F32: "float32", I64: "int64", I32: "int32"}


@dataclass(frozen=True)
class Shape:
    """Sizes of the attention."""

    heads: int
    kv_heads: int
    head_dim: int


def build(
    folder: Path,
    *,
    guarded: bool = True,
    images: bool = True,
    newline: bool = True,
    videos: bool = False,
    attentive: bool = False,
    prefill: bool = False,
    places: bool = False,
    deepstack: bool = False,
    monitored: bool = False,
    masked: bool = False,
    context_length: int = 64,
    threshold: float = 0.5,
    p_unsafe: dict[str, float] | None = None,
) -> Manifest:
    """Write a package into `folder` (made if need be). `p_unsafe` replaces entries of the prober's table. `places`: the
    rows of a picture have positions of their own (RotarySpec.axes). `deepstack`, `masked`: decoder_lower has that
    input, or an attention bias.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = Shape(heads=2, kv_heads=1, head_dim=16) if attentive else Shape(heads=1, kv_heads=1, head_dim=D)
    graphs = {
        "embed_tokens": _embed_tokens(folder),
        "decoder_lower": _decoder(folder, "decoder_lower", 0, shape, attentive, deepstack, masked),
        "decoder_upper": _decoder(folder, "decoder_upper", 1, shape, attentive),
        "lm_head": _lm_head(folder, attentive),
    }
    if prefill:
        graphs |= {
            name: _decoder(folder, name, layer, shape, attentive, masked=masked and not layer)
            for layer, name in enumerate(("prefill_lower", "prefill_upper"))
        }
    if guarded:
        graphs |= {"prober": _prober(folder, p_unsafe or {}), "refusal_head": _refusal_head(folder)}
    if monitored:
        graphs["monitor"] = _monitor(folder)
    if images:
        graphs["vision_encoder"] = _vision_encoder(folder, newline)
    _tokenizer().save(str(folder / "tokenizer.json"))
    proof = _proof(folder, p_unsafe or {}, attentive, monitored) if guarded else None
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=Source("toy", None, "toy", None),
        precision="fp32",
        guarded=guarded,
        split_layer=1,
        dims=Dims(D, 2, shape.kv_heads, shape.head_dim, V, context_length),
        graphs=graphs,
        files=(data_file(folder, "tokenizer.json"), *([data_file(folder, proof.file)] if proof else [])),
        kv_cache=KVCacheSpec("float32", "BNSH"),
        rotary=RotarySpec(frequencies(shape.head_dim), 1.0, axes(shape.head_dim) if places else ()),
        prompt=PROMPT if videos else replace(PROMPT, user=replace(PROMPT.user, video=())),
        image=IMAGE if images else None,
        video=VIDEO if videos else None,
        prober=ProberSpec(-(len(PROMPT.generation) + 1), "last", threshold, {"heldout_auroc": 1.0})
        if guarded
        else None,
        monitor=MonitorSpec(WINDOW, ANSWER_THRESHOLD, {"false_stops": 0.0}) if monitored else None,
        refusal=RefusalSpec(STRENGTH, REFUSAL_TEXT) if guarded else None,
        golden=(),
        tolerance=Tolerance(1e-3, 0),
        proof=proof,
        validation={},
        versions={"onnx": onnx.__version__},
        onnxruntime="1.22",
    )
    manifest.save(folder)
    return manifest


def frequencies(head_dim: int) -> tuple[float, ...]:
    """Of rotary, (head_dim / 2,)."""
    return tuple((1 / 100.0 ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32).tolist())


def axes(head_dim: int) -> tuple[int, ...]:
    """Of rotary, (head_dim / 2,), for a model whose pictures have rows and columns."""
    return tuple(i % 3 for i in range(head_dim // 2))


def _proof(folder: Path, changes: dict[str, float], attentive: bool, monitored: bool) -> GateProof:
    """A safe word and an unsafe one for prober and monitor; for the Refusal Head a word as the last hidden state."""
    scores = {word: {**P_UNSAFE, **changes}.get(word, P_SAFE) for word in ("hello", "bad")}
    last = unit("red")
    bent = last + np.float32(STRENGTH) * last @ bend()
    weight = lm_head_weight(attentive)
    plain, steered = last @ weight, bent @ weight
    shift = float(np.sqrt(np.mean((steered - plain) ** 2)))
    state = SteeredState(int(plain.argmax()), int(steered.argmax()), shift)
    np.stack([*map(unit, scores), last, bent]).astype("<f4").tofile(folder / "proof.f32")
    watched = tuple(UNSAFE_WORDS.get(word, 0.0) ** 0.5 for word in scores) if monitored else ()
    return GateProof("proof.f32", tuple(scores.values()), (state,), watched)


def data_file(folder: Path, name: str) -> DataFile:
    """A file's entry in the manifest."""
    return DataFile(name, (folder / name).stat().st_size, sha256(folder / name))


def _special(text: str) -> TemplatePiece:
    return TemplatePiece("token", text, ID[text])


PROMPT = PromptSpec(
    begin=(_special("<begin>"),),
    system=TurnSpec((TemplatePiece("literal", "system: "),), (), (TemplatePiece("text"),), (_special("<end>"),)),
    user=TurnSpec(
        (TemplatePiece("literal", "you: "),),
        (TemplatePiece("image"), TemplatePiece("literal", " ")),
        (TemplatePiece("text"),),
        (),
        video=(TemplatePiece("video"), TemplatePiece("literal", " ")),
    ),
    assistant=TurnSpec((_special("<gen>"),), (), (TemplatePiece("text"),), (_special("<end>"),)),
    generation=(_special("<gen>"),),
    images_first=False,
    strip_text=False,
    end_token_ids=(END,),
)
ANYRES = AnyresSpec(tokens_per_side=2, grid_pinpoints=((4, 8), (8, 4), (8, 8)), max_tiles_side=9)
IMAGE = ImageSpec(
    kind="anyres",
    tile_size=4,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    rescale_factor=1 / 255,
    resample="nearest",
    anyres=ANYRES,
)

VIDEO = VideoSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), rescale_factor=1 / 255, pooled_side=1)


def _tokenizer() -> Tokenizer:
    words = VOCABULARY[: -len(SPECIAL)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    assert [tokenizer.token_to_id(s) for s in SPECIAL] == [ID[s] for s in SPECIAL]
    return tokenizer


def unit(word: str) -> np.ndarray:
    """e_t (D,)"""
    return np.eye(D, dtype=np.float32)[ID[word]]


def _embed_tokens(folder: Path) -> GraphSpec:
    table = np.eye(V, D, dtype=np.float32)
    table[ID["<gen>"]] = 0
    return _save(
        folder,
        "embed_tokens",
        [("input_ids", I64, (1, "sequence_length"))],
        [("inputs_embeds", F32, (1, "sequence_length", D))],
        [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])],
        {"table": table},
    )


def _decoder(
    folder: Path, name: str, layer: int, s: Shape, attentive: bool, deepstack: bool = False, masked: bool = False
) -> GraphSpec:
    """One decoder layer around a real GroupQueryAttention; the upper half keeps the last `num_logits` rows only."""
    source, target = ("inputs_embeds", "hidden_states") if layer == 0 else ("hidden_states", "last_hidden_state")
    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    if attentive:
        rng = np.random.default_rng(layer)
        qkv = rng.normal(size=(D, width)).astype(np.float32)
        out = rng.normal(size=(s.heads * s.head_dim, D)).astype(np.float32) / 4
    else:  # the upper half's attention is computed, cached and multiplied by zero
        content = np.diag([float(word in CONTENT.split()) for word in VOCABULARY])
        qkv = np.concatenate([np.zeros((D, 2 * D)), content], axis=1).astype(np.float32)
        out = np.eye(D, dtype=np.float32) * (0.5 if layer == 0 else 0.0)
    past, present = ([f"{p}.{layer}.{kind}" for kind in ("key", "value")] for p in ("past_key_values", "present"))
    attention = helper.make_node(
        "GroupQueryAttention",
        ["qkv", "", "", *past, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"]
        + (["", "attention_bias"] if masked else []),
        ["attended", *present],
        domain="com.microsoft",
        num_heads=s.heads,
        kv_num_heads=s.kv_heads,
        do_rotary=1,
    )
    nodes = [
        helper.make_node("MatMul", [source, "w_qkv"], ["qkv"]),
        attention,
        helper.make_node("MatMul", ["attended", "w_out"], ["mixed" if deepstack else "branch"]),
        *([helper.make_node("Add", ["mixed", "deepstack.0"], ["branch"])] if deepstack else []),
        helper.make_node("Add", [source, "branch"], ["all" if layer else target]),
    ]
    if layer:
        nodes.append(helper.make_node("Neg", ["num_logits"], ["first"]))
        nodes.append(helper.make_node("Slice", ["all", "first", "end", "axis"], [target]))
    kv_in = ("batch", s.kv_heads, "past_sequence_length", s.head_dim)
    kv_out = ("batch", s.kv_heads, "total_sequence_length", s.head_dim)
    return _save(
        folder,
        name,
        [
            (source, F32, ("batch", "sequence_length", D)),
            ("seqlens_k", I32, ("batch",)),
            ("total_sequence_length", I32, ()),
            *((f"{kind}_cache", F32, ("rotary_length", s.head_dim // 2)) for kind in ("cos", "sin")),
            *([("attention_bias", F32, (1, 1, "sequence_length", "total_sequence_length"))] if masked else []),
            *([("deepstack.0", F32, (1, "deepstack_length", D))] if deepstack else []),
            *((p, F32, kv_in) for p in past),
            *([("num_logits", I64, (1,))] if layer else []),
        ],
        [
            (target, F32, ("batch", "num_logits" if layer else "sequence_length", D)),
            *((p, F32, kv_out) for p in present),
        ],
        nodes,
        {
            "w_qkv": qkv,
            "w_out": out,
            "end": np.array([2**63 - 1], np.int64),
            "axis": np.array([1], np.int64),
        },
        layers=(layer, layer + 1),
    )


def lm_head_weight(attentive: bool) -> np.ndarray:
    """(D, V)"""
    if attentive:
        return np.random.default_rng(7).normal(size=(D, V)).astype(np.float32)
    weight = np.zeros((D, V), np.float32)
    for word, following in NEXT.items():
        weight[ID[word], ID[following]] = 1
    return weight


def _lm_head(folder: Path, attentive: bool) -> GraphSpec:
    return _save(
        folder,
        "lm_head",
        [("last_hidden_state", F32, (1, "num_logits", D))],
        [("logits", F32, (1, "num_logits", V))],
        [helper.make_node("MatMul", ["last_hidden_state", "weight"], ["logits"])],
        {"weight": lm_head_weight(attentive)},
    )


def _prober(folder: Path, changes: dict[str, float]) -> GraphSpec:
    """A table by word. "crash" looks beyond its end, where onnxruntime raises."""
    table = np.full(V, P_SAFE, np.float32)
    for word, p in {**P_UNSAFE, **changes}.items():
        table[ID[word]] = p
    entry = np.arange(V)
    entry[ID[CRASH]] = V + 1000
    return _save(
        folder,
        "prober",
        [("hidden_states", F32, (1, D))],
        [("p_unsafe", F32, (1,))],
        [
            helper.make_node("ArgMax", ["hidden_states"], ["word"], axis=1, keepdims=0),
            helper.make_node("Gather", ["entry", "word"], ["found"]),
            helper.make_node("Gather", ["table", "found"], ["p_unsafe"]),
        ],
        {"entry": entry.astype(np.int64), "table": table},
    )


def _monitor(folder: Path) -> GraphSpec:
    """sqrt(h . m). A share of "crash" in the words so far looks beyond the end of a table of one zero."""
    crash = 1000 * unit(CRASH)
    return _save(
        folder,
        "monitor",
        [("hidden_states", F32, (1, D))],
        [("p_unsafe", F32, (1,))],
        [
            helper.make_node("MatMul", ["hidden_states", "m"], ["square"]),
            helper.make_node("Sqrt", ["square"], ["root"]),
            helper.make_node("MatMul", ["hidden_states", "crash"], ["entry"]),
            helper.make_node("Cast", ["entry"], ["found"], to=I64),
            helper.make_node("Gather", ["zero", "found"], ["nothing"]),
            helper.make_node("Add", ["root", "nothing"], ["p_unsafe"]),
        ],
        {"m": sum(m * unit(word) for word, m in UNSAFE_WORDS.items()), "crash": crash, "zero": np.zeros(1, np.float32)},
    )


def _refusal_head(folder: Path) -> GraphSpec:
    """h + strength * h W^T"""
    return _save(
        folder,
        "refusal_head",
        [("last_hidden_state", F32, (1, "num_logits", D)), ("strength", F32, (1,))],
        [("steered_hidden_state", F32, (1, "num_logits", D))],
        [
            helper.make_node("MatMul", ["last_hidden_state", "bend"], ["bent"]),
            helper.make_node("Mul", ["bent", "strength"], ["scaled"]),
            helper.make_node("Add", ["last_hidden_state", "scaled"], ["steered_hidden_state"]),
        ],
        {"bend": bend()},
    )


def bend() -> np.ndarray:
    """W^T (D, D): every word bends towards "please", but for the refusal's own."""
    matrix = np.zeros((D, D), np.float32)
    matrix[:] = BEND * unit("please")
    matrix[[ID["sorry"], ID["refuse"]]] = 0
    return matrix


def _vision_encoder(folder: Path, newline: bool) -> GraphSpec:
    """2 x 2 pixels make a row: the mean of red says "red", of green "green", of blue "bad". The newline row is zero."""
    n, side = IMAGE.tile_size, ANYRES.tokens_per_side
    return _save(
        folder,
        "vision_encoder",
        [("pixel_values", F32, ("tiles", 3, n, n))],
        [("image_features", F32, ("tiles", side**2, D)), *([("image_newline", F32, (D,))] if newline else [])],
        [
            helper.make_node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Reshape", ["pooled", "shape"], ["flat"]),
            helper.make_node("Transpose", ["flat"], ["rows"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["rows", "colours"], ["image_features"]),
            *([helper.make_node("Identity", ["zero"], ["image_newline"])] if newline else []),
        ],
        {
            "shape": np.array([0, 3, side**2], np.int64),
            "colours": np.stack([unit("red"), unit("green"), unit("bad")]),
            "zero": np.zeros(D, np.float32),
        },
    )


def _save(
    folder: Path,
    name: str,
    inputs: list[tuple[str, int, tuple[int | str, ...]]],
    outputs: list[tuple[str, int, tuple[int | str, ...]]],
    nodes: list[Any],
    weights: dict[str, np.ndarray],
    *,
    layers: tuple[int, int] | None = None,
) -> GraphSpec:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(*t) for t in inputs],
        [helper.make_tensor_value_info(*t) for t in outputs],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    file = f"{name}.onnx"
    (folder / file).write_bytes(model.SerializeToString())

    def specs(tensors: list[tuple[str, int, tuple[int | str, ...]]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(n, NUMPY[dtype], tuple(shape)) for n, dtype, shape in tensors)

    return GraphSpec(file, sha256(folder / file), specs(inputs), specs(outputs), layers, "fp32")


def rehash(folder: Path) -> None:
    """Write the hashes of the files as they are now into the manifest: a package made wrong, instead of damaged."""
    manifest = Manifest.load(folder)
    graphs = {name: replace(spec, sha256=sha256(folder / spec.file)) for name, spec in manifest.graphs.items()}
    files = tuple(data_file(folder, entry.file) for entry in manifest.files)
    replace(manifest, graphs=graphs, files=files).save(folder)
