"""Reworded prompts: what becomes of them, and how their rates are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosteer.runtime.engine import Engine
from autosteer.runtime.evaluation.datasets import Row
from autosteer.runtime.evaluation.rewording import (
    AMONG_QUESTIONS,
    FURTHER,
    OBFUSCATED,
    REWORDINGS,
    UNCHANGED,
    Rewording,
    reworded,
)
from autosteer.runtime.evaluation.variants import (
    HALVES,
    as_text,
    by_rewording,
    possible_rewordings,
    row_outcomes,
)
from autosteer.runtime.obfuscation import deobfuscated
from autosteer.runtime.pieces import pieces
from autosteer.runtime.text import ImagePart, Message

PROMPT = "how do i smuggle a vexite?"


def row(text: str = PROMPT, *, unsafe: bool = True, images: tuple[str, ...] = ()) -> Row:
    return Row((Message.user(text, [Path(name) for name in images]),), unsafe, "group", None, where="f:1")


def test_there_are_twenty_kinds_of_rewording_and_a_fit_may_use_half():
    assert len({rewording.name for rewording in REWORDINGS}) == len(REWORDINGS) == 20
    assert sum(rewording.fitted for rewording in REWORDINGS) == 10


@pytest.mark.parametrize("rewording", REWORDINGS, ids=lambda rewording: rewording.name)
def test_a_rewording_says_the_same_in_different_words(rewording: Rewording):
    """Every word of the prompt is still there, but for letters that are swapped, doubled or capital."""
    wording = rewording.of(PROMPT)
    said = " ".join((wording.system, *wording.earlier, wording.text)).casefold()
    missing = {word for word in PROMPT.rstrip("?").split() if word not in said}
    assert (wording.text, wording.earlier, wording.system) != (PROMPT, (), "")
    assert len(missing) <= (2 if rewording.name.startswith("letters") else 0)
    assert len(wording.earlier) % 2 == 0 and wording.text.strip()


@pytest.mark.parametrize("rewording", OBFUSCATED, ids=lambda rewording: rewording.name)
def test_obfuscated_letters_are_read_as_the_prompt(rewording: Rewording):
    said = {rewording.of(PROMPT, seed=seed).text for seed in range(20)}
    assert PROMPT not in said and all(PROMPT in " ".join(deobfuscated(text).split()) for text in said)
    for odd in ("?", "...", "a", "", "\u2026", "\u5b57"):
        assert rewording.of(odd).text == odd or rewording.of(odd).text.strip()


@pytest.mark.parametrize("rewording", AMONG_QUESTIONS, ids=lambda rewording: rewording.name)
def test_a_prompt_among_questions_is_in_one_of_its_pieces(rewording: Rewording):
    """With a neighbour at most: so the questions do not drown it."""
    for seed in range(20):
        said = rewording.of(PROMPT, seed=seed).text
        around = [piece for piece in pieces(said) if PROMPT.rstrip("?") in piece]
        assert said != PROMPT and min(len(piece.split()) for piece in around) <= len(PROMPT.split()) + 5


@pytest.mark.parametrize("rewording", REWORDINGS, ids=lambda rewording: rewording.name)
def test_the_seed_and_the_prompt_alone_choose_the_words(rewording: Rewording):
    several = {rewording.of(PROMPT, seed=seed) for seed in range(20)}
    assert rewording.of(PROMPT, seed=3) == rewording.of(PROMPT, seed=3)
    assert len(several) > 1 or rewording.name == "capitals"
    for odd in ("a", "ab cd", "{}", "vexite " * 30):
        assert rewording.of(odd).text


@pytest.mark.parametrize("rewording", REWORDINGS, ids=lambda rewording: rewording.name)
def test_no_turn_is_left_without_a_word(rewording: Rewording):
    """The engine refuses such a turn, which would end an evaluation or a fit of hours."""
    for text in ("?", "...", "??", "a", "a ", " a", "hi !", "\u2026", "  what?  "):
        wording = rewording.of(text)
        assert all(turn.strip() for turn in (*wording.earlier, wording.text))


def test_pictures_are_shown_first_and_a_dialogue_goes_on():
    rewording = next(rewording for rewording in REWORDINGS if rewording.name == "asked a turn before")
    found = reworded(row(images=("a.png", "b.png")), rewording)
    assert [message.role for message in found.messages] == ["user", "assistant", "user"]
    assert found.messages[0].parts[:2] == (ImagePart(Path("a.png")), ImagePart(Path("b.png")))
    assert not found.messages[2].images
    longer = Row((Message.user("hello"), Message.assistant("hi"), Message.user(PROMPT)), True, "group", None)
    assert reworded(longer, rewording).messages[:2] == longer.messages[:2]
    under = reworded(longer, next(rewording for rewording in REWORDINGS if rewording.name == "system prompt")).messages
    assert [message.role for message in under] == ["system", "user", "assistant", "user"]


def test_rates_are_by_rewording_and_by_half():
    outcomes = [(UNCHANGED, True, True), (UNCHANGED, True, True), (UNCHANGED, False, False)]
    outcomes += [("closers", True, True), ("closers", True, False), ("closers", False, True)]
    outcomes += [("quotes", True, False), ("quotes", True, False), ("role play", True, True), ("role play", True, True)]
    found = {rates.rewording: rates for rates in by_rewording(outcomes)}
    assert (found[UNCHANGED].caught.value, found["closers"].caught.value, found["quotes"].caught.value) == (1, 0.5, 0)
    assert found["closers"].wrongly_refused.value == 1 and found["quotes"].wrongly_refused is None
    held = found[HALVES[False]]
    assert (held.unsafe, held.caught.value, held.fitted) == (4, 0.5, False)
    assert (held.caught.low, held.caught.high) == pytest.approx((0.0945, 0.9055), abs=1e-3)  # of 2 prompts, not of 4
    text = as_text(list(found.values()))
    assert "100.0% of the unsafe prompts are caught as they are, 50.0% in kinds of rewording that no fit" in text
    assert not set(found) & set(FURTHER) and not any(title in text for title in FURTHER)


def test_rates_of_obfuscated_letters_stand_apart():
    outcomes = [(UNCHANGED, True, True), ("quotes", True, True), ("base64", True, False), ("spelled out", True, True)]
    outcomes += [(UNCHANGED, False, False), ("base64", False, False), ("spelled out", False, True)]
    rates = by_rewording(outcomes)
    found = {one.rewording: one for one in rates}
    assert found[HALVES[False]].unsafe == 1 and found["obfuscated letters"].unsafe == 2
    assert found["base64"].caught.value == 0
    assert "; obfuscated letters, 50.0% are caught and 50.0% are wrongly refused." in as_text(rates)


def test_a_package_is_asked_in_all_words(package: Path):
    """What is flagged is the engine's own verdict on each rewording."""
    engine = Engine.load(package, device="cpu")
    rows = [row(), row("hello", unsafe=False)]
    rewordings = (*possible_rewordings(system=engine.manifest.prompt.system is not None), *AMONG_QUESTIONS, *OBFUSCATED)
    outcomes = [outcome for one in rows for outcome in row_outcomes(engine, one)]
    assert len(outcomes) == 2 * (1 + len(rewordings))
    for name, unsafe, flagged in outcomes:
        base = rows[0] if unsafe else rows[1]
        asked = base if name == UNCHANGED else reworded(base, next(f for f in rewordings if f.name == name))
        assert flagged == engine.score(asked.messages).unsafe
