"""Damage a correct package in every way that an exporter's mistake could, one at a time: validation must refuse each.

    python tools/mutate.py --model demo --precision int4 --prefill-precision int8 --kv-cache int8
    python tools/mutate.py --model build/smollm2 --unguarded --precision int8 --layers 3,22

A mutation changes one tensor of one graph (DAMAGES says how) or the wiring of one graph (REWIRINGS). The package is
written once. A damaged graph takes the place of the sound one while validation runs. A damage that changes no number
(zeros scaled, equal zero points in another order) is counted as `unchanged`, not as a mutation.

Exits 1 if anything survived, or if the sound package is refused.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from autosteer.export.checkpoint.hf_model import quiet_transformers
from autosteer.export.checkpoint.open import Checkpoint, open_checkpoint
from autosteer.export.cli import find_safety
from autosteer.export.package import ExportOptions, write_package
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.export.validation import validate
from autosteer.export.validation.audit import GraphAudit, audit
from autosteer.runtime.errors import AutoSteerError
from autosteer.runtime.manifest import CacheType, Check, Manifest, Precision

DAMAGED_FILE = "damaged.bin"  # beside weights.bin
Array = npt.NDArray[Any]

DAMAGES: dict[str, Callable[[Array], Array]] = {
    "zero": np.zeros_like,
    "half": lambda a: (a / 2).astype(a.dtype),
    "twice": lambda a: (a * 2).astype(a.dtype),
    "negative": lambda a: (-a.astype(np.float32)).astype(a.dtype) if a.dtype != np.uint8 else ~a,
    "rows in reverse": lambda a: a[::-1].copy(),
    "columns in reverse": lambda a: a.reshape(len(a), -1)[:, ::-1].reshape(a.shape).copy(),
    "rows by one": lambda a: np.roll(a, 1, 0),
    "next tensor's": lambda a: a,  # see `damaged_tensors`: another of the same shape and type
}
SCALED = ("half", "twice")  # not of codes: two codes in a byte have no half

# What tensors a graph may hold, by name; whatever else it holds is an axis, a bound, a number of an operator's.
PARTS: dict[str, str] = {
    "qkv": r"self_attn\.q_proj\.weight\+",
    "output projection": r"self_attn\.(o|out)_proj\.weight",
    "query, key or value of the tower": r"self_attn\.[qkv]_proj\.weight(\.codes|\.scales)?$",
    "gate": r"mlp\.gate_proj\.weight",
    "up": r"mlp\.up_proj\.weight",
    "down": r"mlp\.down_proj\.weight",
    "norm": r"norm\d?\.(weight|bias)$",
    "bias": r"\.bias$",
    "tower's MLP": r"mlp\.fc\d\.weight",
    "patches": r"(patch|position)_embedding\.weight",
    "projector": r"multi_modal_projector\.|connector\.|image_newline",
    "embedding or head": r"embed_tokens\.weight|lm_head\.weight",
    "cache scales": r"^(key|value)_scales\.",
    "smoothing": r"\.smoothing$",
    "prober": r"^prober\.",
    "refusal head": r"^steer_matrix$",
}


def no_rotation(graph: onnx.GraphProto) -> None:
    """Queries and keys of the first attention are as they come."""
    _attribute(_first(graph, "GroupQueryAttention"), "do_rotary", 0)


def sharper_attention(graph: onnx.GraphProto) -> None:
    """Its scores are twice as large."""
    node = _first(graph, "GroupQueryAttention")
    _attribute(node, "scale", 2 * next(a.f for a in node.attribute if a.name == "scale"))


def short_sighted_attention(graph: onnx.GraphProto) -> None:
    """Its rows attend to four others."""
    _attribute(_first(graph, "GroupQueryAttention"), "local_window_size", 4)


def other_activation(graph: onnx.GraphProto) -> None:
    """tanh(x) x for sigmoid(x) x in the first MLP."""
    _first(graph, "Sigmoid").op_type = "Tanh"


def gate_and_up_exchanged(graph: onnx.GraphProto) -> None:
    """Each multiplies with the other's matrix."""
    gate, up = (_reader(graph, f"mlp.{name}_proj.weight") for name in ("gate", "up"))
    _exchange_weights(graph, gate, up)


def layers_exchanged(graph: onnx.GraphProto) -> None:
    """The first two layers have each other's down projection."""
    _exchange_weights(graph, *_readers(graph, "mlp.down_proj.weight")[:2])


def no_residual(graph: onnx.GraphProto) -> None:
    """The first skip connection adds the branch to itself."""
    node = _first(graph, "SkipSimplifiedLayerNormalization")
    node.input[1] = node.input[0]


def other_epsilon(graph: onnx.GraphProto) -> None:
    """The first norm adds ten times as much to the mean square."""
    node = _first(graph, "SimplifiedLayerNormalization")
    _attribute(node, "epsilon", 10 * next(a.f for a in node.attribute if a.name == "epsilon"))


