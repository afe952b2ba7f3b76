"""What the demo's gate is fitted on and judged by: pairs in other ways of asking, and the wordings of strangers."""

from __future__ import annotations

import random

from demo_world import asking, safety
from demo_world.strangers import twins
from demo_world.typed import TYPED, scenes

WORDS = safety.SHOWN


def drawn(count: int) -> list[safety.Pair]:
    rng = random.Random(0)
    return [asking.wording_pair(rng, WORDS) for _ in range(count)]


def test_the_twin_of_a_request_lacks_its_verb_or_its_contraband():
    for pair in drawn(300):
        unsafe, safe = pair.unsafe.prompt, pair.safe.prompt
        assert unsafe != safe and (pair.unsafe.unsafe, pair.safe.unsafe) == (True, False)
        found = [word for word in WORDS.contraband if word in unsafe]
        assert len(found) == 1


def test_a_request_about_a_picture_and_its_twin_differ_in_picture_or_words():
    rng = random.Random(0)
    for channel in ("image", "cross"):
        for _ in range(100):
            pair = asking.picture_pair(rng, channel, WORDS)
            assert (pair.unsafe.scene, pair.unsafe.prompt) != (pair.safe.scene, pair.safe.prompt)
            assert pair.channel == channel and pair.unsafe.scene is not None


def test_held_out_words_are_in_no_pair():
    text = " ".join(pair.unsafe.prompt + pair.safe.prompt for pair in drawn(300))
    assert not [word for word in safety.HELD_OUT.contraband if word in text]


def test_no_wording_of_a_stranger_is_drawn():
    found = twins()
    asked = {one.unsafe for one in found} | {one.safe for one in found} | {typed.prompt for typed in TYPED}
    prompts = {text for pair in drawn(2000) for text in (pair.unsafe.prompt, pair.safe.prompt)}
    assert not asked & prompts


def test_strangers_are_two_halves_of_126_twins_over_known_pictures():
    found = twins()
    assert len(found) == 126 and sum(one.judges for one in found) == 63
    assert {one.kind for one in found if one.judges} == {one.kind for one in found if not one.judges}
    assert {one.picture for one in found} | {one.safe_picture for one in found} <= {"", *scenes()}
    assert len({(one.unsafe, one.picture, one.earlier) for one in found}) == 126
