"""One rule, two runtimes: every case of tests/conformance/*.json through Python and through C++, with one outcome.

A check that is added to one runtime only does not go unnoticed: the last tests here want a case that reaches it, and
that case fails in the other.
"""

from __future__ import annotations

import json
import math
import os
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conformance_packages import cases
from conformance_themes import CASE_LIST, NO_FFMPEG, PYTHON, THEMES, Case, Places, runs_here
from cpp_runtime import Parts
from documents import changed, kinds, manifest_text, places_of, value_at, without
from refusals import cpp_lines, cpp_sites, python_sites, unreached

from autosteer.runtime import Manifest
from autosteer.runtime.errors import AutoSteerError

KINDS = {3: "package", 4: "provider", 5: "input"}  # by exit code


@dataclass(frozen=True)
class Outcome:
    """What a runtime made of a case: a value, or a refusal in one line."""

    value: Any = None
    error: str | None = None  # one of KINDS
    says: str = ""
    places: frozenset[tuple[str, int]] = frozenset()  # files and lines of the runtime that the error came through


# --- outcomes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("conformance"))


Ask = Callable[[str, Case], Outcome]


@pytest.fixture(scope="module")
def python(places: Places) -> Ask:
    """Asks Python, once for each case."""
    known: dict[tuple[str, str], Outcome] = {}

    def ask(theme: str, case: Case) -> Outcome:
        key = theme, case["name"]
        if key not in known:
            run = THEMES[theme].python
            assert run is not None
            try:
                known[key] = Outcome(run(case, places))
            except AutoSteerError as err:
                came_through = frozenset(_places(err))
                known[key] = Outcome(None, KINDS[err.exit_code], str(err), came_through)
        return known[key]

    return ask


def _places(err: BaseException | None) -> Iterator[tuple[str, int]]:
    """The files and lines that an error, and those behind it, came through."""
    while err:
        for frame in traceback.extract_tb(err.__traceback__):
            yield Path(frame.filename).name, frame.lineno or 0
        err = err.__cause__ or err.__context__


def in_cpp(program: Parts, places: Places) -> dict[tuple[str, str], Outcome]:
    """What C++ makes of all cases, theme by theme in one process each."""
    found = {}
    for theme, how in THEMES.items():
        asked = [case for case in cases(theme) if runs_here(case)]
        answers = program.lines(*({**how.cpp(case, places), "trace": True} for case in asked))
        for case, answer in zip(asked, answers, strict=True):
            places_ = frozenset(("", address) for address in answer["thrown"])
            if "error" in answer:
                kind = KINDS.get(answer["exit_code"], f"exit code {answer['exit_code']}")
                found[theme, case["name"]] = Outcome(None, kind, answer["error"], places_)
            else:
                found[theme, case["name"]] = Outcome(how.from_cpp(case, places, answer["answer"]), places=places_)
    return found


@pytest.fixture(scope="module")
def cpp(parts: Parts, places: Places) -> dict[tuple[str, str], Outcome]:
    """What the C++ runtime makes of each case, as it is shipped."""
    return in_cpp(parts, places)


def fits(expected: Any, found: Any) -> bool:
    """Whether `found` says all that is expected; answers say more."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(k in found and fits(v, found[k]) for k, v in expected.items())
    if isinstance(expected, list):
        return isinstance(found, list) and len(expected) == len(found) and all(map(fits, expected, found))
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return math.isclose(expected, found, rel_tol=1e-6, abs_tol=1e-9)
    return type(expected) is type(found) and bool(expected == found)


def check(case: Case, outcome: Outcome) -> None:
    """Fail where the outcome is not the case's."""
    expected = case["expected"]
    if isinstance(expected, dict) and "error" in expected:
        assert outcome.error == expected["error"], outcome
        assert expected["says"] and expected["says"] in outcome.says
        assert "\n" not in outcome.says
    else:
        assert outcome.error is None and fits(expected, outcome.value), outcome


def named(asked: list[tuple[str, Case]], runtime: str) -> pytest.MarkDecorator:
    """A test for each case. Those that are pending in a runtime must fail there: what they want is not written yet."""
    pending = pytest.mark.xfail(strict=True, reason="pending")
    return pytest.mark.parametrize(
        ("theme", "case"),
        [
            pytest.param(
                *(t, c),
                id=f"{t}: {c['name']}",
                marks=[pending] * (runtime in c.get("pending", ())) + [NO_FFMPEG] * (not runs_here(c)),
            )
            for t, c in asked
        ],
    )