def caches_exchanged(graph: onnx.GraphProto) -> None:
    """The first attention finds earlier rows' values where their keys should be: a prompt of one pass shows nothing."""
    node = _first(graph, "GroupQueryAttention")
    node.input[3], node.input[4] = node.input[4], node.input[3]


REWIRINGS: tuple[Callable[[onnx.GraphProto], None], ...] = (
    no_rotation,
    sharper_attention,
    short_sighted_attention,
    other_activation,
    gate_and_up_exchanged,
    layers_exchanged,
    no_residual,
    other_epsilon,
    caches_exchanged,
)


@dataclass(frozen=True)
class Mutation:
    """One damage to one graph."""

    graph: str
    part: str  # of PARTS, or "wiring"
    tensor: str  # "" for wiring
    damage: str
    model: onnx.ModelProto  # the damaged graph
    numbers: bytes = b""  # of the damaged tensor, where it stands in a file of its own


@dataclass
class Package:
    """A sound package to damage, and what it was made of."""

    folder: Path
    manifest: Manifest
    checkpoint: Checkpoint
    safety: SafetyArtifact | None
    held: dict[str, GraphAudit]  # what was found in its graph files, while they are sound

    @classmethod
    def write(cls, folder: Path, model: str, options: ExportOptions, *, guarded: bool) -> Package:
        """Without validation."""
        checkpoint = open_checkpoint(model)
        safety = find_safety(checkpoint, None, None) if guarded else None
        manifest = write_package(folder, checkpoint, safety, options, lambda _: None)
        held = validate.audits(folder, manifest, checkpoint, safety)
        return cls(folder, manifest, checkpoint, safety, held)

    def failed(self, damage: Mutation | None = None, *, behaviour_only: bool = False) -> list[str]:
        """The lines of validation that fail, or what it stumbled over, while the package has this `damage`; as
        validate_package, but nothing is looked at again that is as it was, and nothing runs where what is stored is
        wrong already.
        """
        arguments = self.folder, self.manifest, self.checkpoint, self.safety
        try:
            checks: Sequence[Check] = [] if behaviour_only else self._stored(damage)
            if all(check.passed for check in checks):
                checks = validate.behaviour_checks(*arguments, lambda _: None).checks
        except Exception as err:  # an export that ends so has written nothing; any other error is one of ours
            if not isinstance(err, AutoSteerError) and not type(err).__module__.startswith("onnxruntime"):
                raise
            return [type(err).__name__]
        return [check.name for check in checks if not check.passed]

    def _stored(self, damage: Mutation | None) -> list[Check]:
        held = dict(self.held)
        if damage:
            file = self.manifest.graphs[damage.graph].file
            # a node's matrix is made of several tensors, and of what smooths its activations
            alike = "" if damage.tensor.endswith(".smoothing") else damage.tensor
            found = audit(self.folder / file, self.checkpoint, self.safety, lambda name: alike in name)
            held[file] = replace(found, rounding=found.rounding or held[file].rounding)
        checks = validate.stored_checks(self.manifest, held)
        if self.manifest.kv_cache.dtype == "int8" and all(check.passed for check in checks):
            checks.append(validate.cache_scales_check(self.folder, self.manifest, self.checkpoint))
        return checks

    @contextmanager
    def damaged(self, mutation: Mutation) -> Iterator[None]:
        """The package with the mutation, and then again without."""
        path = self.folder / self.manifest.graphs[mutation.graph].file
        sound = path.with_suffix(".sound")
        shutil.copy2(path, sound)
        try:
            onnx.save(mutation.model, path)
            (self.folder / DAMAGED_FILE).write_bytes(mutation.numbers)
            yield
        finally:
            sound.replace(path)

    def mutations(self, layers: Sequence[int] = ()) -> Iterator[Mutation | None]:
        """Of every graph: one for each tensor, except those of other layers than `layers` if any are given, and each
        way to damage it; and of its wiring. None stands for one that would leave every number as it is.
        """
        for name, spec in self.manifest.graphs.items():
            path = self.folder / spec.file
            yield from damaged_tensors(name, path, layers if spec.layers else ())
            for rewire in REWIRINGS if spec.layers else ():
                model = onnx.load(path, load_external_data=False)
                try:
                    rewire(model.graph)
                except LookupError:  # no such node here
                    continue
                yield Mutation(name, "wiring", "", rewire.__name__.replace("_", " "), model)


