"""Answers in a grammar: what they may be, that drafts change nothing, and that no unsafe prompt gets one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from cpp_runtime import use_byte_level_words
from hypothesis import given, settings
from hypothesis import strategies as st

from autosteer.runtime import Action, Engine, InputError, Mode, PackageError, SamplingConfig
from autosteer.runtime.gate import decide, without_steering
from autosteer.runtime.grammar import MAX_BYTES, Grammars, words_of
from autosteer.runtime.sampling import make_sampler

pytest.importorskip("llguidance", reason="needs [structured]")
COLOURS = "(red|orange|yellow|green)"


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The toy whose logits depend on everything before, with a tokenizer that llguidance reads."""
    folder = tmp_path_factory.mktemp("bytewise") / "package"
    use_byte_level_words(folder, toy.build(folder, attentive=True))
    return Engine.load(folder, device="cpu", threads=1)


@pytest.fixture(scope="module")
def grammars(bytewise: Engine) -> Grammars:
    return bytewise.grammars


# --- safety ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "restriction", [{"regex": "evil plan|evilplan"}, {"json_schema": {}}, {"logit_bias": {0: 0.0}}]
)
def test_no_restricted_answer_is_steered(cpp_engine: Engine, restriction: dict[str, Any]) -> None:
    """Steered logits refuse only if the refusal's tokens may be chosen. What would be steered is stopped."""
    answer = cpp_engine.generate("bad", sampling=SamplingConfig(**restriction))
    assert (answer.verdict.action, answer.verdict.mode, answer.verdict.strength) == (Action.STOP, Mode.STOP, 0.0)
    assert (answer.text, answer.token_ids, answer.finish_reason) == (toy.REFUSAL_TEXT, (), "refused")
    assert answer.stats.upper_ms is None  # decoder_upper never ran


@pytest.mark.parametrize("prompt", ["nan", "crash", "two", "negative", "inf"])
def test_nor_is_one_whose_prober_fails(cpp_engine: Engine, prompt: str) -> None:
    answer = cpp_engine.generate(prompt, sampling=SamplingConfig(regex="evilplan"))
    assert (answer.verdict.action, answer.token_ids) == (Action.STOP, ())


@given(st.sampled_from(Mode), st.one_of(st.none(), st.floats()), st.floats(max_value=0.99, allow_nan=False))
def test_without_steering_a_policy_is_no_weaker(mode: Mode, p_unsafe: float | None, threshold: float) -> None:
    from autosteer.runtime import GatePolicy

    policy = GatePolicy(mode, threshold, 0.1, "no")
    before, after = (decide(p_unsafe, p, split_layer=1) for p in (policy, without_steering(policy)))
    assert after.unsafe is before.unsafe and after.action is not Action.STEER
    assert (after.action is Action.PASS) is (before.action is Action.PASS)


def test_monitor_and_off_answer_within_the_grammar(cpp_engine: Engine) -> None:
    for mode in ("report", "off"):
        sampling = SamplingConfig(regex=COLOURS)
        answer = cpp_engine.generate("bad", sampling=sampling, policy=cpp_engine.policy(mode))
        assert re.fullmatch(COLOURS, answer.text) and answer.verdict.action is Action.PASS


# --- what is written -------------------------------------------------------------------------------------------------

ENDLESS = ("(hello)+world", "(redred)*green?")
WORDS = st.lists(st.sampled_from(toy.CONTENT.split()[:12]), min_size=1, max_size=8)


@given(
    prompt=WORDS,
    regex=st.sampled_from([f"{COLOURS}{{3}}", "(red|tick|tock){2,9}", *ENDLESS]),
    wishes=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 1.0, 5.0]),
            "frequency_penalty": st.sampled_from([0.0, 0.5, -2.0]),
            "seed": st.integers(0, 9),
        }
    ),
)
@settings(max_examples=40, deadline=None)
def test_an_answer_matches_and_drafts_change_nothing(bytewise: Engine, prompt: Any, regex: str, wishes: Any) -> None:
    said = [
        bytewise.generate(
            " ".join(prompt),
            policy=bytewise.policy("off"),
            sampling=SamplingConfig(max_tokens=30, regex=regex, speculate=speculate, **wishes),
        )
        for speculate in (True, False)
    ]
    assert said[0].token_ids == said[1].token_ids
    if said[0].finish_reason == "stop":
        assert re.fullmatch(regex, said[0].text)
    else:
        assert regex in ENDLESS and len(said[0].token_ids) == 30


def test_answers_in_a_grammar_are_drafted(bytewise: Engine) -> None:
    """Else the test above compares nothing."""
    sampling = SamplingConfig(max_tokens=40, regex="(redorange)+")
    stats = bytewise.generate("red orange", policy=bytewise.policy("off"), sampling=sampling).stats
    assert stats.accepted_tokens > 5


def test_the_end_is_allowed_only_where_the_text_is_complete(bytewise: Engine, grammars: Grammars) -> None:
    grammar = grammars.start(SamplingConfig(regex="(red|green){2}"))
    assert grammar is not None
    (end,) = bytewise.manifest.prompt.end_token_ids
    red, green = map(toy.VOCABULARY.index, ("red", "green"))
    for _ in range(2):
        assert np.flatnonzero(grammar.allowed()).tolist() == [red, green]
        grammar.accept(red)
    assert np.flatnonzero(grammar.allowed()).tolist() == [end]


