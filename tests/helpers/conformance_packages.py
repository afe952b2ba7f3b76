"""The packages that tests/conformance/*.json speak of, and the changes that its cases make to them.

To have them all on disk, for a runtime that is not in this repository (the README there says what to do with them):

    PYTHONPATH=tests/helpers python tests/helpers/conformance_packages.py FOLDER
"""

from __future__ import annotations

import base64
import functools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import toy
from cpp_runtime import use_byte_level_words
from documents import manifest_text
from onnx import TensorProto, helper, numpy_helper

from autosteer.runtime.draft_maker import install
from autosteer.runtime.draft_table import DraftTable, keys
from autosteer.runtime.manifest import (
    Check,
    FrameGroup,
    Golden,
    GraphSpec,
    LongRotary,
    Manifest,
    NativeSpec,
    NativeVideoSpec,
    SplitSpec,
    TemplatePiece,
    TensorSpec,
    TileSeparators,
    sha256,
)

CASES = Path(__file__).resolve().parents[1] / "conformance"
PICTURES = CASES / "pictures"
Change = dict[str, Any]


# --- the packages ----------------------------------------------------------------------------------------------------


def whole(folder: Path, **variant: Any) -> None:
    """The toy, with something in every field of its manifest."""
    manifest = use_byte_level_words(folder, toy.build(folder, videos=True, **variant))
    (folder / "golden").mkdir()
    shutil.copy(PICTURES / "red.png", folder / "golden" / "red.png")
    goldens = (
        Golden("red", ("golden/red.png",), None, 0.1, "pass", (6, 7)),
        Golden("red", (), -1.0, None, "steer", (6,), videos=(("golden/red.png",),)),
        Golden("", (), None, 0.1, "pass", (6,), prompt_ids=(29, 1, 5, 28)),
    )
    replace(
        manifest,
        files=(*manifest.files, toy.data_file(folder, "golden/red.png")),
        golden=goldens,
        validation={"CPUExecutionProvider": (Check("logits", 1e-6, 1e-3, True), Check("note", 0.5, None, True))},
        source=replace(manifest.source, revision="abc", licence="apache-2.0"),
    ).save(folder)


def drafted(folder: Path) -> None:
    """With a table of what its model often says: "tock" after "tick", and "tick" after "tock". And with a monitor."""
    whole(folder, monitored=True)
    tick, tock = toy.ID["tick"], toy.ID["tock"]
    rows = sorted([(keys([tick])[0], tock), (keys([tock])[0], tick)])
    ngrams, tokens = np.array([key for key, _ in rows], np.uint64), np.array([token for _, token in rows], np.int32)
    install(folder, DraftTable(ngrams, tokens, np.array([204, 204], np.uint8)))


def unguarded(folder: Path) -> None:
    """No gate, and no pictures."""
    use_byte_level_words(folder, toy.build(folder, guarded=False, images=False))


def split(folder: Path) -> None:
    """Pictures are split into tiles, with tokens before each that tell its place (SmolVLM's kind of model)."""
    manifest = use_byte_level_words(folder, toy.build(folder, context_length=200, newline=False))

    def words(rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        tiles = rows * columns + (rows * columns > 1)
        return (*((tile % 5,) * (1 + tile % 2) for tile in range(tiles)), (rows, columns))

    grids = [(rows, columns) for rows in range(1, 4) for columns in range(1, 4)]
    image = replace(
        toy.IMAGE,
        kind="split",
        anyres=None,
        resample="lanczos",
        split=SplitSpec(longest_edge=12, tiles=True),
        tile_separators=tuple(TileSeparators(grid, words(*grid)) for grid in grids),
    )
    replace(manifest, image=image).save(folder)


def tokens(folder: Path) -> None:
    """Pictures become tokens (Chameleon's kind of model): the mean of each row of pixels picks a word."""
    manifest = use_byte_level_words(folder, toy.build(folder, images=False))
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "words"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["input_ids"], to=TensorProto.INT64),
    ]
    graph = helper.make_graph(
        nodes,
        "image_tokenizer",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ("tiles", 3, 4, 4))],
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("tiles", 4))],
        [numpy_helper.from_array(np.array([1, 3]), "axes"), numpy_helper.from_array(np.float32(20), "words")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "image_tokenizer.onnx").write_bytes(model.SerializeToString())
    spec = GraphSpec(
        "image_tokenizer.onnx",
        sha256(folder / "image_tokenizer.onnx"),
        (TensorSpec("pixel_values", "float32", ("tiles", 3, 4, 4)),),
        (TensorSpec("input_ids", "int64", ("tiles", 4)),),
        None,
        "fp32",
    )
    image = replace(toy.IMAGE, kind="centre_crop", anyres=None, resample="lanczos")
    replace(manifest, image=image, graphs={**manifest.graphs, "image_tokenizer": spec}).save(folder)


