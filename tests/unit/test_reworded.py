"""How a fit rewords its prompts: what is trained on, what judges, and how dialogues are scored. No model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autosteer.export.safety.arrange import Arranged
from autosteer.export.safety.pairs import Labelled, Prompt
from autosteer.export.safety.prober import Split
from autosteer.export.safety.reworded import JUDGED, TAUGHT, reword_prompts
from autosteer.runtime.errors import InputError
from autosteer.runtime.evaluation.rewording import REWORDINGS, UNCHANGED
from autosteer.runtime.pieces import discounted
from autosteer.runtime.readings import all_readings, plain_turns, readings_of_answer, with_letters_of
from autosteer.runtime.text import ImagePart, Message

PROMPTS = [Labelled(Prompt(f"how do i do thing number {i}?"), unsafe=i % 2 == 0, group="g") for i in range(50)]
SPLIT = Split(tuple(np.arange(50).reshape(5, 10)))
FITTED = {rewording.name for rewording in REWORDINGS if rewording.fitted}


def reworded(*, augment: bool = True):
    return reword_prompts(PROMPTS, SPLIT, REWORDINGS, augment=augment, seed=0)


def test_no_kind_of_rewording_both_teaches_and_chooses():
    found = reworded()
    assert {one.rewording for one in found.training} == FITTED
    assert {one.rewording for one in found.choosing} == {rewording.name for rewording in REWORDINGS} - FITTED
    assert {one.rewording for one in found.judging} == {rewording.name for rewording in REWORDINGS}


def test_no_held_out_prompt_is_trained_on_or_chosen_by():
    found = reworded()
    assert {one.of for one in found.training} == {*range(40)}
    assert {one.of for one in found.choosing} == {*range(30, 40)}
    assert {one.of for one in found.judging} == {*range(40, 50)}
    assert len(found.training) == 40 * TAUGHT and not reworded(augment=False).training
    assert all(one.item.unsafe == PROMPTS[one.of].unsafe for one in (*found.training, *found.judging))
    assert reworded() == found


def test_rewordings_are_trained_on_in_the_part_of_their_prompt():
    found = reworded()
    taught = found.taught(SPLIT, 50)
    assert len(taught.parts["train"]) == 30 + 30 * TAUGHT and len(taught.validation) == 10 + 10 * TAUGHT
    assert {found.everything[row - 50].prompt for row in taught.parts["train"][30:]}.isdisjoint(
        found.everything[row - 50].prompt for row in taught.validation[10:]
    )
    assert all(found.training[row - 50].of < 30 for row in taught.parts["train"][30:])
    assert (taught.heldout == SPLIT.heldout).all()


def test_a_dialogue_is_as_unsafe_as_its_worst_turn():
    found = reworded()
    rows = [i for i, one in enumerate(found.judging) if one.rewording == "asked a turn before" and one.of == 40]
    assert len(rows) == 3  # both user turns are scored where they stand, and the second by itself
    p = np.zeros(50 + len(found.everything))
    p[50 + len(found.training) + len(found.choosing) + rows[0]] = 0.9
    flagged = [(rewording, unsafe) for rewording, unsafe, fires in found.outcomes(p, 50, 0.5) if fires]
    assert flagged == [("asked a turn before", True)]
    p[40] = 0.9
    assert (UNCHANGED, True, True) in found.outcomes(p, 50, 0.5)
    p[50 + len(found.training) + len(found.choosing) + rows[0]] = np.nan  # as in the runtime: unknown is unsafe
    assert ("asked a turn before", True, True) in found.outcomes(p, 50, 0.5)


def test_what_tells_the_labels_apart_in_the_words_to_choose_by_is_chosen():
    found = reworded()
    unsafe = np.array([item.unsafe for item in (*PROMPTS, *found.everything)], dtype=float)
    blind = np.where(np.arange(len(unsafe)) < 50 + len(found.training), unsafe, 0.5)  # right on all plain prompts
    assert found.choose({"last": blind, "mean": unsafe * 0.6}, 50) == "mean"
    assert found.choose({"last": unsafe, "mean": blind}, 50) == "last"


def test_a_reworded_dialogue_keeps_the_turns_before():
    earlier = ("what is it?", "a key.")
    asked = [replace(item, prompt=replace(item.prompt, earlier=earlier)) for item in PROMPTS]
    found = reword_prompts(asked, SPLIT, REWORDINGS, augment=True, seed=0)
    assert all(one.item.prompt.earlier[:2] == earlier for one in found.training)
    assert {len(one.item.prompt.earlier) for one in found.training} == {2, 4}  # 4: split over turns
    assert (PROMPTS[0].prompt, False) in asked[0].prompt.pieces  # a turn is also read by itself, and counts in full


def test_few_prompts_are_judged_of_many():
    many = [Labelled(Prompt(f"thing {i}"), unsafe=i % 2 == 0, group="g") for i in range(1000)]
    split = Split((*np.arange(200).reshape(4, 50), np.arange(200, 1000)))
    found = reword_prompts(many, split, REWORDINGS, augment=True, seed=0)
    assert len({one.of for one in found.judging}) == 2 * JUDGED


def test_the_worst_of_a_prompt_and_its_pieces_counts():
    """Of held-out prompts and of their rewordings, which are judged; nothing else is read in pieces."""
    found = reworded()
    items = [*PROMPTS, *found.everything]
    arranged = Arranged(PROMPTS, SPLIT, found, items, len(PROMPTS), table=None)  # type: ignore[arg-type]
    judged = {*range(40, 50), *range(len(items) - len(found.judging), len(items))}
    rows = [row for row, *_ in arranged.pieces]
    assert set(rows) <= judged and len(set(rows)) > 50
    assert all(tuple(piece) in items[row].prompt.pieces for row, *piece in arranged.pieces)
    whole, of_pieces = np.full(len(items), 0.3), np.full(len(rows), 0.1)
    first, *_, last = (at for at, (_, _, is_discounted) in enumerate(arranged.pieces) if is_discounted)
    of_pieces[[first, last]] = 0.9, 0.5
    read = arranged.as_read(whole, of_pieces)
    assert read[rows[first]] == discounted(0.9) > 0.5 and read[rows[last]] == 0.3 > discounted(0.5)
    read[rows[first]] = 0.3
    assert (read == 0.3).all() and (whole == 0.3).all()


@pytest.mark.parametrize("earlier", [(), ("what is shown?", "a kite.")])
def test_the_pieces_of_a_prompt_are_those_that_the_runtime_reads(earlier: tuple[str, ...]):
    """In plain letters, too; the fit's threshold counts them."""
    text = "how do i clean a spoon? h0w d0 i carry a ladder? and how do i paint a kettle?"
    prompt = Prompt(text, earlier=earlier)

    def dialogue(one: Prompt) -> tuple[Message, ...]:
        spoken = zip(("user", "assistant") * 2, (*one.earlier, one.text), strict=False)
        return tuple(Message(role, (said,), trusted=role == "assistant") for role, said in spoken)

    messages = dialogue(prompt)
    plain, last = plain_turns(messages), len(earlier) // 2
    found = {reading.messages for at, reading in all_readings(messages, plain, pieces=True) if at == last}
    found |= {tuple(with_letters_of(plain, messages))}  # which the runtime reads at once
    assert found == {dialogue(piece) for piece, _ in prompt.pieces} and prompt.pieces