# --- the tests -------------------------------------------------------------------------------------------------------


@named(PYTHON, "python")
def test_python_does_what_the_case_says(python, theme, case):
    check(case, python(theme, case))


@named(CASE_LIST, "cpp")
def test_cpp_does_what_the_case_says(cpp, theme, case):
    check(case, cpp[theme, case["name"]])


def test_names_of_cases_are_their_own():
    """Their files on disk have these names, and so have outcomes."""
    for theme in THEMES:
        found = [case["name"] for case in cases(theme)]
        assert len(found) == len(set(found)), theme


OTHERS: tuple[Any, ...] = (
    *(None, "x", "", -1, 0, 1, 1.5, True, [], {}, [1, "x"], {"x": 1}),
    *(2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**20, 10**400, "\ud800", "x\0"),
)


def variants(document: Any, part: str | None) -> Iterator[Any]:
    """A manifest, or that part of it, with another value in each kind of place, without each key, with a key too many
    in each object; and the whole with two places changed at random.
    """
    for keys in kinds(document):
        if part not in (None, keys[0]):
            continue
        yield from (changed(document, keys, other) for other in OTHERS)
        if isinstance(keys[-1], str):
            yield without(document, keys)
        if isinstance(value_at(document, keys), dict):
            yield changed(document, (*keys, "hello"), 1)
    rng = random.Random(3)
    for _ in range(0 if part else 400):
        data = document
        for _ in range(2):
            values = [*OTHERS, value_at(data, rng.choice(list(places_of(data))))]
            data = changed(data, rng.choice(list(places_of(data))), rng.choice(values))
        yield data


@pytest.mark.parametrize(("package", "part"), [("drafted", None), ("split", "image"), ("deepstack", "image")])
def test_both_runtimes_refuse_the_same_manifests(parts, places, package, part, tmp_path):
    """Whatever is changed, and without anybody's list: a field that one of them reads less strictly shows here."""
    source = places.packages.whole(package)
    document = json.loads((source / "autosteer.json").read_text(encoding="utf-8"))
    made, accepted = [], []
    for i, data in enumerate(variants(document, part)):
        folder = tmp_path / str(i)
        folder.mkdir()
        for file in source.iterdir():
            os.symlink(file, folder / file.name)
        (folder / "autosteer.json").unlink()
        (folder / "autosteer.json").write_text(manifest_text(data), encoding="utf-8")
        try:
            Manifest.load(folder).verify(folder)
        except AutoSteerError:
            accepted.append(False)
        else:
            accepted.append(True)
        made.append(folder)
    answers = parts.run(*({"part": "verify", "package": str(folder)} for folder in made))
    differ = [
        (str(folder / "autosteer.json"), in_python_, answer)
        for folder, in_python_, answer in zip(made, accepted, answers, strict=True)
        if in_python_ is not (answer is None)
    ]
    assert differ == []
    assert 10 < sum(accepted) < len(accepted) / 2


# --- nothing is refused by one runtime alone -------------------------------------------------------------------------

