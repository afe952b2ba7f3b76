"""--calibrate. What a matrix computes changes least, on rows that the decoder really sees."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from exported import demo_checkpoint, demo_package
from torch import nn

from autosteer.export.checkpoint.decoder_config import decoder_config
from autosteer.export.checkpoint.hf_model import load_hf_model
from autosteer.export.cli import export
from autosteer.export.graphs import gptq as module
from autosteer.export.graphs.gptq import CHARACTERS, LENGTH, SEQUENCES, gptq, read_text, round_decoder, text_rows
from autosteer.export.graphs.quantize import Blocks, Packed, dequantise, quantise
from autosteer.runtime.errors import InputError
from autosteer.runtime.manifest import Manifest

DECODER = "model.language_model"


def correlated(k: int, rows: int = 600) -> torch.Tensor:
    """Rows (rows, K) most of which lies in a third of the directions, as hidden states do."""
    generator = torch.Generator().manual_seed(k)
    few = torch.randn(rows, k // 3, generator=generator) @ torch.randn(k // 3, k, generator=generator)
    return few + 0.3 * torch.randn(rows, k, generator=generator)


def cost(weights: torch.Tensor, packed: Packed, blocks: Blocks, x: torch.Tensor) -> float:
    """How far the products are from those of the original."""
    return float(((dequantise(packed, blocks, weights.shape[1]) - weights) @ x.T).square().mean())


@pytest.mark.parametrize(("k", "size"), [(256, 128), (200, 128), (96, 32), (70, 64), (30, 32)])
def test_products_change_less_than_after_rounding_each_weight_by_itself(k: int, size: int) -> None:
    blocks, x = Blocks(4, size, symmetric=False), correlated(k)
    weights = torch.randn(40, k, generator=torch.Generator().manual_seed(1))
    second = x.T @ x / len(x)
    alone = quantise(weights, blocks, second.diagonal())
    together = gptq(weights, blocks, second)
    assert [t.shape for t in vars(together).values()] == [t.shape for t in vars(alone).values()]
    assert cost(weights, together, blocks, x) < 0.5 * cost(weights, alone, blocks, x)


def test_columns_that_nothing_reads_and_weights_of_zero_are_no_matter() -> None:
    blocks, x = Blocks(4, 32, symmetric=False), correlated(64)
    x[:, 10:20] = 0
    weights = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    weights[3], weights[:, 32:] = 0, 0
    packed = gptq(weights, blocks, x.T @ x / len(x))
    found = dequantise(packed, blocks, 64)
    assert torch.equal(found[3], weights[3]) and torch.equal(found[:, 32:], weights[:, 32:])
    assert torch.isfinite(dequantise(gptq(weights, blocks, torch.zeros(64, 64)), blocks, 64)).all()


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        gptq(torch.ones(4, 32), Blocks(4, 32, symmetric=False), torch.full((32, 32), torch.nan))


def test_every_matrix_is_rounded_for_what_it_reads_in_the_whole_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint = demo_checkpoint()
    model, _ = load_hf_model(checkpoint)
    decoder = model.get_submodule(DECODER)
    ids = torch.randint(10, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    for name, part in decoder.named_modules():
        if isinstance(part, nn.Linear):

            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                x = args[0].flatten(0, 1)
                seen[f"{DECODER}.{name}.weight"] = x.T @ x / len(x)

            part.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=ids)
    asked = []
    monkeypatch.setattr(
        module, "gptq", lambda rows, blocks, second: asked.append((rows, second)) or Packed(*[rows] * 3)
    )
    rows = model.get_input_embeddings()(ids).detach()
    blocks = Blocks(4, 32, symmetric=False)
    files = round_decoder(checkpoint, decoder_config(checkpoint), rows, blocks, tmp_path)
    assert files.keys() == seen.keys() and len(files) == 7 * 8
    for (name, second), (weights, found) in zip(((name, seen[name]) for name in files), asked, strict=True):
        assert torch.equal(weights, checkpoint.tensor(name))
        torch.testing.assert_close(found, second, rtol=1e-4, atol=1e-4)


def test_the_command_writes_a_valid_package_of_the_same_size(tmp_path: Path) -> None:
    plain, output = demo_package("int4"), tmp_path / "package"
    arguments = ["--model", "demo", "--precision", "int4", "--calibrate", "builtin", "--output", str(output)]
    export.main(arguments, standalone_mode=False)
    ours, theirs = ((folder / "weights.bin").read_bytes() for folder in (output, plain))
    assert len(ours) == len(theirs) and ours != theirs
    assert not (output / "rounded").exists()
    checks = [
        {c.name: c for c in Manifest.load(folder).validation["CPUExecutionProvider"]} for folder in (output, plain)
    ]
    assert checks[0].keys() == checks[1].keys() and all(c.passed for c in checks[0].values())


def test_of_a_long_text_only_the_beginning_is_read(tmp_path: Path) -> None:
    """A book was tokenised as a whole."""
    (tmp_path / "book").write_text("a lamp, " * CHARACTERS)
    text = read_text(str(tmp_path / "book"))
    assert text == ("a lamp, " * CHARACTERS)[:CHARACTERS]
    asked: list[str] = []
    checkpoint = demo_checkpoint()

    def tokenizer(text: str, **options: bool) -> SimpleNamespace:
        asked.append(text)
        return SimpleNamespace(input_ids=[1] * len(text))

    assert text_rows(text * 2, checkpoint, tokenizer, None).shape[:2] == (SEQUENCES, LENGTH)
    assert asked == [text]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("too short", ("--precision", "int4"), "the text has .* tokens; give at least 512"),
        ("x", ("--precision", "int8"), "--calibrate goes with --precision int4"),
        (None, ("--precision", "int4"), "--calibrate .*No such file"),
        ("\udcff", ("--precision", "int4"), "--calibrate .*utf-8"),
    ],
)
def test_a_text_that_is_no_use_is_refused(
    text: str | None, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "text"
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    command = ["--model", "demo", *arguments, "--calibrate", str(file), "--output", str(tmp_path / "x")]
    result = CliRunner().invoke(export, command)
    assert result.exit_code != 0 and not (tmp_path / "x").exists()
    assert re.search(message, f"{result.output}{result.exception}")