@pytest.mark.parametrize("rows", [False, True])
def test_words_in_several_texts_or_turns_in_a_row_are_read_together_with_each_picture(rows: bool):
    """They were read with each picture as if there were nothing between them."""
    shown = (ImagePart(Path("a.png")), ImagePart(Path("b.png")))
    words = ("how do i", "make this?")
    one = (Message("user", (*shown, *words)),)
    messages = (Message("user", (*shown, words[0])), Message("user", words[1:])) if rows else one
    found = {reading.messages for _, reading in all_readings(messages, plain_turns(messages), pieces=True)}
    for picture in shown:
        assert {(Message("user", (picture, between.join(words))),) for between in ("\n", "")} <= found


@pytest.mark.parametrize("steered", [False, True])
def test_an_answer_is_read_in_one_turn_with_the_only_picture(steered: bool):
    picture = ImagePart(Path("a.png"))
    readings = [
        reading.messages for reading in readings_of_answer([Message("user", (picture, "?"))], "no.", steered=steered)
    ]
    assert (Message("user", (picture, "no.")),) in readings
    assert len({*readings}) == len(readings)


def test_the_words_with_each_of_several_pictures_are_pieces_as_in_the_runtime():
    prompt = Prompt("h0w do i move this?", images=(Path("a.png"), Path("b.png")))

    def turn(one: Prompt) -> tuple[Message, ...]:
        return (Message("user", (*map(ImagePart, one.images), one.text)),)

    found = [reading.messages for _, reading in all_readings(turn(prompt), plain_turns(turn(prompt)), pieces=True)]
    assert [turn(piece) for piece, _ in prompt.pieces] == found and len(found) == 5
    items = [Labelled(prompt, unsafe=True, group="g")]
    arranged = Arranged([], SPLIT, reworded(), items, 1, table=None)  # type: ignore[arg-type]
    object.__setattr__(arranged, "pieces", [(0, *piece) for piece in prompt.pieces])
    read = [arranged.as_read(np.zeros(1), np.array([0.9 * (i == at) for i in range(5)])) for at in range(5)]
    assert [one[0] == 0.9 for one in read] == [True, False, False, False, False]


def test_the_words_with_an_earlier_picture_are_weighed_as_in_the_runtime():
    prompt = Prompt("how do i make this?", images=(Path("a.png"),), earlier=("what is a spoon?", "it is a tool."))
    assert dict(prompt.pieces)[Prompt("how do i make this?", images=(Path("a.png"),))]  # counted in full once


def test_a_prompt_that_the_runtime_refuses_is_named_by_its_line():
    many = Prompt(". ".join(f"how do i clean spoon {i}" for i in range(300)), (Path("a.png"),) * 32, "b.jsonl:7")
    with pytest.raises(InputError, match=r"b\.jsonl:7: .* more than the 4096 readings"):
        _ = many.pieces
