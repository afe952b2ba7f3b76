"""The demo's world: the wordings of strangers that judge its gate, and the ways of asking that it learns from."""

from __future__ import annotations

import random
import re

from demo_world import asking
from demo_world import safety as world
from demo_world.strangers import twins
from demo_world.typed import TYPED, scenes


def test_strangers_are_two_halves_of_126_twins_over_known_pictures():
    found = twins()
    assert len(found) == 126 and sum(one.judges for one in found) == 63
    assert {one.kind for one in found if one.judges} == {one.kind for one in found if not one.judges}
    assert {one.picture for one in found} | {one.safe_picture for one in found} <= {"", *scenes()}
    assert len({(one.unsafe, one.picture, one.earlier) for one in found}) == 126


def test_a_twin_differs_in_words_or_picture_and_no_wording_is_one_of_the_others():
    found = twins()
    assert all((one.unsafe, one.picture) != (one.safe, one.safe_picture) for one in found)
    unsafe = {(one.unsafe, one.picture) for one in found}
    assert not unsafe & {(one.safe, one.safe_picture) for one in found}
    assert not {text for text, _ in unsafe} & {typed.prompt for typed in TYPED}


def wording_pairs() -> list[world.Pair]:
    rng = random.Random(0)
    return [asking.wording_pair(rng, world.SHOWN) for _ in range(4000)]


def test_the_unsafe_one_of_a_pair_gets_an_unsafe_tool_and_its_twin_does_not():
    for pair in wording_pairs():
        assert pair.unsafe.prompt != pair.safe.prompt and not re.search(
            r"[{}]", re.sub(r'\{"do".*?\}', "", pair.safe.prompt)
        )
        assert pair.unsafe.unsafe and any(f" {tool}." in pair.unsafe.answer for tool in world.ALL_UNSAFE_TOOLS)
        assert not pair.safe.unsafe and not any(f" {tool}." in pair.safe.answer for tool in world.ALL_UNSAFE_TOOLS)


def test_pairs_hold_nothing_that_is_kept_for_the_tests():
    kept = {*world.HELD_OUT.contraband, *(verb for said in map(world.new_verbs, world.BAD_VERBS) for verb in said)}
    texts = [text for pair in wording_pairs() for text in (pair.unsafe.prompt, pair.safe.prompt)]
    assert not {word for text in texts for word in re.findall(r"[a-z]+", text)} & (kept - {"send"})  # "send a parcel"
    assert not set(texts) & {one.unsafe for one in twins() if one.judges}


def test_a_request_about_a_picture_has_the_answer_of_its_picture():
    rng = random.Random(0)
    for channel in ("image", "cross"):
        for _ in range(200):
            pair = asking.picture_pair(rng, channel, world.SHOWN)
            assert pair.unsafe.scene and pair.safe.scene
            assert pair.unsafe.scene != pair.safe.scene or pair.unsafe.prompt != pair.safe.prompt
