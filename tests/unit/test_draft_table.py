"""What a model often says: the table made of its answers, what is drafted from it, and the package that has it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import toy
from conftest import load

from autosteer.runtime import Engine, Manifest, Message, SamplingConfig, draft_maker
from autosteer.runtime.draft_maker import install, own_answers
from autosteer.runtime.draft_table import ENTRY_BYTES, LONGEST, DraftTable, draft_table, keys
from autosteer.runtime.drafting import Drafter
from autosteer.runtime.errors import InputError, PackageError

COST = 0.1


def habits(n: int, seed: int = 0) -> list[list[int]]:
    """Answers of a model that goes on with 1 2 3 4 5 6 whenever it has said 1 2, and says anything else at random."""
    rng = random.Random(seed)
    answers = []
    for _ in range(n):
        text = [0, 0, 0]
        while len(text) < 60:
            text += [1, 2, 3, 4, 5, 6] if rng.random() < 0.2 else [rng.randrange(10, 400)]
        answers.append(text)
    return answers


@pytest.fixture(scope="module")
def table() -> DraftTable:
    return draft_table(habits(200))


# --- the table -------------------------------------------------------------------------------------------------------


def test_what_follows_most_often_is_found_with_its_chance(table):
    token, chance = table.next([77, 1, 2]) or (-1, 0.0)
    assert token == 3 and chance > 0.7
    assert table.next([399, 398]) is None  # whatever followed came once


def test_longer_ngrams_come_first():
    rng = random.Random(2)
    runs = [[5, 6], [5, 6], [9, 5, 8], [1000], [2000], [3000]]
    table = draft_table(
        [
            [token + rng.randrange(900) if token > 9 else token for _ in range(40) for token in rng.choice(runs)]
            for _ in range(99)
        ]
    )
    assert (table.next([5]) or (0,))[0] == 6
    assert (table.next([9, 5]) or (0,))[0] == 8


def test_chances_are_those_of_answers_that_were_not_counted(table):
    """Told and true agree on answers of the same model."""
    told, true, seen = 0.0, 0, 0
    for answer in habits(60, seed=1):
        for end in range(LONGEST, len(answer)):
            if found := table.next(answer[:end]):
                told, true, seen = told + found[1], true + (found[0] == answer[end]), seen + 1
    assert seen > 300 and told / seen == pytest.approx(true / seen, abs=0.1)


def test_answers_without_habits_have_no_table():
    rng = random.Random(1)
    assert not len(draft_table([[rng.randrange(9999) for _ in range(50)] for _ in range(20)]).tokens)
    assert not len(draft_table([]).tokens)


def test_keys_tell_length_order_and_token_apart():
    found = [keys(context)[-1] for context in ([1], [2], [1, 2], [2, 1], [1, 1], [1, 1, 1], [0], [0, 0])]
    assert len(set(found)) == len(found) and all(0 <= key < 2**64 for key in found)
    assert keys([9, 8, 7, 6, 5, 4]) == keys([7, 6, 5, 4]) and len(keys([4, 4])) == 2


def test_file_is_read_as_it_was_written(table, tmp_path):
    (tmp_path / "t.bin").write_bytes(table.to_bytes())
    read = DraftTable.load(tmp_path / "t.bin", 400)
    assert (tmp_path / "t.bin").stat().st_size == ENTRY_BYTES * len(table.tokens)
    assert read.next([1, 2]) == table.next([1, 2])
    with pytest.raises(PackageError, match="outside the vocabulary"):
        DraftTable.load(tmp_path / "t.bin", 5)


# --- what is drafted -------------------------------------------------------------------------------------------------


def test_free_text_is_drafted_from_the_table(table):
    assert Drafter([50, 1, 2], COST).draft(9) == []
    assert Drafter([50, 1, 2], COST, table).draft(9)[:4] == [3, 4, 5, 6]
    assert Drafter([50, 1, 2], COST, table).draft(2) == [3, 4]


def test_the_likelier_of_copy_and_table_is_drafted(table):
    copied = [1, 2, 30, 31, 32] * 6  # here the text says otherwise than the table, and has said so often
    text = Drafter(copied[:5], COST, table)
    for token in copied[5:]:
        text.push(token)
    for token in (1, 2):
        text.push(token)
    assert text.draft(3) == [30, 31, 32]
    once = Drafter([88, 89, 90, 1, 2, 30, 31, 99, 2], COST, table)  # "2" alone came once: 3 follows in the table
    assert once.draft(1) == [3]


def test_from_the_first_token_of_the_table_the_copy_no_longer_counts(table):
    text = Drafter([2, 30, 31, 32, 33, 99, 2], COST, table)
    assert text.draft(4) == [3, 4, 5, 6]


def test_a_table_that_misleads_is_no_longer_believed(table):
    text = Drafter([50], COST, table)
    text.push(2)
    assert text.draft(9)[:2] == [3, 4]
    for n in range(30):  # always something else, so that there is nothing to copy, either
        text.push(200 + n)
        text.push(2)
    assert text.draft(9)[:1] != [3]


# --- the package -----------------------------------------------------------------------------------------------------

ASKED = ["tick", "red", "hello", "tock tick", "bad", "green", "w1 w2", "yellow tick"] * 4


def ask(engine: Engine, words: str) -> tuple[int, ...]:
    return engine.generate(words, sampling=SamplingConfig(max_tokens=20, speculate=False)).token_ids


@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_own_answers_are_the_engines(engine, monkeypatch, at_once):
    """The gate's among them: "bad" is refused."""
    monkeypatch.setattr(draft_maker, "AT_ONCE", at_once)
    found = list(own_answers(engine, ([Message.user(words)] for words in ASKED), 20))
    expected = [ask(engine, words) for words in ASKED]
    assert sorted(tuple(answer[LONGEST - 1 :]) for answer in found) == sorted(expected)


