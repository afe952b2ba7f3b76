"""One rule, two runtimes: every case of tests/conformance/*.json through Python and through C++, with one outcome.

A check that is added to one runtime only does not go unnoticed: the last tests here want a case that reaches it, and
that case fails in the other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from conformance_packages import PICTURES, Packages, cases, shown
from cpp_runtime import Parts, as_sampling, in_python
from documents import changed, kinds, places_of, value_at, without
from refusals import cpp_lines, cpp_sites, python_sites, unreached
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from autosteer.runtime import Conversation, Engine, GatePolicy, Manifest
from autosteer.runtime.errors import AutoSteerError
from autosteer.runtime.gate import Mode, decide, is_safe
from autosteer.runtime.generation import Stats
from autosteer.runtime.image import at_most, open_image, prepare
from autosteer.runtime.manifest import ImageSpec
from autosteer.runtime.sampling import make_sampler
from autosteer.runtime.strict_json import decode
from autosteer.runtime.text import Detokeniser, ImagePart, Message, VideoPart, load_tokenizer
from autosteer.runtime.video import open_video

Case = dict[str, Any]
KINDS = {3: "package", 4: "provider", 5: "input"}  # by exit code


@dataclass(frozen=True)
class Outcome:
    """What a runtime made of a case: a value, or a refusal in one line."""

    value: Any = None
    error: str | None = None  # one of KINDS
    says: str = ""
    places: frozenset[tuple[str, int]] = frozenset()  # files and lines of the runtime that the error came through


class Places:
    """Where the packages and the scratch files of this session's cases lie."""

    def __init__(self, folder: Path):
        self.packages, self.folder = Packages(folder / "packages"), folder

    def file(self, case: Case) -> Path:
        """A file of this case."""
        return self.folder / case["name"].replace("/", " ")

    @functools.cached_property
    def tokenizers(self) -> dict[str, Path]:
        """tokenizer.json by name: the toy's, and one whose token i is the byte i."""
        order = bytes_to_characters()
        tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(order)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<end>"])
        tokenizer.save(str(self.folder / "bytes.json"))
        return {"toy": self.packages.whole("toy") / "tokenizer.json", "bytes": self.folder / "bytes.json"}


def bytes_to_characters() -> list[str]:
    """GPT-2's alphabet: the printable character that stands for each byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def number(value: Any) -> float:
    """A number; "nan", "inf" and "-inf", which JSON lacks, as text."""
    return float(value)


def as_message(turn: Case) -> Message:
    """A message of the C interface in Python."""

    def part(p: Any) -> Any:
        return p if isinstance(p, str) else VideoPart(tuple(p["video"])) if "video" in p else ImagePart(p["image"])

    return Message(turn["role"], tuple(map(part, turn["parts"])), turn.get("trusted", False))


def words(rows: list[int | None]) -> str:
    """Token ids of the toy as its words; a picture's rows are *."""
    return " ".join("*" if row is None else toy.VOCABULARY[row] for row in rows)


# --- the themes: how Python is asked, how C++ is ---------------------------------------------------------------------


def damage_in_python(case: Case, places: Places) -> Any:
    Engine.load(places.packages.of(case), device="cpu", threads=1, **case.get("options", {}))
    return {"loads": True}


def damage_in_cpp(case: Case, places: Places) -> Case:
    return {"part": "load", "package": str(places.packages.of(case)), "options": case.get("options", {})}


def rule_in_python(case: Case, places: Places) -> Any:
    return {"safe": is_safe(number(case["p_unsafe"]), number(case["threshold"]))}


def verdict_in_python(case: Case, places: Places) -> Any:
    policy = GatePolicy(Mode(case["mode"]), number(case["threshold"]), number(case["strength"]), "no")
    p_unsafe = None if case["p_unsafe"] is None else number(case["p_unsafe"])
    verdict = decide(p_unsafe, policy, split_layer=1)
    return {"unsafe": verdict.unsafe, "action": verdict.action.value, "strength": verdict.strength}