def native(folder: Path, *, deepstack: bool = False) -> None:
    """Pictures of any size, whose rows stand at their row and column (Qwen2-VL's kind of model; with `deepstack`
    Qwen3-VL's). Attention is random: whatever stands elsewhere changes the answer.
    """
    whole = toy.build(folder, context_length=200, newline=False, attentive=True, deepstack=deepstack)
    manifest = use_byte_level_words(folder, whole)
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("ReduceMean", ["pooled", "frames"], ["mean"], keepdims=1),
        helper.make_node("Reshape", ["mean", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["rows", "colours"], ["image_features"]),
    ]
    colours = np.stack([toy.unit("red"), toy.unit("green"), toy.unit("bad")])
    if deepstack:
        colours = np.concatenate([colours, np.random.default_rng(5).normal(size=(3, toy.D)).astype(np.float32)], 1)
    weights = {"frames": np.array([0]), "shape": np.array([1, 3, -1]), "colours": colours}
    pixels, rows = (2, 3, "height", "width"), (1, "rows", colours.shape[1])
    graph = helper.make_graph(
        nodes,
        "vision_encoder",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, pixels)],
        [helper.make_tensor_value_info("image_features", TensorProto.FLOAT, rows)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "vision_encoder.onnx").write_bytes(model.SerializeToString())
    spec = replace(
        manifest.graphs["vision_encoder"],
        sha256=sha256(folder / "vision_encoder.onnx"),
        inputs=(TensorSpec("pixel_values", "float32", pixels),),
        outputs=(TensorSpec("image_features", "float32", rows),),
    )
    cut = NativeSpec(64, 40 * 16, 2, deepstack=int(deepstack))
    image = replace(toy.IMAGE, kind="native", anyres=None, resample="bicubic", native=cut)
    rotary = replace(manifest.rotary, axes=toy.axes(manifest.dims.head_dim))
    replace(manifest, image=image, rotary=rotary, graphs={**manifest.graphs, "vision_encoder": spec}).save(folder)


def long(folder: Path) -> None:
    """Prompts of more than twelve positions are turned by other frequencies (Phi-3's kind of model)."""
    manifest = use_byte_level_words(folder, toy.build(folder, attentive=True))
    others = LongRotary(12, tuple(f / 3 for f in manifest.rotary.frequencies))
    replace(manifest, rotary=replace(manifest.rotary, long=others)).save(folder)


def videos(folder: Path, *, timed: bool = False) -> None:
    """The same with videos, two frames of which are one: they stand in time by seconds (Qwen2.5-VL's kind of model); or
    `timed`, by words before each group of frames (Qwen3-VL's), whose pixels are counted together.
    """
    native(folder, deepstack=timed)
    manifest = Manifest.load(folder)
    scaled = NativeVideoSpec(64, (60 if timed else 9) * 16, whole=timed, tokens_per_second=0.0 if timed else 2.0)
    video = replace(toy.VIDEO, pooled_side=None, native=scaled)
    pieces = (
        TemplatePiece("literal", "tick "),
        TemplatePiece("seconds"),
        TemplatePiece("literal", " tock"),
        TemplatePiece("video"),
        TemplatePiece("token", "<end>", toy.END),
    )
    user = replace(manifest.prompt.user, video=toy.PROMPT.user.video)
    prompt = replace(manifest.prompt, user=user, frame_group=FrameGroup(2, pieces) if timed else None)
    replace(manifest, video=video, prompt=prompt).save(folder)


PACKAGES: dict[str, Callable[[Path], None]] = {
    "toy": whole,
    "prefill": functools.partial(whole, prefill=True),
    "packed": functools.partial(whole, prefill=True, masked=True),
    "watched": functools.partial(whole, monitored=True),
    "drafted": drafted,
    "unguarded": unguarded,
    "split": split,
    "tokens": tokens,
    "native": native,
    "deepstack": functools.partial(native, deepstack=True),
    "long": long,
    "native videos": videos,
    "timed videos": functools.partial(videos, timed=True),
}


