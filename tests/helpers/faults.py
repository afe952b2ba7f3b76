"""Packages of toy.py whose graphs fail while they run: each sound until it meets a word (or a picture), then

    raises    an operator fails
    nan, inf  its output is that
    fewer     its output lacks the last row
    more      its output has the first row twice
    stalls    it runs for hours
    type      its output has another type, at once: such a package must not load

So the gate's proof passes at load, and both runtimes meet the fault within a request, without a hook.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import toy
from onnx import TensorProto, helper, numpy_helper

GRAPHS = {  # the tensors that a fault looks at and spoils, and the axis of its rows
    "vision_encoder": ("pixel_values", "image_features", 1),
    "embed_tokens": ("input_ids", "inputs_embeds", 1),
    "decoder_lower": ("inputs_embeds", "hidden_states", 1),
    "prober": ("hidden_states", "p_unsafe", 0),
    "decoder_upper": ("hidden_states", "last_hidden_state", 1),
    "refusal_head": ("last_hidden_state", "steered_hidden_state", 1),
    "lm_head": ("last_hidden_state", "logits", 1),
}
BEFORE_THE_VERDICT = ("vision_encoder", "embed_tokens", "decoder_lower", "prober")
KINDS = ("raises", "nan", "inf", "fewer", "more")
PROMPT_WORD, ANSWER_WORD = "tick", "sorry"  # words that set off a fault: in a prompt, in a refusal
UNSAFE, SAFE = f"{PROMPT_WORD} bad", f"{PROMPT_WORD} hello"
GUARDED = ("sorry refuse", toy.REFUSAL_TEXT)  # what may be shown for UNSAFE, or a beginning of it


def with_fault(source: Path, folder: Path, graph: str, kind: str, word: str = PROMPT_WORD) -> Path:
    """A copy of a package with a fault in a graph. The picture that sets off the image graph's is any bright one."""
    shutil.copytree(source, folder)
    file = folder / f"{graph}.onnx"
    model = onnx.load(file)
    read, spoilt, axis = GRAPHS[graph]
    for node in model.graph.node:
        node.output[:] = ["sound" if name == spoilt else name for name in node.output]
    fault = Fault(model.graph, spoilt, axis)
    fault.fires(read, toy.ID[word])
    getattr(fault, kind)()
    onnx.save(model, file)
    toy.rehash(folder)
    return folder


class Fault:
    """Nodes that make the output of "sound"."""

    def __init__(self, graph: onnx.GraphProto, spoilt: str, axis: int):
        self.graph, self.spoilt, self.axis = graph, spoilt, axis

    def node(self, kind: str, inputs: list[Any], output: str, **attributes: Any) -> None:
        """A node; inputs that are no names become constants."""
        names = []
        for number, given in enumerate(inputs):
            name = given if isinstance(given, str) else f"{output}-{number}"
            if not isinstance(given, str):
                self.graph.initializer.append(numpy_helper.from_array(np.asarray(given), name))
            names.append(name)
        self.graph.node.append(helper.make_node(kind, names, [output], **attributes))

    def fires(self, read: str, word: int) -> None:
        """A boolean, "fires": whether an input has the word, in a row of its own or in the mean of a few."""
        if read == "input_ids":
            self.node("Equal", [read, np.int64(word)], "has")
            self.node("Cast", ["has"], "much", to=TensorProto.FLOAT)
        elif read == "pixel_values":
            self.node("Identity", [read], "much")
        else:
            self.node("Gather", [read, np.array([word])], "much", axis=-1)
        self.node("ReduceMax", ["much"], "most", keepdims=0)
        self.node("Greater", ["most", np.float32(0.05)], "fires")

    def raises(self) -> None:
        self.node("Where", ["fires", np.int64(1000), np.int64(0)], "place")
        self.node("Gather", [np.zeros(1, np.float32), "place"], "nothing")
        self.node("Add", ["sound", "nothing"], self.spoilt)

    def _number(self, number: float) -> None:
        self.node("Where", ["fires", np.float32(number), np.float32(0)], "added")
        self.node("Add", ["sound", "added"], self.spoilt)

    def nan(self) -> None:
        self._number(float("nan"))

    def inf(self) -> None:
        self._number(float("inf"))

    def fewer(self) -> None:
        self.node("Where", ["fires", np.array([-1]), np.array([2**62])], "fault-end")
        self.node("Slice", ["sound", np.array([0]), "fault-end", np.array([self.axis])], self.spoilt)

    def more(self) -> None:
        self.node("Where", ["fires", np.array([1]), np.array([0])], "fault-end")
        self.node("Slice", ["sound", np.array([0]), "fault-end", np.array([self.axis])], "again")
        self.node("Concat", ["sound", "again"], self.spoilt, axis=self.axis)

    def type(self) -> None:
        self.node("Cast", ["sound"], self.spoilt, to=TensorProto.DOUBLE)
        (output,) = (o for o in self.graph.output if o.name == self.spoilt)
        output.type.tensor_type.elem_type = TensorProto.DOUBLE

    def stalls(self) -> None:
        scalar = helper.make_tensor_value_info
        nodes = [helper.make_node("Identity", ["on"], ["on_out"]), helper.make_node("Identity", ["x"], ["x_out"])]
        inputs = [scalar("n", TensorProto.INT64, ()), scalar("on", TensorProto.BOOL, ()), scalar("x", 1, None)]
        body = helper.make_graph(
            nodes, "body", inputs, [scalar("on_out", TensorProto.BOOL, ()), scalar("x_out", 1, None)]
        )
        self.node("Where", ["fires", np.int64(2**50), np.int64(1)], "times")
        self.node("Loop", ["times", np.bool_(True), "sound"], self.spoilt, body=body)


def hiding_nothing(source: Path, folder: Path, layers: Sequence[int] | None = None) -> Path:
    """A copy of a package in which texts that share a pass see each other: `layers` of decoder_lower (all of them)
    ignore its attention bias.
    """
    shutil.copytree(source, folder)
    model = onnx.load(folder / "decoder_lower.onnx", load_external_data=False)
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    for layer in range(len(attention)) if layers is None else layers:
        del attention[layer].input[10:]
    onnx.save(model, folder / "decoder_lower.onnx")
    toy.rehash(folder)
    return folder


def with_bias(source: Path, folder: Path, operator: str, value: float) -> Path:
    """A copy of a package in which decoder_lower's attention bias goes through an operator first: Max or Mul."""
    shutil.copytree(source, folder)
    model = onnx.load(folder / "decoder_lower.onnx", load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["changed_bias" if name == "attention_bias" else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), "by"))
    model.graph.node.insert(0, onnx.helper.make_node(operator, ["attention_bias", "by"], ["changed_bias"]))
    onnx.save(model, folder / "decoder_lower.onnx")
    toy.rehash(folder)
    return folder