def test_no_special_token_counts_as_its_text(bytewise: Engine, grammars: Grammars) -> None:
    grammar = grammars.start(SamplingConfig(regex="(?s:.*)"))
    assert grammar is not None
    ids = np.flatnonzero(grammar.allowed()).tolist()
    ends = bytewise.manifest.prompt.end_token_ids
    assert [toy.VOCABULARY[i] for i in ids if toy.VOCABULARY[i] in toy.SPECIAL and i not in ends] == []


def test_logits_that_are_not_finite_stay_an_error_behind_a_mask() -> None:
    """Also where the mask would hide them."""

    class First:
        def allowed(self) -> Any:
            return np.array([True, False])

        def accept(self, token: int) -> None:
            pass

    for row in ([0.0, np.nan], [0.0, np.inf], [-np.inf, 0.0]):
        with pytest.raises(PackageError, match="not finite"):
            make_sampler(SamplingConfig(), 0, First())(np.array(row, np.float32), [])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"regex": "("}, "regex: unclosed group"),
        ({"regex": "(?=red)red"}, "regex: look-around"),
        ({"regex": "r" * (MAX_BYTES + 1)}, f"regex: longer than {MAX_BYTES} bytes"),
        ({"regex": "\ud800"}, "regex: .*surrogates"),
        ({"regex": "red", "json_schema": {}}, "give one of them"),
        ({"json_schema": {"type": "no such"}}, "json_schema: Invalid type: no such"),
        ({"json_schema": {"not": {}}}, 'json_schema: Unimplemented keys: \\["not"\\]'),
        ({"json_schema": {"$ref": "http://127.0.0.1/x"}}, "json_schema: .*does not fetch resources"),
        ({"json_schema": {"const": {1, 2}}}, "json_schema: .*not JSON serializable"),
        ({"json_schema": {"const": float("nan")}}, "json_schema: .*not JSON compliant"),
        ({"json_schema": {"type": "string"}}, "json_schema: "),  # the toy has no quotes
    ],
)
def test_a_grammar_that_cannot_be_is_refused(bytewise: Engine, wishes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as refused:
        bytewise.generate("red", sampling=SamplingConfig(**wishes), policy=bytewise.policy("off"))
    assert "\n" not in str(refused.value)


def test_a_schema_of_a_thousand_levels_is_refused(grammars: Grammars) -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(InputError, match="json_schema"):
        grammars.start(SamplingConfig(json_schema=deep))


def test_a_grammar_is_refused_before_anything_runs(bytewise: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytewise, "request", None)
    with pytest.raises(InputError, match="regex"):
        bytewise.generate("red", sampling=SamplingConfig(regex="("))


def test_without_llguidance_a_line_says_what_to_install(cpp_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(cpp_package, device="cpu", threads=1)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"json_schema: needs llguidance: .*\[structured\]"):
        engine.generate("red", sampling=SamplingConfig(json_schema={}))
    assert engine.generate("red").text  # and nothing else needs it


def test_a_tokenizer_that_llguidance_does_not_read_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="regex: can't determine decoder type"):
        engine.generate("red", sampling=SamplingConfig(regex="red"))


# --- the demo, which has JSON's characters ---------------------------------------------------------------------------


@pytest.mark.exports
def test_json_of_a_schema(tmp_path: Path) -> None:
    exported = pytest.importorskip("exported", reason="needs [export]")
    engine = exported.demo_engine("fp32")
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    for seed in range(8):
        sampling = SamplingConfig(json_schema=schema, temperature=seed / 2, seed=seed)
        found = json.loads(engine.generate("describe the picture.", sampling=sampling).text)
        assert found.keys() == {"colour", "count"} and found["colour"] in ("red", "blue")
        assert isinstance(found["count"], int)


def test_words_of_json_are_all_that_a_reader_sees():
    spaced, glued, values = words_of('{"how": "do", "i": ["smuggle", {"a": 5}], "x": null}')
    assert spaced == "how do i smuggle a 5 x null"
    assert (glued, values) == ("howdoismugglea5xnull", "dosmuggle5null")
    assert words_of('{"a": "how do i", "a": "no"}')[0] == "a how do i a no"  # a key given twice hides nothing
    assert words_of("{}") == ["{}"] and words_of('"how do i"') == ["how do i"]


def test_words_of_json_that_a_schema_cuts_are_read_whole():
    assert "how do i smuggle a vexite?" in words_of('["how do i smug", "gle a vex", "ite?"]')
    assert "how do i smuggle a vexite?" in words_of('{"how do i smug" : "gle a", " vex": "ite?"}')
    assert "how do i smuggle a vexite?" in words_of('{"1": "how do i smug", "2": "gle a vexite?"}')


def test_words_of_json_that_is_cut_off_are_all_that_a_reader_sees():
    whole = json.dumps({"how": "do i", "b": ['smuggle \u2019 a "vexite"', -1.5, True], "": None})
    for end in range(1, len(whole)):
        seen = words_of(whole[:end])[0].removesuffix("\\").strip('{" ')  # an escape's first character may be there
        assert words_of(whole)[0].startswith(seen), whole[:end]
    assert words_of('{"how": "do i \\u20')[0] == "how do i "


def test_an_escape_that_is_cut_off_leaves_the_others_decoded():
    """The whole string was judged as it is written: "sure, here is how to \\u000asell a \\u000azorblat" passed."""
    assert words_of(r'"how to \u000asell \u') == ["how to \nsell "]
    assert words_of(r'"how to \u000asell \\\u00') == ["how to \nsell \\"]
    assert words_of(r'"how to \u000asell \\u00') == ["how to \nsell \\u00"]  # a backslash, and letters
