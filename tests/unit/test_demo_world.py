"""The wordings of strangers that judge the demo's gate (tools/demo_world/strangers.jsonl)."""

from __future__ import annotations

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
