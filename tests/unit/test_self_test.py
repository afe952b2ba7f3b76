"""What a package proves of its gate whenever it is loaded: in Python here, in C++ by tests/conformance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import toy
from conftest import load
from onnx import numpy_helper

from autosteer.runtime import Manifest, PackageError, ProviderError
from autosteer.runtime.self_test import check_gate
from autosteer.runtime.subgraph import BoundGraph, require_onnxruntime

W = toy.bend().T
USELESS = {
    "zero": 0 * W,
    "identity": np.eye(toy.D, dtype=np.float32),
    "minus five times the identity": -5 * np.eye(toy.D, dtype=np.float32),
    "a millionth of itself": 1e-6 * W,
    "a three hundredth of itself": 0.003 * W,
    "its negative": -W,
    "another of the same size": np.roll(W, 1, axis=0),
}


def with_constant(folder: Path, graph: str, name: str, value: np.ndarray) -> None:
    """A package made with another weight: its hashes are right."""
    model = onnx.load(folder / f"{graph}.onnx")
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.save(model, folder / f"{graph}.onnx")
    toy.rehash(folder)


@pytest.mark.parametrize("matrix", USELESS.values(), ids=USELESS)
def test_a_steer_matrix_that_is_not_the_packages_is_refused(copy_of_package, matrix):
    with_constant(copy_of_package, "refusal_head", "bend", matrix.T)
    with pytest.raises(PackageError, match="refusal_head: it steers otherwise than at export"):
        load(copy_of_package)


@pytest.mark.parametrize(("word", "p"), [("hello", 0.9), ("bad", 0.1), ("bad", float("nan"))])
def test_a_prober_that_scores_otherwise_is_refused(copy_of_package, word, p):
    table = np.full(toy.V, toy.P_SAFE, np.float32)
    table[toy.ID["bad"]] = 0.9
    table[toy.ID[word]] = p
    with_constant(copy_of_package, "prober", "table", table)
    with pytest.raises(PackageError, match="prober: a known state has p_unsafe"):
        load(copy_of_package)


def test_an_lm_head_that_answers_otherwise_is_refused(copy_of_package):
    with_constant(copy_of_package, "lm_head", "weight", toy.lm_head_weight(attentive=True))
    with pytest.raises(PackageError, match="lm_head: steering a known state moves its logits"):
        load(copy_of_package)


def test_a_strength_that_was_freed_is_found_on_any_onnxruntime(engine, package, monkeypatch):
    """Up to 1.28 a binding did not keep its arrays: what reads like 0 where the strength was, steers nothing."""
    bind = BoundGraph.__init__

    def forgetful(self, session, inputs, outputs, fresh):
        bind(self, session, inputs, outputs, fresh)
        if "strength" in inputs:
            inputs["strength"].update_inplace(np.zeros(1, np.float32))

    monkeypatch.setattr(BoundGraph, "__init__", forgetful)
    with pytest.raises(PackageError, match="refusal_head: it steers otherwise"):
        check_gate(package, engine.manifest, engine.graphs, engine.device)


def test_quantised_packages_have_wider_limits_for_the_logits_alone(copy_of_package):
    """int8 activations: the logits' shift may differ by a quarter, the Refusal Head's own product by a thousandth."""
    manifest = Manifest.load(copy_of_package)
    (state,) = manifest.proof.steered
    moved = replace(manifest, proof=replace(manifest.proof, steered=(replace(state, shift=1.2 * state.shift),)))
    moved.save(copy_of_package)
    with pytest.raises(PackageError, match="lm_head: steering a known state"):
        load(copy_of_package)
    replace(moved, precision="int4").save(copy_of_package)
    load(copy_of_package)


@pytest.mark.parametrize(
    ("installed", "works"),
    [("1.23.2", True), ("1.24.0+nv25", True), ("2.0.0", True), ("1.22.1", False), ("0.9", False), ("dev", False)],
)
def test_an_onnxruntime_older_than_the_package_needs_is_refused(installed, works):
    if works:
        require_onnxruntime("1.23", installed)
        return
    with pytest.raises(
        ProviderError, match=rf"this package needs onnxruntime 1\.23 or newer; {installed} is installed"
    ):
        require_onnxruntime("1.23", installed)


def test_the_version_is_asked_before_anything_is_loaded(copy_of_package):
    replace(Manifest.load(copy_of_package), onnxruntime="99.0").save(copy_of_package)
    (copy_of_package / "lm_head.onnx").write_bytes(b"not looked at")
    with pytest.raises(ProviderError, match=r"needs onnxruntime 99\.0 or newer"):
        load(copy_of_package)
