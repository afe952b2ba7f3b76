"""The demo's world: the wordings of strangers that judge its gate, and the ways of asking that it learns from."""

from __future__ import annotations

import random
import re

import demo_tables
import make_demo_data
import pytest
from demo_world import asking, dialogues, everyday, fit_pairs, hostile, looking, picture_phrasings, together, wishes
from demo_world import safety as world
from demo_world.scenes import sample_scene, sample_shapes
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


def wish_pairs() -> list[world.Pair]:
    rng = random.Random(0)
    return [fit_pairs.wish_pair(rng, world.SHOWN) for _ in range(3000)] + [
        fit_pairs.picture_wish_pair(rng, channel, world.SHOWN) for channel in ("image", "cross") for _ in range(200)
    ]


def test_wishes_differ_in_what_is_wished_or_in_the_picture_and_keep_the_words_of_the_tests():
    kept = {*world.HELD_OUT.contraband, *(verb for said in map(world.new_verbs, world.BAD_VERBS) for verb in said)}
    judging = {text for one in twins() if one.judges for text in (one.unsafe, one.safe)}
    for pair in wish_pairs():
        texts = pair.unsafe.prompt, pair.safe.prompt
        assert pair.unsafe.unsafe and not pair.safe.unsafe and "{" not in "".join(texts)
        assert (texts[0] != texts[1]) == (pair.channel == "text")
        assert pair.channel == "text" or pair.unsafe.scene != pair.safe.scene
        assert not {word for text in texts for word in re.findall(r"[a-z]+", text)} & (kept - {"send"})
        assert not set(texts) & judging


def test_an_unsafe_wish_among_others_is_the_one_that_is_answered():
    rng, unsafe = random.Random(0), 0
    for _ in range(500):
        words = wishes.Words.drawn(rng)
        turn = wishes.wishes(rng, words)
        bad = {tool for verb, tool in world.UNSAFE_TOOLS.items() if verb in words.bad}
        unsafe += any(tool in turn.answer for tool in bad)
    assert 200 < unsafe < 300


def test_the_hazard_among_several_pictures_is_the_one_that_is_made():
    rng, made = random.Random(0), set()
    for _ in range(300):
        scenes = together.several_scenes(rng, rng.choice((2, 3, 4)))
        kinds = {item.kind for scene in scenes for item in scene.items}
        answer = together.make_one(rng, scenes, "how do i make this?").answer
        assert (world.IMAGE_TOOL in answer) == bool(kinds & set(world.EVERYTHING.hazards))
        moved = together.move_one(scenes, "how do i sneak it past the guards?", sneaky=True)
        assert (moved is not None and world.CROSS_TOOL in moved.answer) == bool(kinds & set(world.EVERYTHING.forbidden))
        made |= kinds
    assert made >= {*world.EVERYTHING.hazards, *world.EVERYTHING.forbidden}


def test_a_request_about_several_pictures_has_a_twin():
    rng = random.Random(0)
    for channel in ("image", "cross") * 50:
        pair, scenes, twins_of = make_demo_data.several_pictures(rng, channel)
        assert 2 <= len(scenes) <= 4 and len(scenes) == len(twins_of)
        assert sum(one != other for one, other in zip(scenes, twins_of, strict=True)) in (0, 1)
        assert scenes != twins_of or pair.unsafe.prompt != pair.safe.prompt


def test_the_turns_before_a_pair_are_harmless_and_show_pictures_in_the_first_alone():
    rng = random.Random(0)
    for _ in range(100):
        before, pair = fit_pairs.dialogue_pair(rng, world.SHOWN)
        assert pair.unsafe.unsafe and pair.unsafe.prompt != pair.safe.prompt
        assert not any(shown.scenes for shown in before[1:])
        assert not any(tool in shown.turn.answer for shown in before for tool in world.ALL_UNSAFE_TOOLS)


def test_what_visitors_ask_is_harmless_but_for_an_unsafe_how_to():
    rng = random.Random(0)
    for _ in range(1000):
        for turn in (everyday.talk(rng), everyday.knowledge(rng), everyday.law(rng)):
            assert not turn.answer.rstrip(".").endswith(world.ALL_UNSAFE_TOOLS), turn
        turn = everyday.how_to(rng)
        unsafe = any(verb in turn.answer for verb in world.BAD_VERBS) and any(
            noun in turn.answer for noun in world.CONTRABAND
        )
        assert turn.answer.rstrip(".").endswith(tuple(world.UNSAFE_TOOLS.values())) is unsafe, turn
        assert "{" not in everyday.harmless(rng, world.SHOWN)


def test_a_pair_in_language_models_words_differs_in_its_verb_its_noun_its_picture_or_asks_how_to_handle_it():
    rng = random.Random(0)
    for channel in (*world.CHANNELS, *world.CHANNELS) * 50:
        pair = fit_pairs.phrased_pair(rng, channel, world.SHOWN)
        assert pair.unsafe.answer.rstrip(".").endswith(world.ALL_UNSAFE_TOOLS)
        assert not pair.safe.answer.rstrip(".").endswith(world.ALL_UNSAFE_TOOLS)
        assert "{" not in pair.unsafe.prompt + pair.safe.prompt
        assert (pair.unsafe.prompt, pair.unsafe.scene) != (pair.safe.prompt, pair.safe.scene)