def test_package_with_a_table_drafts_and_says_the_same(tmp_path):
    toy.build(tmp_path)
    before = load(tmp_path)
    answers = list(own_answers(before, ([Message.user(words)] for words in ASKED), 20))
    expected = before.generate("tick", sampling=SamplingConfig(max_tokens=20))
    install(tmp_path, draft_table(answers))
    after = load(tmp_path).generate("tick", sampling=SamplingConfig(max_tokens=20))
    assert (after.token_ids, after.text) == (expected.token_ids, expected.text)
    assert after.stats.accepted_tokens > expected.stats.accepted_tokens
    undrafted = load(tmp_path).generate("tick", sampling=SamplingConfig(max_tokens=20, speculate=False))
    assert undrafted.stats.drafted_tokens == 0


def test_another_table_takes_the_place_of_the_first(tmp_path, table):
    toy.build(tmp_path)
    small = DraftTable(np.array([1, 2], np.uint64), np.array([5, 6], np.int32), np.array([255, 9], np.uint8))
    first = install(tmp_path, small)
    assert install(tmp_path, small) == first
    other = install(tmp_path, DraftTable(small.ngrams, small.tokens, np.array([255, 99], np.uint8)))
    assert other.drafts != first.drafts and len(other.files) == len(first.files)
    assert [file.name for file in tmp_path.glob("drafts-*")] == [other.drafts.file]
    load(tmp_path)


def test_table_without_entries_is_refused_and_the_package_stays(tmp_path):
    before = toy.build(tmp_path)
    with pytest.raises(InputError, match="nothing in common"):
        install(tmp_path, draft_table([]))
    assert Manifest.load(tmp_path) == before


def test_the_same_table_again_on_a_full_disk_leaves_the_package_whole(tmp_path, monkeypatch):
    toy.build(tmp_path)
    small = DraftTable(np.array([1, 2], np.uint64), np.array([5, 6], np.int32), np.array([255, 9], np.uint8))
    install(tmp_path, small)

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        install(tmp_path, small)
    Manifest.load(tmp_path).verify(tmp_path)
    assert len(list(tmp_path.glob("drafts*"))) == 1


@pytest.mark.parametrize("again", [False, True])
def test_a_disk_that_is_full_when_the_manifest_is_written_keeps_nothing_of_the_new_table(tmp_path, monkeypatch, again):
    """autosteer.json.new and a table that no manifest lists stayed."""
    toy.build(tmp_path)
    small = DraftTable(np.array([1, 2], np.uint64), np.array([5, 6], np.int32), np.array([255, 9], np.uint8))
    if again:  # the same table, which is listed
        install(tmp_path, small)
    before, write = {path: path.read_bytes() for path in tmp_path.iterdir()}, Path.write_text

    def full(self, text, **options):
        write(self, text[:10], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        install(tmp_path, small)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    Manifest.load(tmp_path).verify(tmp_path)


def test_package_is_whole_if_the_disk_is_full(tmp_path, monkeypatch):
    """The manifest is written last, under another name first."""
    before = toy.build(tmp_path)
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        install(tmp_path, DraftTable(*(np.array([1], kind) for kind in (np.uint64, np.int32, np.uint8))))
    monkeypatch.undo()
    assert Manifest.load(tmp_path) == before
    load(tmp_path)