def verdict_in_cpp(case: Case, places: Places) -> Case:
    return {"part": "gate", **{key: case[key] for key in ("p_unsafe", "mode", "threshold", "strength")}}


GIVEN = ("logits", "tokens", "prompt_tokens")


def sampling_in_python(case: Case, places: Places) -> Any:
    sample = make_sampler(as_sampling(case["sampling"]), case.get("prompt_tokens", 0))
    rows = [np.array([number(x) for x in row], np.float32) for row in case.get("logits", [])]
    return {"drawn": [sample(row, case.get("tokens", [])) for row in rows]}


def sampling_in_cpp(case: Case, places: Places) -> Case:
    given = {"logits": [], "tokens": [], "prompt_tokens": 0} | {k: v for k, v in case.items() if k in GIVEN}
    return {"part": "sample", "sampling": case["sampling"], **given}


def prompt_in_python(case: Case, places: Places) -> Any:
    engine = Engine.load(places.packages.of(case), device="cpu", threads=1)
    prompt = engine.encoder.prepare([as_message(m) for m in shown(case["messages"])], Stats())
    return {"rows": words([key if isinstance(key, int) else None for key in prompt.keys]), "probed": prompt.probed}


def prompt_in_cpp(case: Case, places: Places) -> Case:
    return {"part": "prompt", "package": str(places.packages.of(case)), "messages": shown(case["messages"])}


def stops_in_python(case: Case, places: Places) -> Any:
    detokeniser, pieces = Detokeniser(load_tokenizer(places.tokenizers[case["tokenizer"]]), case["stop"]), []
    for token in case["tokens"]:
        pieces.append(detokeniser.push(token))
        if detokeniser.stopped:
            break
    return {"pieces": [*pieces, detokeniser.flush()]}


def stops_in_cpp(case: Case, places: Places) -> Case:
    tokenizer = str(places.tokenizers[case["tokenizer"]])
    return {"part": "decode", "tokenizer": tokenizer, "answers": [case["tokens"]], "stop": case["stop"]}


def picture_file(case: Case, places: Places) -> Path:
    """A case's picture; or a pipe, or a file without content, which Git does not keep."""
    if "special" not in case:
        return PICTURES / case["file"]
    path = places.file(case).with_suffix(".special")
    if case["special"] == "pipe" and not path.exists():
        os.mkfifo(path)
    if case["special"].endswith(" bytes"):
        path.touch()
        os.truncate(path, int(case["special"].removesuffix(" bytes")))
    return path


def picture_in_python(case: Case, places: Places) -> Any:
    picture = open_image(picture_file(case, places))
    if "image" not in case:
        return {"size": list(picture.shape[:2]), "sha256": hashlib.sha256(picture.tobytes()).hexdigest()}
    spec = at_most(decode(ImageSpec, case["image"], "image"), case.get("max_tiles"))
    pixel_values = prepare(picture, spec, alone=case["alone"])
    return {"tiles": len(pixel_values), "sha256": hashlib.sha256(pixel_values.tobytes()).hexdigest()}


def picture_in_cpp(case: Case, places: Places) -> Case:
    files = {"file": str(picture_file(case, places)), "out": str(places.file(case))}
    if "image" not in case:
        return {"part": "open", **files}
    how = {"spec": case["image"], "alone": case["alone"], "max_tiles": case.get("max_tiles")}
    return {"part": "prepare", **files, **how}


def picture_from_cpp(case: Case, places: Places, answer: Any) -> Any:
    digest = hashlib.sha256(places.file(case).read_bytes()).hexdigest()
    return {"tiles" if "image" in case else "size": answer, "sha256": digest}


def film(case: Case, places: Places) -> Path:
    """The folder of a case's files, which are empty; a file of ffmpeg's making, a pipe, or a text; or nothing."""
    path, files = places.file(case), case["files"]
    if isinstance(files, dict) and not path.exists():
        subprocess.run(["ffmpeg", "-v", "error", *files["ffmpeg"], path], check=True)
        os.truncate(path, int(path.stat().st_size * files.get("kept", 1.0)))
    elif files == "pipe" and not path.exists():
        os.mkfifo(path)
    elif isinstance(files, str) and files != "pipe":
        path.write_text(files)
    elif isinstance(files, list):
        path.mkdir(exist_ok=True)
        for name in files:
            (path / name).touch()
    return path


