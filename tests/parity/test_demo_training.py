"""A row that the demo model is trained on is what the Hugging Face processor makes of its dialogue."""

from __future__ import annotations

import random

import numpy as np
import pytest
from demo_world.corpus import ROWS, Row, make_row
from demo_world.packing import Packer, frames_of
from demo_world.scenes import render
from transformers import AutoProcessor

LAST_STAGE = 13000  # a step of it


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained("models/demo")


def one_turn_rows(kind: str, count: int) -> list[Row]:
    """Rows with their first dialogue of one turn."""
    rng, found = random.Random(kind), []
    while len(found) < count:
        row = make_row(rng, kind, LAST_STAGE)
        branches = [branch for branch in row.branches if len(branch.turns) == 1]
        found += [Row(row.scenes, tuple(branches[:1]), row.system, row.before, row.video)] if branches else []
    return found


@pytest.mark.parametrize("kind", ROWS)
def test_tokens_and_pixels_of_a_row_are_those_of_the_processor(processor, kind):
    packer = Packer(processor.tokenizer)
    for row in one_turn_rows(kind, 8):
        system = [("system", 0, row.system)] if row.system else []
        before = [
            said
            for shown in row.before
            for said in (("user", len(shown.scenes), shown.turn.question), ("assistant", 0, shown.turn.answer))
        ]
        asked = row.branches[0].turns[0].question
        turns = [*system, *before, ("user", 0 if row.video else len(row.scenes), asked)]
        messages = [
            {"role": role, "content": [*[{"type": "image"}] * shown, {"type": "text", "text": text}]}
            for role, shown, text in turns
        ]
        if row.video:
            messages[-1]["content"].insert(0, {"type": "video"})
        frames = [np.stack([np.asarray(render(scene)) for scene in frames_of(row.scenes[:1])])] if row.video else None
        wanted = processor(
            text=processor.apply_chat_template(messages, add_generation_prompt=True),
            images=[[render(scene) for scene in row.pictures]] if row.pictures else None,
            videos=frames,
            return_tensors="np",
        )
        ids = wanted["input_ids"][0].tolist()
        packed, batch = packer.row(row).ids, packer.batch([row])
        assert packed[: len(ids)] == ids
        for name in ("pixel_values", "image_sizes"):
            got = getattr(batch, name)
            assert (got is None) == (name not in wanted)
            if got is not None:
                assert np.abs(got.numpy() - wanted[name]).mean() < 0.02  # resized by torch, here by PIL
        if row.video:
            first = batch.pixel_values_videos.numpy()[0, 0]
            assert np.abs(first - wanted["pixel_values_videos"][0, 0]).mean() < 0.02
