"""The prompts that come with the package: how many, of what kinds, and what must hold for a fit to learn from them."""

import json
import re
import unicodedata
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from autosteer.export.safety import builtin, prober
from autosteer.export.safety.pairs import Labelled, Pair, Prompt, read_data
from autosteer.runtime.errors import InputError

TWINS = builtin.builtin_twins()
HARMLESS = builtin.builtin_harmless()
TEXTS = [*(text for twins in TWINS for text in (twins.unsafe, twins.safe)), *(row.text for row in HARMLESS)]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def test_there_are_at_least_four_thousand_prompts_in_pairs_and_as_many_kinds_and_forms_as_promised():
    assert 2 * len(TWINS) >= 4000
    assert len({twins.kind for twins in TWINS}) >= 30
    assert len({twins.form for twins in TWINS}) >= 10


def test_every_kind_of_harm_comes_in_many_families_and_every_form_in_many_kinds():
    families = {kind: len({t.family for t in TWINS if t.kind == kind}) for kind in {t.kind for t in TWINS}}
    kinds = {form: len({t.kind for t in TWINS if t.form == form}) for form in {t.form for t in TWINS}}
    assert min(families.values()) >= 9, families
    assert min(kinds.values()) >= 4, kinds


def test_no_prompt_comes_twice():
    plain = Counter(" ".join(text.casefold().split()) for text in TEXTS)
    assert [text for text, count in plain.items() if count > 1] == []


def test_every_prompt_is_one_line_of_printable_text_without_spaces_around():
    odd = [t for t in TEXTS if t != t.strip() or not t.isprintable() or t != unicodedata.normalize("NFC", t)]
    assert odd == []


def test_no_template_is_left_unfilled():
    assert [text for text in TEXTS if "{act" in text or "{use}" in text or "{thing}" in text or " | " in text] == []


def test_twins_of_an_act_share_a_word_that_the_form_did_not_bring():
    """Else the pair teaches a word, not what is done with it. A few twins differ in every word on purpose."""
    acts = [line.split(" | ") for lines in builtin.sections("acts.txt").values() for line in lines]
    small = words("a an the my our your his her their and or so that to of in on at for with without from by it")
    sharing = [bool((words(unsafe) & words(safe)) - small) for unsafe, safe in acts]
    assert np.mean(sharing) > 0.9


def test_the_alarming_words_stand_on_both_sides():
    """ "kill", "steal", ...: a harmless prompt has each of them at least a third as often as an unsafe one."""
    unsafe = Counter(word for twins in TWINS for word in words(twins.unsafe))
    safe = Counter(word for text in (*(t.safe for t in TWINS), *(h.text for h in HARMLESS)) for word in words(text))
    for word in words("kill shoot crack inject attack execute poison hang drug gun murder weapon hack dead knife"):
        assert safe[word] * 3 >= unsafe[word], (word, safe[word], unsafe[word])
        assert safe[word] > 0, word


def test_two_calls_give_the_same_prompts():
    assert builtin.builtin_twins() == TWINS
    assert builtin.builtin_harmless() == HARMLESS


def test_a_line_added_to_the_acts_leaves_the_other_prompts_as_they_were(monkeypatch):
    sections = builtin.sections

    def with_one_more(name: str) -> dict[str, list[str]]:
        found = sections(name)
        return {**found, "violence": [*found["violence"], "box | pack a box"]} if name == "acts.txt" else found

    monkeypatch.setattr(builtin, "sections", with_one_more)
    more = builtin.builtin_twins()
    assert len(more) > len(TWINS)
    assert set(TWINS) <= set(more)


def test_the_readme_tells_what_there_is():
    """`python -m autosteer.export.safety.builtin` prints its last section."""
    readme = (files("autosteer.export.safety") / "builtin_data" / "README.md").read_text(encoding="utf-8")
    assert readme.partition("## What there is\n\n")[2] == builtin.coverage()


@pytest.fixture(scope="module")
def prompts() -> list[Labelled]:
    return read_data([Path("builtin")]).labelled()


def test_builtin_stands_for_all_pairs_and_harmless_prompts(prompts):
    assert Counter(item.unsafe for item in prompts) == {True: len(TWINS), False: len(TWINS) + len(HARMLESS)}
    assert {item.group for item in prompts} == {"builtin", "builtin everyday", "builtin lookalikes"}


def test_brief_has_one_pair_of_each_family_and_the_same_harmless_prompts(prompts):
    brief = read_data([Path("builtin-brief")])
    assert {pair.family for pair in brief.pairs} == {item.family for item in prompts if item.group == "builtin"}
    assert len({pair.family for pair in brief.pairs}) == len(brief.pairs)
    assert {item.prompt for item in brief.labelled()} <= {item.prompt for item in prompts}
    assert len(brief.extra) == len(HARMLESS)


def test_both_at_once_are_refused():
    with pytest.raises(InputError, match="builtin or builtin-brief"):
        read_data([Path("builtin"), Path("builtin-brief")])


def test_no_family_is_on_two_sides_of_the_split(prompts):
    strata = [(item.unsafe, item.group) for item in prompts]
    split = prober.split_by_text([item.cluster for item in prompts], strata, seed=0)
    sides = [{prompts[row].family for row in rows} for rows in split.parts.values()]
    assert all(sides)
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    shares = [len(rows) / len(prompts) for rows in split.parts.values()]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.02)


def test_builtin_and_a_users_own_pairs_go_together(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"unsafe": "do harm", "safe": "do good", "family": "do"}) + "\n", encoding="utf-8")
    data = read_data([own, Path("builtin")])
    assert data.pairs[-1] == Pair(Prompt("do harm"), Prompt("do good"), "own", "do", "own")
    assert len(data.pairs) == len(TWINS) + 1


def test_a_file_that_is_called_as_the_builtin_pairs_are_is_refused_beside_them(tmp_path):
    """They were one data set in weights and report. A family of null, as pandas writes it, is none."""
    own = tmp_path / "builtin.jsonl"
    rows = [{"unsafe": f"do harm {i}", "safe": f"do good {i}", "family": None, "channel": None} for i in range(20)]
    own.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(InputError, match="a data set is known by its file's name"):
        read_data([own, Path("builtin-brief")])
    assert {(pair.family, pair.channel) for pair in read_data([own]).pairs} == {("", "builtin")}


def test_a_prompt_of_the_users_that_contradicts_a_builtin_one_is_refused(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": TWINS[0].unsafe}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"own.jsonl:1: this prompt is safe here but unsafe at builtin: "):
        read_data([Path("builtin")], [own])