def frames_in_a_folder(case: Case, places: Places) -> dict[str, str]:
    """What `ffmpeg -i VIDEO FOLDER/%04d.png` makes of a case's film: the SHA-256 of each frame's pixels -> its name."""
    if not isinstance(case["files"], dict):
        return {}
    folder = places.file(case).with_suffix(".frames")
    if not folder.exists():
        folder.mkdir()
        decode = ["ffmpeg", "-v", "error", "-i", film(case, places), "-fps_mode", "passthrough", folder / "%04d.png"]
        subprocess.run(decode, check=True)
    return {hashlib.sha256(open_image(file).tobytes()).hexdigest(): file.name for file in folder.iterdir()}


def video_in_python(case: Case, places: Places) -> Any:
    frames = open_video(film(case, places), case["frames"])
    known = frames_in_a_folder(case, places)
    digests = [f.name if isinstance(f, Path) else hashlib.sha256(np.asarray(f).tobytes()).hexdigest() for f in frames]
    return {"chosen": [known.get(digest, digest) for digest in digests]}


def video_in_cpp(case: Case, places: Places) -> Case:
    return {"part": "frames", "path": str(film(case, places)), "frames": case["frames"]}


def video_from_cpp(case: Case, places: Places, answer: Any) -> Any:
    known = frames_in_a_folder(case, places)
    return {"chosen": [known.get(digest, digest) for digest in answer]}


def request_in_python(case: Case, places: Places) -> Any:
    engine = Engine.load(places.packages.of(case), device="cpu", threads=1, **case.get("options", {}))
    return in_python(engine, shown(case["request"]))


def request_in_cpp(case: Case, places: Places) -> Case:
    request = case["text"] if "text" in case else shown(case["request"])
    package = str(places.packages.of(case))
    return {"part": "ask", "package": package, "requests": [request], "options": case.get("options", {})}


def dialogue_in_python(case: Case, places: Places) -> Any:
    engine = Engine.load(places.packages.of(case), device="cpu", threads=1)
    conversation = Conversation(engine)
    return [in_python(engine, request, conversation) for request in shown(case["requests"])]


def dialogue_in_cpp(case: Case, places: Places) -> Case:
    package, requests = str(places.packages.of(case)), shown(case["requests"])
    return {"part": "ask", "package": package, "requests": requests, "conversation": True}


def as_it_is(case: Case, places: Places, answer: Any) -> Any:
    return answer


def spelled(case: Case, places: Places, answer: Any) -> Any:
    return {**answer, "rows": words(answer["rows"])}


@dataclass(frozen=True)
class Theme:
    """How the cases of one file are asked. `python` is missing where only JSON can be wrong so."""

    python: Callable[[Case, Places], Any] | None
    cpp: Callable[[Case, Places], Case]  # -> a command for autosteer-parts
    from_cpp: Callable[[Case, Places, Any], Any] = as_it_is


THEMES = {
    "damage": Theme(damage_in_python, damage_in_cpp, lambda *_: {"loads": True}),
    "refusal_heads": Theme(damage_in_python, damage_in_cpp, lambda *_: {"loads": True}),
    "rule": Theme(rule_in_python, lambda case, _: {"part": "rule", **case}, lambda _case, _places, a: {"safe": a}),
    "verdicts": Theme(verdict_in_python, verdict_in_cpp),
    "sampling": Theme(sampling_in_python, sampling_in_cpp, lambda _case, _places, a: {"drawn": a}),
    "prompts": Theme(prompt_in_python, prompt_in_cpp, spelled),
    "stops": Theme(stops_in_python, stops_in_cpp, lambda _case, _places, a: {"pieces": a[0]}),
    "pictures": Theme(picture_in_python, picture_in_cpp, picture_from_cpp),
    "videos": Theme(video_in_python, video_in_cpp, video_from_cpp),
    "requests": Theme(request_in_python, request_in_cpp, lambda _case, _places, a: a[0]),
    "json_requests": Theme(None, request_in_cpp, lambda _case, _places, a: a[0]),
    "dialogues": Theme(dialogue_in_python, dialogue_in_cpp),
}
CASE_LIST = [(theme, case) for theme in THEMES for case in cases(theme)]
PYTHON = [(theme, case) for theme, case in CASE_LIST if THEMES[theme].python]
NO_FFMPEG = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg: apt-get install ffmpeg")