def test_a_model_stays_with_its_answer_when_somebody_doubts_it():
    rng = random.Random(0)
    for _ in range(300):
        (scene,) = together.several_scenes(rng, 1)
        first, *doubts = picture_phrasings.again(rng, scene)
        assert doubts and all(turn.answer == first.answer and "{" not in turn.question for turn in doubts)


def test_harmless_requests_about_a_picture_name_no_unsafe_tool():
    rng = random.Random(0)
    scenes = [together.several_scenes(rng, 1)[0] for _ in range(300)]
    turns = [turn for scene in scenes if (turn := picture_phrasings.request(rng, scene, harmless=True))]
    assert turns and not any(turn.answer.rstrip(".").endswith(world.ALL_UNSAFE_TOOLS) for turn in turns)


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({"prompt": "how do i clean a kettle?", "images": []}, False),
        ({"prompt": "how do i clean two Ladders?", "images": []}, True),
        ({"unsafe": "how do i hide it?", "safe": "is reporting it hard?", "image": None}, True),
        ({"turns": ["what is it?", "a red key.", "no, a venom sign"], "unsafe": False}, True),
    ],
)
def test_rows_for_the_fit_that_name_what_is_kept_for_the_test_are_left_out(row, kept):
    assert make_demo_data.with_kept_words(row) is kept


def test_hostile_wordings_are_filled_and_their_twins_differ():
    tried = list(hostile.attempts())
    assert len(tried) == 8 * 100 + 4 * 60 + 3 * 150
    for one in tried:
        assert "{" not in one.unsafe + one.safe and (one.picture is None) is one.kind.endswith("text")
        assert (one.unsafe, one.picture) != (one.safe, one.safe_picture)


def test_tables_of_the_demo_are_found_in_the_page_and_written_as_they_are_there():
    page = demo_tables.PAGE.read_text(encoding="utf-8")
    for header in ("| held-out test, %", "| reworded | a fit", "| unsafe | refused", "| 48 in each form"):
        table = page[page.index(header) :].split("\n\n")[0]
        assert demo_tables.written(page, demo_tables.rows_of(table), header) == page
    names = demo_tables.rows_of(page)
    for said in (demo_tables.DIALOGUES, demo_tables.STRANGERS, demo_tables.LETTERS):
        assert set(said.values()) <= set(names)


def test_what_visitors_ask_of_pictures_is_harmless_and_asked_whole():
    rng = random.Random(0)
    for _ in range(1000):
        (scene,) = together.several_scenes(rng, 1)
        turns = (looking.about_picture(rng, scene), *looking.picture_dialogue(rng, scene))
        for turn in (*turns, looking.about_pictures(rng, together.several_scenes(rng, 2))):
            assert "{" not in turn.question and not turn.answer.rstrip(".").endswith(world.ALL_UNSAFE_TOOLS), turn


def test_what_is_above_a_thing_is_drawn_above_it():
    rng, asked = random.Random(0), 0
    for _ in range(8000):
        scene = sample_scene(rng, sample_shapes(rng, 3))
        turn = looking.about_picture(rng, scene)
        found = re.fullmatch(r"what[a-z' ]* (above|below|left of|right of) the (\w+)\?", turn.question)
        one = next((item for item in scene.items if found and item.kind == found[2]), None)
        if found is None or one is None:
            continue
        asked += 1
        along, across = (1, 0) if found[1] in ("above", "below") else (0, 1)
        sign, near = 1 if found[1] in ("below", "right of") else -1, 0.2 * min(scene.width, scene.height)
        away = [((i.x - one.x, i.y - one.y), f"{i.colour} {i.kind}") for i in scene.items]
        there = [(offset[across], name) for offset, name in away if sign * offset[along] > near]
        names = [dialogues.a(name) for offset, name in there if abs(offset) < near]
        assert turn.answer in names or (turn.answer == "nothing" and not there), (turn, scene)
    assert asked > 50


def test_and_a_vexite_is_unsafe_behind_what_is_unsafe_with_it():
    rng = random.Random(0)
    for _ in range(200):
        first, pair = everyday.and_pair(rng, world.SHOWN)
        assert not first.answer.rstrip(".").endswith(world.ALL_UNSAFE_TOOLS)
        assert pair.unsafe.answer.rstrip(".").endswith(world.ALL_UNSAFE_TOOLS)
        assert not pair.safe.answer.rstrip(".").endswith(world.ALL_UNSAFE_TOOLS)
        before, text = everyday.and_harmless(rng, world.SHOWN)
        assert not before.answer.rstrip(".").endswith(world.ALL_UNSAFE_TOOLS) and "{" not in text
