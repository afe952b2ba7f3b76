"""Validation refuses every damage that tools/mutate.py does to a package, and every wrong reading of a
checkpoint. The whole count takes minutes a precision (`pytest -m mutation`); a sample of it runs always.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import mutate
import numpy as np
import onnx
import pytest
import torch
from exported import demo_checkpoint
from mutate import PARTS, REWIRINGS, Mutation, Package

from autosteer.export.checkpoint import on_demand
from autosteer.export.checkpoint.decoder_config import decoder_config
from autosteer.export.checkpoint.open import Checkpoint
from autosteer.export.package import ExportOptions, write_package
from autosteer.export.validation import validate
from autosteer.export.validation.metrics import divergence

KINDS = {
    "fp32": ExportOptions("fp32"),
    "int8": ExportOptions("int8"),
    "int4": ExportOptions("int4"),
    "int4-prefill": ExportOptions("int4", prefill="int8", kv_cache="int8"),
}
LAYERS = (1, 5)  # one below the demo's split, one above


@pytest.fixture(scope="module", params=KINDS, ids=str)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The demo, sound."""
    return Package.write(tmp_path_factory.mktemp(request.param), "demo", KINDS[request.param], guarded=True)


def survivors(package: Package, mutations: Iterator[Mutation]) -> list[str]:
    """What validation lets through."""
    found = []
    for mutation in mutations:
        with package.damaged(mutation):
            if not package.failed(mutation):
                found.append(f"{mutation.graph}: {mutation.tensor or 'wiring'}: {mutation.damage}")
    return found


def sample(package: Package) -> Iterator[Mutation]:
    """Of each part of each graph two damages, other ones from part to part, and of each decoder graph one rewiring."""
    ways, wirings = itertools.count(), itertools.count()
    by_part: dict[tuple[str, str], list[Mutation]] = {}
    for mutation in filter(None, package.mutations(LAYERS)):
        by_part.setdefault((mutation.graph, mutation.part), []).append(mutation)
    for (_, part), mutations in by_part.items():
        if part == "wiring":
            yield mutations[next(wirings) * 3 % len(mutations)]
        else:
            yield from {id(m): m for m in (mutations[next(ways) * 7 % len(mutations)] for _ in range(2))}.values()


def test_a_sample_of_mutations_is_refused_and_the_sound_package_is_not(package: Package) -> None:
    assert package.failed() == []
    assert survivors(package, sample(package)) == []
    assert package.failed() == [], "the damage was not undone"


@pytest.mark.mutation
def test_every_mutation_is_refused(package: Package) -> None:
    assert survivors(package, filter(None, package.mutations(LAYERS))) == []


@pytest.mark.mutation
def test_what_a_package_does_shows_a_part_that_is_not_there_without_a_look_at_its_numbers(package: Package) -> None:
    """A matrix of zeros, in every graph, whatever its numbers are compared with."""
    zeroed = [
        m
        for m in filter(None, package.mutations(LAYERS))
        if m.damage == "zero"
        and not m.tensor.endswith((".codes", ".zero_points", ".smoothing"))
        and ".weight" in m.tensor
    ]
    assert len(zeroed) > 20
    for mutation in zeroed:
        with package.damaged(mutation):
            assert package.failed(mutation, behaviour_only=True), f"{mutation.graph}: {mutation.tensor}"


def test_mutations_are_of_every_part_of_every_graph(package: Package) -> None:
    """A pattern that matches nothing would try nothing, and nothing would survive."""
    found = {(m.graph, m.part) for m in filter(None, package.mutations(LAYERS))}
    parts = {part for _, part in found}
    expected = {*PARTS, "wiring"} - (
        {"cache scales", "smoothing"} if package.manifest.precision != "int8" else {"cache scales"}
    )
    if "prefill_lower" in package.manifest.graphs:
        expected |= {"cache scales", "smoothing"}
    assert parts == expected
    for graph in package.manifest.graphs:
        names = [
            t.name for t in onnx.load(package.folder / f"{graph}.onnx", load_external_data=False).graph.initializer
        ]
        assert {part for g, part in found if g == graph} >= {p for name in names if (p := mutate.part_of(name))} - {
            "bias"
        }


def test_every_rewiring_changes_some_graph(package: Package) -> None:
    wirings = {m.damage for m in filter(None, package.mutations(LAYERS)) if m.part == "wiring"}
    assert wirings == {rewire.__name__.replace("_", " ") for rewire in REWIRINGS}


