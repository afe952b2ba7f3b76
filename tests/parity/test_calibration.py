"""Which columns matter, against Hugging Face's whole model; and what a package holds of each matrix."""

from typing import Any

import numpy as np
import torch
from exported import demo_checkpoint, demo_package
from PIL import Image
from torch import nn

from autosteer.export.checkpoint.decoder_config import decoder_config
from autosteer.export.checkpoint.hf_model import load_hf_model
from autosteer.export.checkpoint.open import DEMO
from autosteer.export.graphs.calibration import (
    FLOOR,
    RANDOM_TOKENS,
    calibrate_decoder,
    calibration_rows,
    energy,
    image_rows,
    rows_for_scales,
)
from autosteer.export.graphs.kv_scales import RoundedCaches
from autosteer.export.package import image_spec
from autosteer.export.validation.dequantize import PackedWeights
from autosteer.runtime.manifest import Manifest

DECODER = "model.language_model"


def test_channel_energy_is_the_mean_square_of_what_each_matrix_of_the_whole_model_sees() -> None:
    checkpoint = demo_checkpoint()
    model, _ = load_hf_model(checkpoint)
    decoder = model.get_submodule(DECODER)
    rows = checkpoint.gather(f"{DECODER}.embed_tokens.weight", [5, 9, 200, 41, 7])[None]
    torch.testing.assert_close(rows, model.get_input_embeddings()(torch.tensor([[5, 9, 200, 41, 7]])))
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = args[0][0].square().mean(0)

        return hook

    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(f"{DECODER}.{name}.weight"))
    model.get_output_embeddings().register_forward_pre_hook(watch(f"{DECODER}.embed_tokens.weight"))
    with torch.no_grad():
        model(inputs_embeds=rows)
    found = calibrate_decoder(checkpoint, decoder_config(checkpoint), rows).channel_energy
    assert found.keys() == seen.keys() and len(found) == 7 * 8 + 1
    for name, squares in seen.items():
        torch.testing.assert_close(found[name], squares / squares.mean() + FLOOR, rtol=1e-4, atol=1e-4)


def test_a_matrix_that_sees_only_zeros_weighs_its_columns_alike() -> None:
    """0 / 0 made NaN of its weights at int8."""
    torch.testing.assert_close(energy(torch.zeros(1, 3, 4)), torch.full((4,), FLOOR))


def test_the_sample_holds_the_text_and_the_rows_of_a_picture() -> None:
    checkpoint = demo_checkpoint()
    _, processor = load_hf_model(checkpoint)
    text = calibration_rows(checkpoint, processor.tokenizer, None, None)
    tower, spec = demo_package("fp32") / "vision_encoder.onnx", image_spec(checkpoint, processor)
    both = calibration_rows(checkpoint, processor.tokenizer, tower, spec)
    assert both.shape[1] == text.shape[1] + 16
    torch.testing.assert_close(both[:, 17:], text[:, 1:])


def test_a_package_holds_every_quantised_matrix_of_the_checkpoint() -> None:
    """Stacked projections are taken apart, tied and transposed matrices found; each within a few per cent."""
    checkpoint, folder = demo_checkpoint(), demo_package("int8")
    packed = PackedWeights(folder, Manifest.load(folder), checkpoint)
    decoder = {n for n in checkpoint.tensor_files if n.startswith(f"{DECODER}.layers") and n.endswith("proj.weight")}
    tower = {n for n in checkpoint.tensor_files if "vision_tower.encoder" in n and len(checkpoint.shape(n)) == 2}
    assert decoder and tower and decoder | tower | {f"{DECODER}.embed_tokens.weight"} <= set(packed.names)
    for name in packed.names:
        weight = checkpoint.tensor(name)
        assert (packed.tensor(name) - weight).norm() < 0.02 * weight.norm(), name


def test_random_tokens_reach_further_and_do_not_change_what_matters() -> None:
    checkpoint = demo_checkpoint()
    config = decoder_config(checkpoint)
    _, processor = load_hf_model(checkpoint)
    text = calibration_rows(checkpoint, processor.tokenizer, None, None)
    more = rows_for_scales(text, checkpoint, config.vocab_size, None, None)
    assert len(more) == 1 + -(-RANDOM_TOKENS // text.shape[1]) and more[1:].flatten(0, 1).unique(dim=0).shape[0] > 200
    torch.testing.assert_close(more[:1], text)
    without, with_them = (calibrate_decoder(checkpoint, config, rows) for rows in (text, more))
    for name, channel_energy in without.channel_energy.items():
        torch.testing.assert_close(with_them.channel_energy[name], channel_energy, rtol=1e-3, atol=1e-3)
    for near, far in zip(without.kv_scales, with_them.kv_scales, strict=True):
        assert (far.values >= 0.999 * near.values).all() and far.values.sum() > near.values.sum()
        assert (far.keys >= 0.999 * near.keys).all() and far.keys.sum() > near.keys.sum()


def test_a_thing_on_plain_ground_fits_int8_caches() -> None:
    """Scales of one picture of gradients clipped such keys (of an earlier demo by 0.09), and whether the demo could be
    exported with int8 caches depended on the pictures in its proof.
    """
    checkpoint, package = demo_checkpoint(), demo_package("fp32")
    config, processor = decoder_config(checkpoint), load_hf_model(checkpoint)[1]
    graph, spec = package / "vision_encoder.onnx", Manifest.load(package).image
    assert spec is not None
    rows = calibration_rows(checkpoint, processor.tokenizer, graph, spec)
    decoder = load_hf_model(checkpoint)[0].get_submodule(DECODER)
    picture = image_rows(checkpoint, graph, spec, _shapes)

    def error(calibrated_on: torch.Tensor) -> float:
        caches = RoundedCaches(calibrate_decoder(checkpoint, config, calibrated_on).kv_scales)
        with torch.inference_mode():
            decoder(inputs_embeds=torch.cat([rows[:, :1], picture[None]], 1), **caches(decoder))
        return max(caches.errors)

    texts = rows_for_scales(rows, checkpoint, config.vocab_size, None, None)
    mixed = error(rows_for_scales(rows, checkpoint, config.vocab_size, graph, spec))
    assert error(texts) > 2 * mixed and mixed < 0.02  # an export allows 0.1


def _shapes(size: int) -> np.ndarray:
    with Image.open(DEMO / "examples" / "benign.png") as picture:
        small = np.asarray(picture.convert("RGB").resize((size, size)), np.float32)
    return (small / 127.5 - 1).transpose(2, 0, 1)[None]