class Packages:
    """Those packages, each made once, and changed copies of them."""

    def __init__(self, folder: Path):
        self._folder = folder

    def whole(self, name: str) -> Path:
        """The package called `name`; not to be changed."""
        path = self._folder / "whole" / name
        if not path.exists():
            path.mkdir(parents=True)
            PACKAGES[name](path)
        return path

    def of(self, case: dict[str, Any]) -> Path:
        """The package that a case is about: its "package", with its "change" made."""
        source = self.whole(case.get("package", "toy"))
        if "change" not in case:
            return source
        path = self._folder / "changed" / case["name"].replace("/", " ")
        if not path.exists():
            shutil.copytree(source, path)
            for change in case["change"]:
                CHANGES[change["do"]](path, change)
        return path


# --- the changes -----------------------------------------------------------------------------------------------------


def _keys(path: str) -> list[str]:
    """A JSON pointer's parts (RFC 6901)."""
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]


def _step(data: Any, key: str) -> Any:
    return data[int(key)] if isinstance(data, list) else data[key]


def _patched(folder: Path, change: Change) -> None:
    """One operation of a JSON patch (RFC 6902) on the manifest: add, replace, remove or copy."""
    file = folder / "autosteer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    *keys, last = _keys(change["path"])
    place = functools.reduce(_step, keys, data)
    value = functools.reduce(_step, _keys(change["from"]), data) if change["do"] == "copy" else change.get("value")
    value = json.loads(json.dumps(value))
    if change["do"] != "copy" and change["do"] != "add":
        _step(place, last)  # a place that is not there is a mistake of the case
    if isinstance(place, list) and change["do"] == "add":
        place.insert(len(place) if last == "-" else int(last), value)
    elif change["do"] == "remove":
        del place[int(last) if isinstance(place, list) else last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    file.write_text(manifest_text(data), encoding="utf-8")


def _as_fraction(folder: Path, change: Change) -> None:
    """Write a whole number of the manifest as 1.0 is written."""
    data = json.loads((folder / "autosteer.json").read_text(encoding="utf-8"))
    value = functools.reduce(_step, _keys(change["path"]), data)
    _patched(folder, {"do": "replace", "path": change["path"], "value": float(value)})


def _text(folder: Path, change: Change) -> None:
    """Put "new" in the place of the first "old" in a file's text."""
    file = folder / change["file"]
    text = file.read_text(encoding="utf-8")
    assert change["old"] in text
    file.write_text(text.replace(change["old"], change["new"], 1), encoding="utf-8")


def _write(folder: Path, change: Change) -> None:
    """Make a file of "text", or of "base64"; "times" repeats it."""
    content = base64.b64decode(change["base64"]) if "base64" in change else change["text"].encode()
    (folder / change["file"]).write_bytes(content * change.get("times", 1))


def _flip(folder: Path, change: Change) -> None:
    """Flip the lowest bit of the byte at "at", a share of the file's length from 0 to 1."""
    content = bytearray((folder / change["file"]).read_bytes())
    content[round(change["at"] * (len(content) - 1))] ^= 1
    (folder / change["file"]).write_bytes(content)


def _cut(folder: Path, change: Change) -> None:
    """Leave the last "bytes" of a file away."""
    (folder / change["file"]).write_bytes((folder / change["file"]).read_bytes()[: -change["bytes"]])


def _append(folder: Path, change: Change) -> None:
    """Put "base64" behind a file's end."""
    (folder / change["file"]).write_bytes((folder / change["file"]).read_bytes() + base64.b64decode(change["base64"]))


def _delete(folder: Path, change: Change) -> None:
    """Delete a file."""
    (folder / change["file"]).unlink()


def _make_folder(folder: Path, change: Change) -> None:
    """Put an empty folder in a file's place."""
    (folder / change["file"]).unlink(missing_ok=True)
    (folder / change["file"]).mkdir()


def _copy_file(folder: Path, change: Change) -> None:
    """Put a copy of the file "from" in the place of "file"."""
    shutil.copy(folder / change["from"], folder / change["file"])


def _rehash(folder: Path, change: Change) -> None:
    """Make the manifest's hashes and sizes those of the files as they are: a package made wrong, instead of damaged."""
    file = folder / "autosteer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    for entry in (*data["graphs"].values(), *data["files"]):
        entry["sha256"] = sha256(folder / entry["file"])
        if "bytes" in entry:
            entry["bytes"] = (folder / entry["file"]).stat().st_size
    file.write_text(manifest_text(data), encoding="utf-8")


def _weights(folder: Path, change: Change) -> None:
    """Put other numbers into a graph's initializer: "value" everywhere, or in "row"; or, of one called "bend",
    see MATRICES.
    """
    file = folder / f"{change['graph']}.onnx"
    model = onnx.load(file)
    (held,) = (tensor for tensor in model.graph.initializer if tensor.name == change["initializer"])
    old = numpy_helper.to_array(held)
    new = MATRICES[change["matrix"]](old) if "matrix" in change else old.copy()
    if "value" in change:
        new[change.get("row", ...)] = float(change["value"])
    held.CopyFrom(numpy_helper.from_array(new.astype(old.dtype), held.name))
    file.write_bytes(model.SerializeToString())


def _node(folder: Path, change: Change) -> None:
    """Compute a graph's output "output" otherwise: what was it goes through one operator more, "op", with the constant
    "inputs" behind it.
    """
    file = folder / f"{change['graph']}.onnx"
    model = onnx.load(file)
    name = change["output"]
    for node in model.graph.node:
        node.output[:] = [f"{name} before" if output == name else output for output in node.output]
    added = []
    for i, values in enumerate(change.get("inputs", ())):
        added.append(f"{name} {i}")
        model.graph.initializer.append(numpy_helper.from_array(np.array(values), added[-1]))
    model.graph.node.append(
        helper.make_node(change["op"], [f"{name} before", *added], [name], **change.get("with", {}))
    )
    file.write_bytes(model.SerializeToString())


def _output(folder: Path, change: Change) -> None:
    """Let a graph give one output more, "name", in front of the others: the constant "value"."""
    file = folder / f"{change['graph']}.onnx"
    model = onnx.load(file)
    value = numpy_helper.from_array(np.array(change["value"], np.float32), "value")
    model.graph.node.append(helper.make_node("Constant", [], [change["name"]], value=value))
    outputs = [helper.make_tensor_value_info(change["name"], TensorProto.FLOAT, value.dims), *model.graph.output]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    file.write_bytes(model.SerializeToString())


def _rank_one(w: np.ndarray) -> np.ndarray:
    """Of W's size, and in a direction that means nothing. (W itself has rank 1 in the toy.)"""
    u, v = np.random.default_rng(1).normal(size=(2, len(w)))
    outer = np.outer(u, v)
    return outer * (np.linalg.norm(w) / np.linalg.norm(outer))


# The steer matrix W of the toy's refusal_head, which computes h + strength * h @ W, replaced:
MATRICES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "0": np.zeros_like,
    "I": lambda w: np.eye(len(w)),
    "-5 I": lambda w: -5 * np.eye(len(w)),
    "1e-6 W": lambda w: 1e-6 * w,
    "-W": lambda w: -w,
    "0.003 W": lambda w: 0.003 * w,
    "rank 1": _rank_one,
}

