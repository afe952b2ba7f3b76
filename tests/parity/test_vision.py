"""Our numpy pixels and packing are Hugging Face's, for pictures of awkward sizes.

A tiny random model with the real grid: 384-pixel tiles, 36 pinpoints, anyres_max_9; shrinking and unpadding happen.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from autosteer.models.llava_onevision import image_spec
from autosteer.runtime.image import pack, prepare
from autosteer.runtime.picture_file import open_image

PINPOINTS = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]
SIZES = [
    *[(384, 384), (640, 480), (481, 1023), (1600, 200), (37, 911), (1333, 777), (100, 100), (1, 1), (3, 500)],
    *[(2305, 2304), (3000, 500), (1201, 1999), (1537, 1400), (383, 385), (2500, 1600)],
]


@pytest.fixture(scope="module")
def model() -> Any:
    """Random weights, real geometry."""
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=32,
    )
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_id=31,
        video_token_id=30,
    )
    return LlavaOnevisionForConditionalGeneration(config).eval()


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10007 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_and_packed_features_equal_hugging_faces(model: Any, width: int, height: int) -> None:
    processor = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=PINPOINTS)
    image = picture(width, height)
    theirs = processor(images=image, return_tensors="pt")
    spec = image_spec(model.config, processor)
    ours = prepare(open_image(image), spec, alone=True)
    np.testing.assert_array_equal(ours, theirs["pixel_values"][0].numpy())

    with torch.no_grad():
        packed = model.model.get_image_features(theirs["pixel_values"], theirs["image_sizes"]).pooler_output[0].numpy()
        hidden = model.model.vision_tower(theirs["pixel_values"][0], output_hidden_states=True).hidden_states[-1]
        features = model.model.multi_modal_projector(hidden).numpy()
    rows = pack(features, model.model.image_newline.detach().numpy(), (height, width), spec)
    assert rows.shape == packed.shape
    np.testing.assert_allclose(rows, packed, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(384, 384), (640, 480), (100, 700)])
def test_each_of_several_images_is_padded_to_one_square_tile(model: Any, width: int, height: int) -> None:
    processor = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=PINPOINTS)
    image = picture(width, height)
    theirs = processor(images=[[image, image]], return_tensors="pt")["pixel_values"][0].numpy()
    spec = image_spec(model.config, processor)
    np.testing.assert_array_equal(prepare(open_image(image), spec, alone=False), theirs)


def test_a_checkpoint_trained_for_fewer_tiles_shrinks_sooner(model: Any) -> None:
    processor = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=PINPOINTS)
    spec = image_spec(model.config, processor)
    features = np.zeros((37, 27 * 27, 4), np.float32)
    rows = []
    for side in (36, 9):
        capped = replace(spec, anyres=replace(spec.anyres, max_tiles_side=side))
        rows.append(len(pack(features, np.zeros(4, np.float32), (2304, 2304), capped)))
    assert rows == [729 + 162 * 163, 729 + 81 * 82]