def damaged_tensors(graph: str, path: Path, layers: Sequence[int]) -> Iterator[Mutation | None]:
    """See `Package.mutations`."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    for at, tensor in enumerate(tensors):
        part = part_of(tensor.name)
        layer = re.search(r"layers\.(\d+)\.|_scales\.(\d+)$", tensor.name)
        if part is None or (layers and layer and int(layer[1] or layer[2]) not in layers):
            continue
        array = _numbers(tensor, path.parent)
        others = (*tensors[at + 1 :], *tensors[:at])
        alike = [t for t in others if (t.dims, t.data_type) == (tensor.dims, tensor.data_type)]
        for damage, change in DAMAGES.items():
            if damage in SCALED and array.dtype in (np.uint8, np.int8):
                continue
            if damage == "next tensor's":
                damaged = _numbers(alike[0], path.parent) if alike else array
            else:
                damaged = change(array)
            if np.array_equal(damaged, array):
                yield None
                continue
            model = onnx.load(path, load_external_data=False)
            replaced, numbers = model.graph.initializer[at], b""
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                numbers = np.ascontiguousarray(damaged).tobytes()
                _refer(replaced, DAMAGED_FILE, len(numbers))
            else:
                replaced.CopyFrom(numpy_helper.from_array(damaged, tensor.name))
            yield Mutation(graph, part, tensor.name, damage, model, numbers)


def _numbers(tensor: onnx.TensorProto, folder: Path) -> Array:
    """A tensor. Codes below a byte come as bytes, (rows, bytes of a row), or flat where rows share one."""
    if tensor.data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4):
        where = {entry.key: entry.value for entry in tensor.external_data}
        numbers = np.fromfile(folder / where["location"], np.uint8, int(where["length"]), offset=int(where["offset"]))
        return numbers if len(numbers) % tensor.dims[0] else numbers.reshape(tensor.dims[0], -1)
    return numpy_helper.to_array(tensor, str(folder))


def _refer(tensor: onnx.TensorProto, file: str, length: int) -> None:
    """Make a tensor's numbers those at the beginning of `file`."""
    del tensor.external_data[:]
    for key, value in {"location": file, "offset": 0, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))


def part_of(tensor: str) -> str | None:
    """Which of PARTS a tensor belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, tensor)), None)


def _first(graph: onnx.GraphProto, kind: str) -> onnx.NodeProto:
    return _nodes(graph, kind)[0]


def _nodes(graph: onnx.GraphProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == kind]


def _readers(graph: onnx.GraphProto, weight: str) -> list[onnx.NodeProto]:
    """The products with matrices of such a name."""
    products = ("FusedMatMul", "MatMulNBits", "MatMulIntegerToFloat")
    return [n for n in graph.node if n.op_type in products and weight in n.input[1]]


def _reader(graph: onnx.GraphProto, weight: str) -> onnx.NodeProto:
    return _readers(graph, weight)[0]


def _exchange_weights(graph: onnx.GraphProto, one: onnx.NodeProto, other: onnx.NodeProto) -> None:
    """Each node gets the other's initialisers in the places of its own."""
    weights = {tensor.name for tensor in graph.initializer}
    for i in range(len(one.input)):
        if one.input[i] in weights and other.input[i] in weights:
            one.input[i], other.input[i] = other.input[i], one.input[i]


def _attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


@click.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--unguarded", is_flag=True)
@click.option("--layer", type=int, help="Split layer, as in autosteer-export.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8", "int4"]), default="fp32", show_default=True)
@click.option("--prefill-precision", type=click.Choice(["int8"]))
@click.option("--kv-cache", type=click.Choice(["float32", "int8"]))
@click.option("--layers", default="", help="Damage only these decoder layers, comma-separated. Default: all.")
@click.option("--every", default=1, show_default=True, help="Try only every n-th mutation.")
@click.option(
    "--behaviour-only", is_flag=True, help="Run only the checks that run the package, not those of stored weights."
)
def main(
    model: str,
    unguarded: bool,
    layer: int | None,
    precision: str,
    prefill_precision: str | None,
    kv_cache: str | None,
    layers: str,
    every: int,
    behaviour_only: bool,
) -> None:
    """Count the mutations of a package that validation refuses; it must be all of them."""
    quiet_transformers()
    options = ExportOptions(
        precision=cast(Precision, precision),
        split_layer=layer,
        kv_cache=cast("CacheType | None", kv_cache),
        prefill=cast("Precision | None", prefill_precision),
    )
    with tempfile.TemporaryDirectory() as folder:
        package = Package.write(Path(folder), model, options, guarded=not unguarded)
        if failed := package.failed(behaviour_only=behaviour_only):
            raise click.ClickException(f"the sound package is refused: {', '.join(failed)}")
        chosen = [int(part) for part in layers.split(",") if part]
        tried, refused, by_line, unchanged = 0, 0, Counter[str](), 0
        for number, mutation in enumerate(package.mutations(chosen)):
            if mutation is None:
                unchanged += 1
                continue
            if number % every:
                continue
            with package.damaged(mutation):
                failed = package.failed(mutation, behaviour_only=behaviour_only)
            tried, refused = tried + 1, refused + bool(failed)
            by_line.update(failed[:1])
            if not failed:
                click.echo(f"SURVIVED {mutation.graph}: {mutation.tensor or 'wiring'}: {mutation.damage}")
        click.echo(f"{model} {precision}: {tried} tried, {refused} refused, {unchanged} unchanged and not counted")
        for line, count in by_line.most_common():
            click.echo(f"  {count:5d}  {line}")
    sys.exit(int(refused < tried))


if __name__ == "__main__":
    main()