CHANGES: dict[str, Callable[[Path, Change], None]] = {
    **dict.fromkeys(("add", "replace", "remove", "copy"), _patched),
    "as fraction": _as_fraction,
    "text": _text,
    "write": _write,
    "flip": _flip,
    "cut": _cut,
    "append": _append,
    "delete": _delete,
    "folder": _make_folder,
    "copy file": _copy_file,
    "rehash": _rehash,
    "weights": _weights,
    "node": _node,
    "output": _output,
}


def cases(theme: str) -> list[dict[str, Any]]:
    """The cases of one theme."""
    found: list[dict[str, Any]] = json.loads((CASES / f"{theme}.json").read_text(encoding="utf-8"))
    return found


def shown(messages: Any) -> Any:
    """Messages, or a request with its messages, whose pictures are the files of tests/conformance/pictures."""
    if isinstance(messages, list):
        return [shown(value) for value in messages]
    if not isinstance(messages, dict):
        return messages
    named = {k: shown(v) for k, v in messages.items()}
    if isinstance(named.get("image"), str):
        named["image"] = str(PICTURES / named["image"])
    if isinstance(named.get("video"), list):
        named["video"] = [str(PICTURES / name) for name in named["video"]]
    return named


if __name__ == "__main__":
    target = Path(sys.argv[1])
    made = Packages(target)
    for each in sorted(CASES.glob("*.json")):
        for one in cases(each.stem):
            if "package" in one or "change" in one:
                print(each.stem, one["name"], made.of(one), sep="\t")
