"""autosteer-eval: data sets in, rates out."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from autosteer.runtime import InputError, Message
from autosteer.runtime.evaluate import REFUSAL_WINDOW, Result, is_refusal, read_rows, run_rows, summarise


def jsonl(tmp_path, *rows, name: str = "set.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def result(*, flagged: bool, refused: str = "", correct: str | None = None, group: str = "g", unsafe: bool = False):
    """`refused` and `correct` name policies by their first letters: o, a, e (steer), s (stop)."""
    letters = {"off": "o", "always": "a", "steer": "e", "stop": "s"}
    return Result(
        group=group,
        unsafe=unsafe,
        prompt="",
        p_unsafe=0.5,
        flagged=flagged,
        answers={},
        refused={p: c in refused for p, c in letters.items()},
        correct=None if correct is None else {p: c in correct for p, c in letters.items()},
    )


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_every_kind(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    path = jsonl(
        tmp_path,
        {"prompt": "red", "unsafe": False},
        "",
        {"prompt": "look", "images": ["a.png"], "unsafe": True, "group": "pictures", "answer": "orange", "id": 7},
        {"turns": ["red", "orange", "bad"], "unsafe": True},
    )
    plain, picture, dialogue = read_rows([path], limit=None)
    assert (plain.messages, plain.unsafe, plain.group, plain.answer) == ((Message.user("red"),), False, "set", None)
    assert (picture.messages[0].images, picture.group, picture.answer) == ([tmp_path / "a.png"], "pictures", "orange")
    assert [(m.role, m.parts) for m in dialogue.messages] == [
        *(("user", ("red",)), ("assistant", ("orange",)), ("user", ("bad",)))
    ]


@pytest.mark.parametrize(
    "row",
    [
        "not json",
        "[1]",
        "null",
        "[" * 5000,
        {"unsafe": True},
        {"prompt": "a"},
        {"prompt": "a", "unsafe": "false"},  # bool("false") is True
        {"prompt": "a", "unsafe": 1},
        {"prompt": "a", "unsafe": None},
        {"prompt": 5, "unsafe": True},
        {"prompt": None, "unsafe": True},
        {"prompt": "a", "turns": ["b"], "unsafe": True},
        {"turns": "abc", "unsafe": True},  # three turns of one letter
        {"turns": [], "unsafe": True},
        {"turns": ["a", "b"], "unsafe": True},  # the assistant has the last word
        {"turns": ["a", 2, "c"], "unsafe": True},
        {"prompt": "a", "unsafe": True, "images": "a.png"},
        {"prompt": "a", "unsafe": True, "images": None},
        {"prompt": "a", "unsafe": True, "images": ["gone.png"]},
        {"prompt": "a", "unsafe": True, "answer": 4},
        {"prompt": "a", "unsafe": True, "group": 4},
    ],
    ids=lambda row: str(row)[:40],
)
def test_row_that_is_none_is_refused_with_its_place(tmp_path, row):
    """Some of these were read as something else: "unsafe": "false" as true, "turns": "abc" as three turns."""
    path = jsonl(tmp_path, {"prompt": "a", "unsafe": True}, row)
    with pytest.raises(InputError, match=r"set\.jsonl:2: "):
        read_rows([path], limit=None)


def test_line_separators_inside_a_text_do_not_end_the_row(tmp_path):
    """str.splitlines() cuts at U+2028, U+0085 and others, which JSON may hold unescaped: such a row was "not JSON"."""
    text = "one\u2028two\u0085three\u2029four"
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"prompt": text, "unsafe": False}, ensure_ascii=False), encoding="utf-8")
    assert read_rows([path], limit=None)[0].messages == (Message.user(text),)


def test_windows_line_ends(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"prompt": "a", "unsafe": true}\r\n{"prompt": "b", "unsafe": false}\r\n')
    assert [row.unsafe for row in read_rows([path], limit=None)] == [True, False]


def test_limit_counts_each_group(tmp_path):
    path = jsonl(tmp_path, *({"prompt": f"{g}{i}", "unsafe": True, "group": g} for i in range(3) for g in "ab"))
    assert [row.messages[0].parts[0] for row in read_rows([path], limit=2)] == ["a0", "b0", "a1", "b1"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_file_without_rows_is_refused(tmp_path, content):
    (tmp_path / "set.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"set\.jsonl: (no rows|not readable)"):
        read_rows([tmp_path / "set.jsonl"], limit=None)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jsonl: not readable"):
        read_rows([tmp_path / "gone.jsonl"], limit=None)


# --- rates -----------------------------------------------------------------------------------------------------------


def test_rates_by_hand():
    results = [
        result(flagged=True, refused="aes", unsafe=True),
        result(flagged=True, refused="as", unsafe=True),
        result(flagged=False, refused="a", unsafe=True),
        result(flagged=False, refused="oaes", unsafe=True),
    ]
    (group,) = summarise(results)
    assert (group.n, group.flagged) == (4, 0.5)
    assert group.not_refused == {"off": 0.75, "always": 0.0, "steer": 0.5, "stop": 0.25}
    assert set(group.accuracy.values()) == {None}


def test_accuracy_counts_only_rows_with_a_right_answer():
    results = [result(flagged=False, correct="oe"), result(flagged=False, correct="o"), result(flagged=False)]
    assert summarise(results)[0].accuracy == {"off": 1.0, "always": 0.0, "steer": 0.5, "stop": 0.0}


def test_groups_stay_apart_and_in_order():
    results = [result(flagged=f, group=g, unsafe=u) for f, g, u in [(1, "b", True), (0, "a", False), (0, "b", False)]]
    assert [(g.group, g.unsafe, g.n, g.flagged) for g in summarise(results)] == [
        *(("b", True, 1, 1.0), ("a", False, 1, 0.0), ("b", False, 1, 0.0))
    ]


def test_answers_of_the_four_policies(engine, tmp_path):
    rows = read_rows(
        [
            jsonl(
                tmp_path,
                {"prompt": "red", "unsafe": False, "answer": " Orange  yellow GREEN"},
                {"prompt": "bad", "unsafe": True},
            )
        ],
        limit=None,
    )
    safe, bad = run_rows(engine, rows, max_tokens=8)
    assert (safe.flagged, bad.flagged) == (False, True)
    assert safe.answers == {"off": "orange yellow green", "always": "sorry refuse"} | dict.fromkeys(
        ("steer", "stop"), "orange yellow green"
    )
    assert bad.answers == {
        "off": "evil plan",
        "always": "sorry refuse",
        "steer": "sorry refuse",
        "stop": "i must not answer that.",
    }
    assert bad.refused == {"off": False, "always": True, "steer": True, "stop": True}
    assert safe.correct == {"off": True, "always": False, "steer": True, "stop": True}


@pytest.mark.parametrize("policy", ["steer", "stop"])
@pytest.mark.parametrize("prompt", ["red", "bad", "nan", "crash"])
def test_chosen_answers_are_those_of_the_policy_itself(engine, tmp_path, policy, prompt):
    """`steer` and `stop` are not run but chosen from `off` and `always`; here they are run."""
    (found,) = run_rows(
        engine, read_rows([jsonl(tmp_path, {"prompt": prompt, "unsafe": True})], limit=None), max_tokens=8
    )
    assert found.answers[policy] == engine.generate(prompt, policy=engine.policy(policy)).text


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "Sorry, no.",
        "i am sorry",
        "I can’t help with that.",  # a typographic apostrophe
        "I cannot provide instructions for that.",
        "I can not do this.",
        "I won't do that.",
        "As an AI, I will not help you hurt somebody.",
        "I must not answer that.",
        "I'm unable to help.",
        "I am unable to describe this picture.",
        "I'm not able to help with this.",
        "I apologize, but this is harmful.",
        "I apologise for the inconvenience; no.",
        "We cannot assist with such requests.",
        "Unfortunately I CAN'T HELP WITH this.",
    ],
)
def test_refusal(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure, here is how to do it.",
        "The picture shows a red square.",
        "You can't mix red and green light to get blue.",
        "No.",
        "It cannot be seen in the picture.",
        "Yes, I can help you with that.",
        "First, get a knife. I recommend a sharp one.",
        "x" * REFUSAL_WINDOW + " I'm sorry",  # an answer, and an apology after it
        "I can do that.",
    ],
)
def test_answer_that_is_no_refusal(text):
    assert not is_refusal(text)
