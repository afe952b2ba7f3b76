"""Checkpoints in 4 and 8 bits, packed by the programs that make such files (tools/packed_fixtures.py).

tests/data/packed has one decoder layer of each, without the tables of the vocabulary; here it becomes layer 0 of a
checkpoint whose other tensors are not packed.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_weights import TEMPLATE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autosteer.export.checkpoint.hf_model import load_hf_model
from autosteer.export.checkpoint.open import DEMO, Checkpoint, open_checkpoint
from autosteer.export.checkpoint.packed import AWQ_ORDER, Reader, packed_matrices
from autosteer.export.cli import export
from autosteer.export.graphs.quantize import BLOCKS, Blocks, dequantise
from autosteer.export.package import ExportOptions, write_package
from autosteer.export.validation.dequantize import PackedWeights
from autosteer.runtime.errors import AutoSteerError, PackageError, UnsupportedModelError
from autosteer.runtime.manifest import Manifest

DATA = Path(__file__).parents[1] / "data" / "packed"
KINDS = sorted(file.stem for file in DATA.glob("*.safetensors"))
FOUR_BITS = ["awq", "ct-int4", "ct-int4-zero-points", "gptq", "gptq-v2"]  # in groups of 32 columns, in order
QUERY = "model.layers.0.self_attn.q_proj"


def config_of(kind: str) -> dict[str, Any]:
    with safe_open(DATA / f"{kind}.safetensors", "pt") as file:
        return dict(json.loads(file.metadata()["quantization_config"]))


def checkpoint_folder(
    folder: Path,
    kind: str,
    edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], None] = lambda tensors, config: None,
) -> Path:
    """A checkpoint whose first layer is the packed one; `edit` changes its tensors and its quantization_config."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors, quantization = load_file(folder / "model.safetensors"), config_of(kind)
    tensors = {name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}
    tensors |= load_file(DATA / f"{kind}.safetensors")
    edit(tensors, quantization)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stated |= {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    return folder


def opened(folder: Path, kind: str, **options: Any) -> Checkpoint:
    return open_checkpoint(str(checkpoint_folder(folder, kind, **options)))


def run(folder: Path, *options: str) -> Path:
    """A validated package of the checkpoint in `folder`."""
    package = folder.parent / "-".join(["package", *(option.strip("-") for option in options)])
    arguments = ["--model", str(folder), "--output", str(package), "--unguarded", "--layer", "1", *options]
    export.main(arguments, standalone_mode=False)
    return package


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_is_what_its_own_program_unpacks_it_to(kind: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, kind)
    with safe_open(DATA / f"{kind}.safetensors", "pt") as file:
        digests = json.loads(file.metadata()["unpacked"])
    assert digests.keys() == checkpoint.packed.keys() and len(digests) == 7
    for name, (dtype, digest) in digests.items():
        ours = checkpoint.tensor(name).to(getattr(torch, dtype.removeprefix("torch.")))
        assert hashlib.sha256(ours.contiguous().numpy().tobytes()).hexdigest() == digest, name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_in_blocks_and_one_by_one_as_they_stand_in_the_whole(kind: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, kind)
    name = "model.layers.0.mlp.down_proj.weight"
    whole = checkpoint.tensor(name)
    assert checkpoint.shape(name) == whole.shape == (64, 128)
    blocks = list(checkpoint.rows(name, 4 * 128 * 24))
    assert len(blocks) == 3 and torch.equal(torch.cat(blocks), whole)
    assert torch.equal(checkpoint.gather(name, [63, 9, 0, 9]), whole[[63, 9, 0, 9]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_says_the_tokens_of_a_model_with_the_unpacked_weights(kind: str, tmp_path: Path) -> None:
    """The table compares with PyTorch on weights that are unpacked by us; what they must be is the test above."""
    package = run(checkpoint_folder(tmp_path / "checkpoint", kind))
    checks = {check.name: check for check in Manifest.load(package).validation["CPUExecutionProvider"]}
    assert checks["greedy tokens that differ"].value == 0 and checks["logits"].value < 1e-4
    model, _ = load_hf_model(open_checkpoint(str(tmp_path / "checkpoint")))
    packed = model.get_submodule(QUERY).weight
    assert torch.equal(packed, open_checkpoint(str(tmp_path / "checkpoint")).tensor(f"{QUERY}.weight"))


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gptq-act-order", "ct-fp8"])
def test_every_precision_passes_its_table(kind: str, precision: str, tmp_path: Path) -> None:
    package = run(checkpoint_folder(tmp_path / "checkpoint", kind), "--precision", precision)
    checks = Manifest.load(package).validation["CPUExecutionProvider"]
    assert "logits" in {check.name for check in checks}
    assert [check.name for check in checks if not check.passed] == []


@pytest.mark.parametrize(("blocks", "said"), [("32", "gptq: copied unchanged"), ("64", "--block-size 32 keeps them")])
def test_the_export_says_whether_the_checkpoints_codes_were_kept(blocks: str, said: str, tmp_path, capsys) -> None:
    run(checkpoint_folder(tmp_path / "checkpoint", "gptq"), "--precision", "int4", "--block-size", blocks)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_int4_in_the_checkpoints_own_blocks_keeps_its_codes_scales_and_zero_points(kind: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "checkpoint", kind)
    (tmp_path / "package").mkdir()
    options = ExportOptions(precision="int4", block_size=32, split_layer=1)
    manifest = write_package(tmp_path / "package", checkpoint, None, options, lambda _: None)
    packed = PackedWeights(tmp_path / "package", manifest, checkpoint)
    for name in checkpoint.packed:
        assert torch.equal(packed.tensor(name), checkpoint.tensor(name)), name
    other = "model.layers.1.self_attn.q_proj.weight"
    rounded, original = packed.tensor(other), checkpoint.tensor(other)
    assert (rounded - original).norm() > 0.01 * original.norm()  # which is rounded as ever


def test_what_is_kept_is_the_grid_and_not_weights_that_happen_to_round_well(tmp_path: Path) -> None:
    matrix = opened(tmp_path, "gptq").packed[f"{QUERY}.weight"]
    stored = load_file(DATA / "gptq.safetensors")
    kept = matrix.packed(0, 64)
    assert torch.equal(kept.scales, stored[f"{QUERY}.scales"].T.float())
    assert set(kept.zero_points.flatten().tolist()) == {0x88}  # stored as 7s
    assert torch.equal(dequantise(kept, Blocks(4, 32, symmetric=False), 64), matrix.floats(0, 64))


def test_columns_in_an_order_of_their_own_are_unpacked_and_not_kept(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "gptq-act-order")
    assert any(not checkpoint.keeps(name, Blocks(4, 32, symmetric=False)) for name in checkpoint.packed)
    assert all(matrix.bits == 4 for matrix in checkpoint.packed.values())


def test_other_blocks_and_other_precisions_round_the_unpacked_weights(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "gptq")
    assert not checkpoint.keeps(f"{QUERY}.weight", Blocks(4, 64, symmetric=False))
    assert not checkpoint.keeps(f"{QUERY}.weight", Blocks(4, 32, symmetric=True))
    assert not checkpoint.keeps("model.layers.1.self_attn.q_proj.weight", Blocks(4, 32, symmetric=False))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_int4_as_it_is_keeps_groups_of_128(method: str, tmp_path: Path) -> None:
    """The hub's usual files, laid out here as the fixtures are; that those are read right, the first test shows."""
    generator = torch.Generator().manual_seed(2)
    n, k, group = 64, 256, 128
    codes = torch.randint(0, 16, (n, k), generator=generator)
    zeros = torch.randint(1, 16, (n, k // group), generator=generator)
    scales = (torch.rand(n, k // group, generator=generator) / 100 + 0.001).half()
    order = AWQ_ORDER if method == "awq" else tuple(range(8))

    def words(numbers: torch.Tensor, dim: int) -> torch.Tensor:
        eights = numbers.movedim(dim, -1).unflatten(-1, (-1, 8)).to(torch.int64)
        packed = sum(eights[..., i] << (4 * place) for i, place in enumerate(order))
        return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32).movedim(-1, dim).contiguous()

    stored = {
        "m.qweight": words(codes.T, 0 if method == "gptq" else 1),
        "m.qzeros": words(zeros.T - int(method == "gptq"), 1),
        "m.scales": scales.T.contiguous(),
    }
    save_file(stored, tmp_path / "x.safetensors")
    reader = Reader({name: (tmp_path / "x.safetensors", name) for name in stored}, lambda p: safe_open(p, "pt"))
    config = {"quant_method": method, "bits": 4, "group_size": group}
    matrices, parts = packed_matrices(config, reader, tmp_path / "config.json")
    assert parts == stored.keys()
    matrix, wanted = matrices["m.weight"], (codes - zeros.repeat_interleave(group, 1)).float()
    assert torch.equal(matrix.floats(0, n), wanted * scales.float().repeat_interleave(group, 1))
    assert matrix.blocks() == BLOCKS["int4"]
    assert torch.equal(dequantise(matrix.packed(0, n), BLOCKS["int4"], k), matrix.floats(0, n))


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "quanto", "mxfp4", "torchao", ""])
def test_a_method_that_is_not_read_is_refused_before_anything_is_read(method: str, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["quant_method"] = method

    with pytest.raises(UnsupportedModelError, match=rf"'{method or 'unnamed'}', which is not read .*give --model"):
        opened(tmp_path, "gptq", edit=edit)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "gptq with checkpoint_format 'marlin' is not read"),
        ("gptq", {"bits": 3}, "gptq with 3 bits is not read"),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "bits that differ by module"),
        ("gptq", {"group_size": 64}, "has 4 groups of 128 columns, config.json says groups of 64"),
        ("gptq", {"bits": 8}, "the packed numbers beside it want"),
        ("awq", {"version": "gemv"}, "awq with version 'gemv' is not read"),
        ("awq", {"zero_point": False}, "awq with no zero points is not read"),
        ("ct-int4", {"format": "marlin-24"}, "compressed-tensors with format 'marlin-24' is not read"),
        ("ct-int4", {"quantization_status": "frozen"}, "status 'frozen'"),
        ("ct-int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ("ct-fp8", {"transform_config": {"config_groups": {"u": {}}}}, "rotated weights"),
        ("fp8", {"weight_block_size": [32, 16]}, "which does not fit"),
        ("fp8", {"expert_dtype": "fp4"}, "weights of type fp4"),
    ],
)
def test_a_layout_that_is_not_read_is_refused(kind: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AutoSteerError, match=message):
        _ = opened(tmp_path, kind, edit=lambda tensors, config: config.update(change)).tensor_files


@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8", "ct-int4", "ct-int8"])
def test_packed_tensors_that_no_config_explains_are_refused(kind: str, tmp_path: Path) -> None:
    """They were read as weights, or passed over: a perfect table, and wrong tokens."""
    folder = checkpoint_folder(tmp_path / "checkpoint", kind, lambda tensors, config: config.clear())
    with pytest.raises(PackageError, match=r"is stored as (I32|I8|F8_E4M3|I64), which it has no quantization_config"):
        run(folder)
    assert not list(tmp_path.glob("package*"))


@pytest.mark.parametrize(("kind", "part"), [("gptq", "scales"), ("awq", "qzeros"), ("ct-int4", "weight_scale")])
def test_a_part_that_is_missing_is_named(kind: str, part: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, kind, edit=lambda tensors, config: tensors.pop(f"{QUERY}.{part}"))
    with pytest.raises(PackageError, match=rf"q_proj\.{part}: missing"):
        _ = checkpoint.tensor_files


def test_a_float8_weight_without_its_scale_is_refused(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "fp8", edit=lambda tensors, config: tensors.pop(f"{QUERY}.weight_scale_inv"))
    with pytest.raises(PackageError, match=r"q_proj.weight is stored as F8_E4M3, which its quant"):
        _ = checkpoint.tensor_files


def test_zero_points_that_autogptq_wrote_over_each_other_are_refused(tmp_path: Path) -> None:
    """Less 1, a zero point of 0 was -1, and its ones went into all numbers above it in the word."""

    def edit(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[f"{QUERY}.qzeros"][0, 0] = -1

    with pytest.raises(PackageError, match=r"q_proj.qzeros: a zero point of 0"):
        opened(tmp_path, "gptq", edit=edit).tensor(f"{QUERY}.weight")