PYTHON_FILES = (
    *("strict_json.py", "prompt_encoder.py", "engine.py", "gate.py", "image.py", "manifest.py"),
    *("manifest_checks.py", "sampling.py", "self_test.py", "subgraph.py", "text.py", "video.py"),
    *("audit.py", "ffmpeg.py", "draft_table.py", "picture_file.py"),
)
CPP_FILES = (
    *("engine.hpp", "gate.hpp", "image.hpp", "json.hpp", "manifest.hpp", "manifest_checks.hpp"),
    *("manifest_decode.hpp", "picture.hpp", "generation.hpp", "prompt_encoder.hpp", "sampling.hpp"),
    *("self_test.hpp", "strict_json.hpp", "subgraph.hpp", "text.hpp", "unicode.hpp", "video.hpp"),
    *("audit.hpp", "ffmpeg.hpp", "draft_table.hpp"),
)
# Refusals that no case can reach, and why: a piece of the source, the reason.
PYTHON_EXEMPT = {
    "shares a pass with others is read otherwise": "the toys' texts share none (test_packed.py)",
    "raise PackageError(UNGUARDED)": "a policy that a program made itself (test_engine.py)",
    "the audit record cannot be written": "the disk is full (test_audit.py; C++: test_cpp_audit.py)",
    "this system has no flock": "Windows (test_audit.py)",
    "the name of a video is empty": "in Python alone an empty path is the current folder (test_limits.py)",
    "its file was deleted": "it is deleted while the engine runs (test_audit.py)",
    "is not installed: apt-get install": "there is an ffmpeg (test_ffmpeg.py)",
    "more than {MAX_FRAMES}": "100,000 frames (test_ffmpeg.py)",
    "it has no frames": "an ffmpeg that is none (test_ffmpeg.py)",
    "a frame of more than": "100 MB (test_ffmpeg.py)",
    "it changed while it was read": "a race (test_ffmpeg.py)",
    "s to decode it": "a minute (test_ffmpeg.py)",
    "frames of {width}x{height} pixels: at most": "an animated picture, which C++ does not read (test_limits.py)",
    "images and videos go into the messages of a dialogue": "arguments that only Python has (test_engine.py)",
    "give a list of them": "arguments that only Python has (test_engine.py)",
    "give a text, or a list of Message": "arguments that only Python has (test_engine.py)",
    "give a tuple of texts, images and videos": "arguments that only Python has (test_engine.py)",
    "give True or False": "arguments that only Python has (test_engine.py)",
    "this conversation was begun with another engine": "two engines (test_conversation.py)",
    "image array: expected": "numpy's arrays, which only Python takes (test_image.py)",
    "{path}: not readable ({err})": "the disk fails (test_manifest.py)",
    "the prompt is not valid Unicode text": "JSON that two parsers read has none (test_text.py; C++: test_cpp_text.py)",
    "is too much for the tokenizer's regular expression": "a panic of tokenizers (test_text.py); C++ has a case",
    "is no text, image or video": "a part of another Python type (test_text.py)",
    "not a readable folder": "a folder that may not be read: tests are root's",
}
CPP_EXEMPT = {
    "shares a pass with others is read otherwise": "the toys' texts share none (test_cpp_engine.py)",
    "throw PackageError(kUnguarded)": "a policy that a program made itself",
    "the audit record cannot be written": "the disk is full (test_cpp_audit.py)",
    "is not installed: apt-get install": "there is an ffmpeg (test_ffmpeg.py)",
    "InputError(std::strerror(errno))": "a file that may not be read: tests are root's",
    '": not a readable image (" + std::strerror(errno)': "a file that may not be read: tests are root's",
    "std::to_string(kMaxFrames)": "100,000 frames (test_ffmpeg.py)",
    "it has no frames": "an ffmpeg that is none (test_ffmpeg.py)",
    "a frame of more than": "100 MB (test_ffmpeg.py)",
    "it changed while it was read": "a race (test_ffmpeg.py)",
    "s to decode it": "a minute (test_ffmpeg.py)",
    "this conversation was begun with another engine": "two engines (test_cpp_conversation.py)",
    "a stop string is not valid Unicode text": "JSON that two parsers read has none (test_cpp_interface.py)",
    "image: expected 3 * width * height bytes": "pixels that a C++ program hands over",
    "throw InputError(refusal)": "the same, of an extreme shape (test_cpp_interface.py)",
    '": not a readable image (" + err.what()': "a device that only looks like a file (test_cpp_images.py)",
    ": not readable; copy the package again": "the disk fails after the file's hash was compared",
    "its output has not the type that this runtime reads": "the manifest's types are checked; this guards memory",
    "the prompt cannot be normalised": "no memory",
    "not a readable folder": "a folder that may not be read: tests are root's",
}


@NO_FFMPEG
def test_every_refusal_of_python_has_a_case(python):
    """So that C++ is asked for it, too."""
    lines = {place for theme, case in PYTHON for place in python(theme, case).places}
    assert unreached(python_sites(*PYTHON_FILES), lines, PYTHON_EXEMPT) == []


@NO_FFMPEG
def test_every_refusal_of_cpp_has_a_case(sanitised, places):
    """So that Python is asked for it, too. On the way the sanitizers see all cases."""
    program = sanitised / "autosteer-parts"
    outcomes = in_cpp(Parts(program), places)
    for theme, case in CASE_LIST:
        if "cpp" not in case.get("pending", ()):
            check(case, outcomes[theme, case["name"]])
    addresses = {address for outcome in outcomes.values() for _, address in outcome.places}
    assert unreached(cpp_sites(*CPP_FILES), cpp_lines(program, addresses), CPP_EXEMPT) == []