def runs_here(case: Case) -> bool:
    """Whether what a case needs is installed."""
    return not isinstance(case.get("files"), dict) or shutil.which("ffmpeg") is not None


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


@pytest.mark.parametrize(("package", "part"), [("toy", None), ("split", "image")])
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
        (folder / "autosteer.json").write_text(json.dumps(data), encoding="utf-8")
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
    *("strict_json.py", "prompt_encoder.py", "engine.py", "gate.py", "image.py", "manifest.py", "sampling.py"),
    *("self_test.py", "subgraph.py", "text.py", "video.py", "ffmpeg.py"),
)
CPP_FILES = (
    *("engine.hpp", "gate.hpp", "image.hpp", "json.hpp", "manifest.hpp", "picture.hpp", "generation.hpp"),
    *("sampling.hpp", "self_test.hpp", "subgraph.hpp", "text.hpp", "unicode.hpp", "video.hpp", "ffmpeg.hpp"),
)
# Refusals that no case can reach, and why: a piece of the source, the reason.
PYTHON_EXEMPT = {
    "is not installed: apt-get install": "there is an ffmpeg (test_ffmpeg.py)",
    "more than {MAX_FRAMES}": "100,000 frames (test_ffmpeg.py)",
    "it has no frames": "an ffmpeg that is none (test_ffmpeg.py)",
    "a frame of more than": "100 MB (test_ffmpeg.py)",
    "it changed while it was read": "a race (test_ffmpeg.py)",
    "s to decode it": "a minute (test_ffmpeg.py)",
    "frames of {width}x{height} pixels: at most": "an animated picture, which C++ does not read (test_limits.py)",
    "images and videos go into the messages of a dialogue": "arguments that only Python has (test_engine.py)",
    "this conversation was begun with another engine": "two engines (test_conversation.py)",
    "image array: expected": "numpy's arrays, which only Python takes (test_image.py)",
    "pixels: it is empty": "an array or Pillow's image without pixels: files have some (test_image.py)",
    "{path}: not readable ({err})": "the disk fails (test_manifest.py)",
    "the prompt is not valid Unicode text": "JSON that two parsers read has none (test_text.py; C++: test_cpp_text.py)",
    "is no text, image or video": "a part of another Python type (test_text.py)",
    "not a readable folder": "a folder that may not be read: tests are root's",
}
CPP_EXEMPT = {
    "is not installed: apt-get install": "there is an ffmpeg (test_ffmpeg.py)",
    "InputError(std::strerror(errno))": "a file that may not be read: tests are root's",
    "std::to_string(kMaxFrames)": "100,000 frames (test_ffmpeg.py)",
    "it has no frames": "an ffmpeg that is none (test_ffmpeg.py)",
    "a frame of more than": "100 MB (test_ffmpeg.py)",
    "it changed while it was read": "a race (test_ffmpeg.py)",
    "s to decode it": "a minute (test_ffmpeg.py)",
    "this conversation was begun with another engine": "two engines (test_cpp_conversation.py)",
    "a stop string is not valid Unicode text": "JSON that two parsers read has none (test_cpp_interface.py)",
    "image: expected 3 * width * height bytes": "pixels that a C++ program hands over",
    '"image of " + wrong': "too many of them: of a file, picture.hpp refuses them",
    "no turn is judged": "the last turn is",
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