# --- reading the checkpoint ------------------------------------------------------------------------------------------


def tensors_read_differently(checkpoint: Checkpoint) -> int:
    return on_demand.tensors_read_differently(checkpoint, decoder_config(checkpoint).lm_head)


def test_the_demo_is_read_as_hugging_face_reads_it_as_a_whole_and_by_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tensors_read_differently(demo_checkpoint()) == 0
    monkeypatch.setattr(on_demand, "WHOLE_NUMBERS", 0)
    assert tensors_read_differently(demo_checkpoint()) == 0


def renamed(*renames: tuple[str, str]) -> Checkpoint:
    """The demo, read with more renames."""
    family = demo_checkpoint().family
    return dataclasses.replace(
        demo_checkpoint(), family=dataclasses.replace(family, renames=(*family.renames, *renames))
    )


def wrong_tables(change: Callable[[torch.Tensor], torch.Tensor], methods: tuple[str, ...]) -> Checkpoint:
    """The demo, whose tables of the vocabulary are read wrong by some of a checkpoint's methods."""

    class Wrong(Checkpoint):
        def rows(self, module_path, block_bytes):
            wrong = "embed_tokens" in module_path and "rows" in methods
            return (change(block) if wrong else block for block in super().rows(module_path, block_bytes))

        def gather(self, module_path, rows):
            found = super().gather(module_path, rows)
            return change(found) if "embed_tokens" in module_path and "gather" in methods else found

    demo = demo_checkpoint()
    return Wrong(**{field.name: getattr(demo, field.name) for field in dataclasses.fields(demo)})


@pytest.mark.parametrize("layers", ["all", "one"])
@pytest.mark.parametrize(
    ("checkpoint", "differing"),
    [
        (
            renamed((r"mlp\.gate_proj", "mlp.x"), (r"mlp\.up_proj", "mlp.gate_proj"), (r"mlp\.x", "mlp.up_proj")),
            (16, 2),
        ),
        (
            renamed(
                ("input_layernorm", "x"),
                ("post_attention_layernorm", "input_layernorm"),
                (r"\.x\.", ".post_attention_layernorm."),
            ),
            (16, 2),
        ),
        (wrong_tables(lambda rows: 2 * rows, ("rows", "gather")), (2, 2)),
        (wrong_tables(lambda rows: rows.flip(1), ("gather",)), (1, 1)),
        (wrong_tables(lambda rows: rows[:, :1].expand_as(rows), ("rows",)), (2, 2)),
    ],
    ids=["gate and up exchanged", "norms exchanged", "doubled embedding", "gathered in reverse", "transposed"],
)
def test_a_mistake_in_our_reading_of_a_checkpoint_is_not_in_the_reference_too(
    checkpoint: Checkpoint, differing: tuple[int, int], layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Package and PyTorch were fed by the same reader: a consistent mistake was in both, and all lines were perfect."""
    if layers == "one":
        monkeypatch.setattr(on_demand, "WHOLE_NUMBERS", 0)
    assert tensors_read_differently(checkpoint) == differing[layers == "one"]


def test_such_a_mistake_fails_the_export_though_package_and_reference_agree(tmp_path: Path) -> None:
    checkpoint = renamed((r"mlp\.gate_proj", "mlp.x"), (r"mlp\.up_proj", "mlp.gate_proj"), (r"mlp\.x", "mlp.up_proj"))
    manifest = write_package(tmp_path, checkpoint, None, ExportOptions(), lambda _: None)
    checks = validate.validate_package(tmp_path, manifest, checkpoint, None, lambda _: None).checks
    assert [check.name for check in checks if not check.passed] == ["tensors that Hugging Face reads otherwise"]


# --- lines -----------------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_distributions_and_not_of_logits() -> None:
    """An offset of all logits is nothing; a token that is never possible does not count; NaN is no agreement."""
    logits = np.array([[1.0, 2.0, 0.5, -3.4e38], [0.0, 0.0, 3.0, -3.4e38]], np.float32)
    assert divergence(logits + np.float32(7), logits) < 1e-9
    p = np.exp(logits[:, :3]) / np.exp(logits[:, :3]).sum(1, keepdims=True)
    q = p[:, ::-1]
    other = np.concatenate([np.log(q), logits[:, 3:]], axis=1)
    assert divergence(other, logits) == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-5)
    assert np.isnan(divergence(logits * np.float32("nan"), logits))
    assert divergence(logits[:1], logits) == float("inf")
