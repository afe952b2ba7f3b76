"""autosteer-eval: data sets in, rates out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from autosteer.runtime import Engine, InputError, Message
from autosteer.runtime.evaluation.cli import asking_on
from autosteer.runtime.evaluation.datasets import DataSource, Row, read_rows
from autosteer.runtime.evaluation.refusals import RuleJudge
from autosteer.runtime.evaluation.run import (
    Asked,
    Result,
    ResultFile,
    RunFacts,
    ask,
    check_order,
    rejudge,
    run_rows,
    summarise,
)
from autosteer.runtime.evaluation.statistics import rate
from autosteer.runtime.sampling import SamplingConfig


def jsonl(tmp_path, *rows, name: str = "set.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def result(*, flagged: bool, refused: str = "", correct: str | None = None, group: str = "g", unsafe: bool = False):
    """`refused` and `correct` name policies by their first letters: o, a, e (steer), s (stop)."""
    letters = {"off": "o", "always": "a", "steer": "e", "stop": "s"}
    return Result(
        row="",
        group=group,
        unsafe=unsafe,
        prompt="",
        p_unsafe=0.5,
        flagged=flagged,
        answers={},
        refused={p: c in refused for p, c in letters.items()},
        correct=None if correct is None else {p: c in correct for p, c in letters.items()},
    )


def asked(engine: Engine, rows: list[Row]) -> list[Asked]:
    return [ask(engine, row, max_tokens=8) for row in rows]


def test_max_tiles_bounds_what_a_picture_of_a_row_costs(package):
    def tiles(engine: Engine, row: Row) -> int:
        return engine.generate(row.messages).stats.image_tiles

    row = Row((Message.user("what", [np.full((8, 8, 3), (255, 0, 0), np.uint8)]),), unsafe=False, group="", gold=None)
    for most, expected in ((None, 5), (3, 3), (1, 1)):
        with asking_on(None, package, None, "cpu", 1, most)(tiles, [row]) as found:
            assert list(found) == [expected]


# --- rates -----------------------------------------------------------------------------------------------------------


def test_rates_by_hand():
    results = [
        result(flagged=True, refused="aes", unsafe=True),
        result(flagged=True, refused="as", unsafe=True),
        result(flagged=False, refused="a", unsafe=True),
        result(flagged=False, refused="oaes", unsafe=True),
    ]
    (group,) = summarise(results)
    assert (group.n, group.flagged) == (4, rate(2, 4))
    assert group.not_refused == {"off": rate(3, 4), "always": rate(0, 4), "steer": rate(2, 4), "stop": rate(1, 4)}
    assert group.graded == 0
    assert set(group.accuracy.values()) == {None}


def test_accuracy_counts_only_rows_with_a_right_answer():
    results = [result(flagged=False, correct="oe"), result(flagged=False, correct="o"), result(flagged=False)]
    (group,) = summarise(results)
    assert group.accuracy == {"off": rate(2, 2), "always": rate(0, 2), "steer": rate(1, 2), "stop": rate(0, 2)}
    assert group.graded == 2


def test_policies_are_compared_on_the_same_rows():
    """off refuses row 3 only, steer rows 1 and 2 only: 1 against 2 is no difference that can be told from chance."""
    results = [result(flagged=True, refused=r) for r in ("e", "e", "o", "oe", "")]
    first = summarise(results)[0].tests[0]
    assert (first.outcome, first.first, first.second) == ("refused", "off", "steer")
    assert (first.only_first, first.only_second, first.p_value) == (1, 2, 1.0)


def test_right_answers_are_compared_only_where_there_are_any():
    graded, plain = [result(flagged=False, correct="o")], [result(flagged=False)]
    assert {t.outcome for t in summarise(graded)[0].tests} == {"refused", "correct"}
    assert {t.outcome for t in summarise(plain)[0].tests} == {"refused"}


def test_groups_stay_apart_and_in_order():
    results = [result(flagged=f, group=g, unsafe=u) for f, g, u in [(1, "b", True), (0, "a", False), (0, "b", False)]]
    assert [(g.group, g.unsafe, g.n, g.flagged.value) for g in summarise(results)] == [
        *(("b", True, 1, 1.0), ("a", False, 1, 0.0), ("b", False, 1, 0.0))
    ]


def test_answers_of_the_four_policies(engine, tmp_path):
    path = jsonl(
        tmp_path,
        {"prompt": "red", "unsafe": False, "answer": " Orange  yellow GREEN"},
        {"prompt": "bad", "unsafe": True},
    )
    rows = read_rows([DataSource(path)])
    safe, bad = run_rows(asked(engine, rows), rows, RuleJudge())
    assert (safe.flagged, bad.flagged) == (False, True)
    assert safe.answers == {"off": "orange yellow green", "always": "sorry refuse"} | dict.fromkeys(
        ("steer", "stop"), "orange yellow green"
    )
    assert bad.answers == {
        "off": "evil plan",
        "always": "sorry refuse",
        "steer": "sorry refuse",
        "stop": "sorry refuse, i must not answer that.",
    }
    assert bad.refused == {"off": False, "always": True, "steer": True, "stop": True}
    assert safe.correct == {"off": True, "always": False, "steer": True, "stop": True}


@pytest.mark.parametrize("policy", ["steer", "stop"])
@pytest.mark.parametrize("prompt", ["red", "bad", "nan", "crash"])
def test_chosen_answers_are_those_of_the_policy_itself(engine, tmp_path, policy, prompt):
    """`steer` and `stop` are not run but chosen from `off` and `always`; here they are run."""
    rows = read_rows([DataSource(jsonl(tmp_path, {"prompt": prompt, "unsafe": True}))])
    (found,) = run_rows(asked(engine, rows), rows, RuleJudge())
    assert found.answers[policy] == engine.generate(prompt, policy=engine.policy(policy)).text


def test_a_benign_answer_that_is_not_flagged_is_that_of_the_model_without_a_gate(engine, tmp_path):
    rows = read_rows([DataSource(jsonl(tmp_path, *({"prompt": p, "unsafe": False} for p in ("red", "hello", "tick"))))])
    eight = SamplingConfig(max_tokens=8)
    results = list(run_rows(asked(engine, rows), rows, RuleJudge()))
    assert [found.prompt for found in results] == ["red", "hello", "tick"]
    for found in results:
        plain = engine.generate(found.prompt, policy=engine.policy("off"), sampling=eight)
        assert not found.flagged
        assert found.answers["steer"] == found.answers["stop"] == plain.text


def test_a_score_that_is_no_number_is_null_and_flagged(engine, tmp_path):
    rows = read_rows([DataSource(jsonl(tmp_path, {"prompt": "nan", "unsafe": True}))])
    (found,) = run_rows(asked(engine, rows), rows, RuleJudge())
    assert found.p_unsafe is None and found.flagged


def test_the_judge_is_asked_once_for_each_different_answer(engine, tmp_path):
    class Counting:
        name = "counting"
        asked: list[tuple[str, str]] = []  # noqa: RUF012

        def refused(self, prompt: str, answer: str) -> bool:
            self.asked.append((prompt, answer))
            return answer == "sorry refuse"

        def close(self) -> None:
            pass

    judge = Counting()
    rows = read_rows([DataSource(jsonl(tmp_path, {"prompt": "bad", "unsafe": True}))])
    (found,) = run_rows(asked(engine, rows), rows, judge)
    assert judge.asked == [
        ("bad", "evil plan"),
        ("bad", "sorry refuse"),
        ("bad", "sorry refuse, i must not answer that."),
    ]
    assert found.refused == {"off": False, "always": True, "steer": True, "stop": False}


# --- the output file -------------------------------------------------------------------------------------------------

FACTS = RunFacts(package="p", data="d", max_tokens=8, judge="rules-2")


def test_a_file_of_the_same_run_is_gone_on_with(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultFile(path, FACTS, force=False) as file:
        file.append(result(flagged=True, refused="aes", group="one"))
    with ResultFile(path, FACTS, force=False) as file:
        assert file.done == [result(flagged=True, refused="aes", group="one")]
        file.append(result(flagged=False, group="two"))
    with ResultFile(path, FACTS, force=False) as file:
        assert [r.group for r in file.done] == ["one", "two"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_another_run_is_writing_is_refused_and_stays(tmp_path, force):
    """Two runs on one file mixed their lines."""
    path = tmp_path / "out.jsonl"
    with ResultFile(path, FACTS, force=False) as file:
        file.append(result(flagged=True))
        before = path.read_bytes()
        with pytest.raises(InputError, match=r"out\.jsonl: another autosteer-eval is writing it"):
            ResultFile(path, FACTS, force=force)
        assert path.read_bytes() == before
    with ResultFile(path, FACTS, force=force) as file:
        assert len(file.done) == (not force)


@pytest.mark.parametrize("cut", [1, 30])
def test_a_line_that_was_cut_off_is_answered_again(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    with ResultFile(path, FACTS, force=False) as file:
        for group in ("one", "two"):
            file.append(result(flagged=True, group=group))
    path.write_bytes(path.read_bytes()[:-cut])
    with ResultFile(path, FACTS, force=False) as file:
        assert [r.group for r in file.done] == ["one"]
        file.append(result(flagged=True, group="two"))
    with ResultFile(path, FACTS, force=False) as file:
        assert [r.group for r in file.done] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "value"), [("package", "q"), ("max_tokens", 9), ("judge", "command: x"), ("max_tiles", 1)]
)
def test_a_file_of_another_run_is_refused_and_stays(tmp_path, name, value):
    path = tmp_path / "out.jsonl"
    with ResultFile(path, FACTS, force=False) as file:
        file.append(result(flagged=True))
    before = path.read_bytes()
    with pytest.raises(InputError, match=rf"another run \(other {name}\).*--force"):
        ResultFile(path, replace(FACTS, **{name: value}), force=False)
    assert path.read_bytes() == before
    with ResultFile(path, replace(FACTS, **{name: value}), force=True) as file:
        assert file.done == []


@pytest.mark.parametrize(
    "content", ["mine", "mine\n", "{}\n", '{"run": 5}\n', '{"run": {}}\n', "\xff\n", "[" * 9999 + "\n"]
)
def test_a_file_that_is_not_ours_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"out\.jsonl: exists and is not what autosteer-eval writes"):
        ResultFile(path, FACTS, force=False)
    assert path.read_text(encoding="latin-1") == content


@pytest.mark.parametrize("size", [0, 1, 9, 30])
def test_a_run_that_was_cut_off_within_its_first_line_begins_again(tmp_path, size):
    """As by a full disk."""
    path = tmp_path / "out.jsonl"
    with ResultFile(path, FACTS, force=False):
        pass
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with ResultFile(path, FACTS, force=False) as file:
        assert file.done == [] and path.read_bytes() == whole


def test_answers_are_not_judged_again_while_a_run_writes_them(tmp_path):
    """The run went on in a file that had no name any more."""
    path = tmp_path / "out.jsonl"
    with ResultFile(path, FACTS, force=False) as file:
        file.append(result(flagged=True))
        with pytest.raises(InputError, match=r"out\.jsonl: another autosteer-eval is writing it"):
            rejudge(path, FACTS, RuleJudge())
        file.append(result(flagged=False))
    assert len(path.read_text().splitlines()) == 3 and list(tmp_path.iterdir()) == [path]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultFile(path, FACTS, force=False) as file:
        file.append(result(flagged=True))
    path.write_text(path.read_text() + '{"row": 5}\n')
    with pytest.raises(InputError, match=r"out\.jsonl:3: .*--force"):
        ResultFile(path, FACTS, force=False)


def test_results_that_are_not_of_the_rows_are_refused(tmp_path):
    rows = [Row((Message.user(text),), True, "g", None) for text in ("a", "b")]
    done = [replace(result(flagged=True), row=row.digest) for row in rows]
    check_order(done[:1], rows, tmp_path / "o")
    with pytest.raises(InputError, match="o:2: the result of another row"):
        check_order(done[::-1], rows, tmp_path / "o")
    with pytest.raises(InputError, match="more results than rows"):
        check_order(done, rows[:1], tmp_path / "o")
