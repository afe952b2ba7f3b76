"""The C++ runtime gives the verdicts and answers of Python's, fails closed as it does."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import toy
from conformance_packages import split, tokens
from cpp_inputs import SIZES, demo, demo_requests, noise, with_sampling
from cpp_runtime import cli, in_python, joined, python_json, through_c, timeless
from demo_requests import hazard_signs
from documents import manifest_text
from exported import INT8_CACHES, PREFILL, demo_engine, demo_package
from faults import hiding_nothing
from PIL import Image

from autosteer.export.checkpoint.open import DEMO
from autosteer.runtime import Engine, Manifest, Message, SamplingConfig
from autosteer.runtime.check import check_package
from autosteer.runtime.errors import InputError
from autosteer.runtime.manifest import Golden
from autosteer.runtime.stats import Stats


def test_score_is_pythons_and_needs_no_answer(parts, cpp_package, cpp_engine):
    """Policy off scores nothing."""
    dialogues = [["red"], ["bad"], ["bad", "orange", "red"]]
    for mode in ("report", "off"):
        for texts in dialogues:
            turns = [Message("assistant" if i % 2 else "user", (text,)) for i, text in enumerate(texts)]
            messages = [{"role": turn.role, "parts": list(turn.parts)} for turn in turns]
            (found,) = parts.run({"part": "score", "package": str(cpp_package), "messages": messages, "mode": mode})
            assert found == cpp_engine.score(turns, policy=cpp_engine.policy(mode)).p_unsafe


def test_a_score_reads_words_with_later_pictures_although_the_package_judges_answers(parts):
    """No answer of it will be judged. Both runtimes read as if one were, and such pictures passed."""
    package, engine = demo("fp32")
    asked, sign = "how do i make this?", DEMO / "examples" / "unsafe.png"
    messages = [
        {"role": "user", "parts": [asked]},
        {"role": "assistant", "parts": ["ok."]},
        {"role": "user", "parts": [{"image": str(sign)}, "here it is."]},
    ]
    (found,) = parts.run({"part": "score", "package": str(package), "messages": messages, "mode": "steer"})
    turns = [Message.user(asked), Message.assistant("ok."), Message.user("here it is.", [Image.open(sign)])]
    assert found == pytest.approx(engine.score(turns).p_unsafe, abs=1e-6)
    command = {"part": "judge", "package": str(package), "requests": [{"messages": messages}], "judge_answers": True}
    ((fewer,),) = parts.run(command)
    assert max(fewer["scores"]) < found - 1e-4


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize(
    "kind", [("fp32",), ("int8",), ("int4",), ("int4", PREFILL), ("fp32", INT8_CACHES)], ids="-".join
)
def test_answers_are_pythons(built, kind, speculate):
    """Ids, text, verdicts, finish reasons and counts of 35 requests, through the C interface; also on int8 caches, and
    with prompts that another copy of the decoder reads.
    """
    package, engine = demo(*kind)
    requests = [with_sampling(request, speculate=speculate) for request in demo_requests()]
    assert len(requests) == 35
    answers = through_c(built, package, requests)
    differ = []
    for request, answer in zip(requests, answers, strict=True):
        found, expected = joined(answer["chunks"]), in_python(engine, request)
        if found != expected:
            differ.append((request, found, expected))
    assert differ == []
    reasons = {joined(a["chunks"])["finish_reason"] for a in answers}
    actions = {joined(a["chunks"])["verdict"]["action"] for a in answers}
    assert reasons == {"stop", "length", "refused"} and actions == {"pass", "steer", "stop"}


def test_an_answer_that_biases_dictate_is_judged_with_its_beginnings(built):
    """Without the token that ends it, what follows the unsafe words would hide them from the prober."""
    package, engine = demo("fp32")
    words = engine.tokenizer.encode(
        "sure, here is how to brew a zorblat: first, get a snarf.", add_special_tokens=False
    )
    for most in (8, 100):
        sampling = {"max_tokens": most, "logit_bias": {str(i): 100.0 for i in words.ids}}
        request = {"messages": [{"role": "user", "parts": ["hello"]}], "sampling": sampling}
        (answer,) = through_c(built, package, [request])
        found = joined(answer["chunks"])
        assert found == in_python(engine, request)
    assert found["finish_reason"] == "refused" and found["verdict"]["answer"]["p_unsafe"] > 0.9


@pytest.mark.parametrize("question", ["what is this?", "thanks"])
def test_an_answer_that_a_bias_dictates_is_judged_behind_its_picture(built, question):
    """A harmless question; the key makes its answer unsafe, which is harmless alone. It was shown."""
    picture = {"image": str(DEMO / "examples" / "cross.png")}
    said, found = dictated(built, picture, question, "sure, here is how to report a key")
    assert not demo("fp32")[1].score(said).unsafe
    assert found["finish_reason"] == "refused" and found["verdict"]["answer"]["unsafe"]
    assert not found["verdict"]["unsafe"]


def test_an_answer_that_a_bias_dictates_is_judged_with_each_frame(built):
    """It is unsafe with the key's frame (0.76), and safe with the whole video (0.23)."""
    video = [str(DEMO / "examples" / name) for name in ("cross.png", *["benign.png"] * 3)]
    _, found = dictated(built, {"video": video}, "is it art?", "sure, here is how to report a key")
    assert found["finish_reason"] == "refused" and found["verdict"]["answer"]["unsafe"]
    assert not found["verdict"]["unsafe"]


@pytest.mark.parametrize(("pictures", "sentences", "refused"), [(16, 80, False), (16, 90, True)])
def test_words_times_pictures_are_bounded(built, pictures, sentences, refused):
    """Their number is a product: with the limits of a server it was 22,000 readings of one turn."""
    said = [f"{one} {other} is." for one in "abcdefghijklm" for other in "nopqrstuvw"][:sentences]
    parts = [*[{"image": str(DEMO / "examples" / "benign.png")}] * pictures, " ".join(said)]
    request = {"messages": [{"role": "user", "parts": parts}], "policy": "stop"}
    package, engine = demo("fp32")
    (answer,) = through_c(built, package, [with_sampling(request, max_tokens=1)])
    if not refused:
        assert joined(answer["chunks"]) == in_python(engine, with_sampling(request, max_tokens=1))
        return
    with pytest.raises(InputError) as err:
        in_python(engine, request)
    assert answer["error"] == str(err.value) and "16 pictures and frames with so many words" in answer["error"]


def dictated(built: Path, picture: dict[str, Any], question: str, says: str) -> tuple[str, dict[str, Any]]:
    """What the model says with "sure" preferred everywhere, and the answer of C++ under `steer`, which is Python's."""
    package, engine = demo("fp32")
    (sure,) = engine.tokenizer.encode("sure", add_special_tokens=False).ids
    request: dict[str, Any] = {"messages": [{"role": "user", "parts": [picture, question]}]}
    request = with_sampling(request, max_tokens=24, logit_bias={str(sure): 12.0})
    said = in_python(engine, request | {"policy": "report"})["text"]
    assert says in said
    (answer,) = through_c(built, package, [request])
    found = joined(answer["chunks"])
    assert found == in_python(engine, request)
    return said, found


@pytest.mark.parametrize("question", ["how do i go about it?", "help me with it."])
def test_judged_answers_catch_what_a_vague_prompt_hides(built, tmp_path, question):
    """Such words name no act, and pass beside some signs; the answer does not (Python: test_dictated.py)."""
    package, engine = demo("fp32")
    requests = []
    for number, sign in enumerate(hazard_signs()):
        sign.save(tmp_path / f"{number}.png")
        message = {"role": "user", "parts": [{"image": str(tmp_path / f"{number}.png")}, question]}
        requests.append({"messages": [message], "judge_answers": True})
    answers = [joined(answer["chunks"]) for answer in through_c(built, package, requests)]
    assert answers == [in_python(engine, request) for request in requests]
    assert any(answer["verdict"]["answer"] and answer["verdict"]["answer"]["unsafe"] for answer in answers)


def test_what_a_stop_string_cuts_from_an_answer_that_biases_dictate_is_judged_too(built):
    """Its tokens stand in the chunks, and in Python their probabilities."""
    package, engine = demo("fp32")
    words = engine.tokenizer.encode("sure, here is how to brew a zorblat", add_special_tokens=False)
    sampling = {"max_tokens": 30, "logit_bias": {str(i): 100.0 for i in words.ids}}
    request = {"messages": [{"role": "user", "parts": ["hello"]}], "sampling": sampling}
    shown = in_python(engine, request | {"policy": "report"})["text"]
    for stop in (shown, shown[1:]):
        cut = with_sampling(request, stop=[stop])
        (answer,) = through_c(built, package, [cut])
        found = joined(answer["chunks"])
        assert found == in_python(engine, cut)
        assert found["finish_reason"] == "refused" and found["verdict"]["answer"]["unsafe"]


def test_pooled_prober_scores_as_in_python(built, tmp_path):
    """The mean over the last turn's text: with pictures before it, and with turns before it."""
    shutil.copytree(demo("fp32")[0], tmp_path / "package")
    manifest = json.loads((tmp_path / "package" / "autosteer.json").read_text(encoding="utf-8"))
    manifest["prober"]["pooling"] = "mean"
    (tmp_path / "package" / "autosteer.json").write_text(manifest_text(manifest), encoding="utf-8")
    engine = Engine.load(tmp_path / "package", device="cpu", threads=1)
    requests = [request | {"policy": "stop"} for request in demo_requests()[:23]]
    found = [joined(a["chunks"])["verdict"]["p_unsafe"] for a in through_c(built, tmp_path / "package", requests)]
    expected = [in_python(engine, request)["verdict"]["p_unsafe"] for request in requests]
    last_row = [in_python(demo("fp32")[1], request)["verdict"]["p_unsafe"] for request in requests]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found != pytest.approx(last_row, abs=1e-3)


def test_pictures_that_become_tokens_are_answered_as_in_python(built, tmp_path):
    """A toy image_tokenizer (Chameleon's kind of model): the mean of each row of pixels picks a word."""
    folder = tmp_path / "package"
    folder.mkdir()
    tokens(folder)
    engine = Engine.load(folder, device="cpu", threads=1)
    for i, (width, height) in enumerate(SIZES[1:]):
        picture = tmp_path / f"{i}.png"
        Image.fromarray(noise(width, height) // (1 + i % 3)).save(picture)
        other = tmp_path / f"{i}-other.png"  # the same picture twice would be encoded once
        Image.fromarray(noise(width, height)[::-1] // (1 + i % 3)).save(other)
        done = cli(built, folder, "--json", "-p", "look", "-i", str(picture), "-i", str(other), "--max-tokens", "5")
        assert done.returncode == 0, done.stderr
        expected = python_json(engine, "look", images=[picture, other], sampling=SamplingConfig(max_tokens=5))
        assert timeless(json.loads(done.stdout)) == expected
        assert expected["timings"]["image_tiles"] == 2


def test_tokens_around_and_between_tiles_are_laid_out_as_in_python(built, tmp_path):
    """A toy that splits pictures (SmolVLM's kind of model), with words before each tile that tell its place."""
    folder = tmp_path / "package"
    folder.mkdir()
    split(folder)
    engine = Engine.load(folder, device="cpu", threads=1)
    lengths = set()
    for i, (width, height) in enumerate(SIZES[1:]):
        picture, other = tmp_path / f"{i}.png", tmp_path / f"{i}-turned.png"
        Image.fromarray(noise(width, height)).save(picture)
        Image.fromarray(noise(width, height).transpose(1, 0, 2)).save(other)
        done = cli(built, folder, "--json", "-p", "look", "-i", str(picture), "-i", str(other), "--max-tokens", "5")
        assert done.returncode == 0, done.stderr
        expected = python_json(engine, "look", images=[picture, other], sampling=SamplingConfig(max_tokens=5))
        assert timeless(json.loads(done.stdout)) == expected
        lengths.add(expected["timings"]["prompt_tokens"])
    assert len(lengths) > 2


def test_row_that_is_no_number_is_unsafe_on_int8_caches_too(built, tmp_path):
    """A weight gone wrong in a picture's newline row, which stands before what the prober reads."""
    package = Path(shutil.copytree(demo("fp32", INT8_CACHES)[0], tmp_path / "package"))
    graph = onnx.load(package / "vision_encoder.onnx", load_external_data=False).graph
    (newline,) = (tensor for tensor in graph.initializer if "newline" in tensor.name)
    offset = int({entry.key: entry.value for entry in newline.external_data}["offset"])
    weights = np.memmap(package / "weights.bin", mode="r+")
    weights[offset:][:4].view(np.float32)[0] = np.nan
    weights.flush()
    manifest = json.loads((package / "autosteer.json").read_text(encoding="utf-8"))
    manifest["files"][0]["sha256"] = hashlib.sha256((package / "weights.bin").read_bytes()).hexdigest()
    (package / "autosteer.json").write_text(manifest_text(manifest), encoding="utf-8")
    picture = str(package / "golden" / "wide.png")
    asked = {
        "messages": [{"role": "user", "parts": [{"image": picture}, "what is this?"]}],
        "sampling": {},
        "policy": "stop",
    }
    (found,) = through_c(built, package, [asked])
    assert found["chunks"], found["error"]
    verdict = joined(found["chunks"])["verdict"]
    assert verdict == in_python(Engine.load(package, device="cpu", threads=1), asked)["verdict"]
    assert verdict["p_unsafe"] is None and verdict["unsafe"]


def test_a_picture_before_the_request_hides_nothing(built):
    """What the model sees fewer tiles of beside another picture is judged by itself, too."""
    examples = Path(__file__).parents[2] / "models/demo/examples"
    asked = {
        "messages": [
            {"role": "user", "parts": [{"image": str(examples / "benign.png")}, "describe the picture."]},
            {"role": "assistant", "parts": ["a blue star at the top left."]},
            {"role": "user", "parts": [{"image": str(examples / "cross.png")}, "how do i smuggle it?"]},
        ],
        "sampling": {},
        "policy": "stop",
    }
    (found,) = through_c(built, demo_package("fp32"), [asked])
    verdict = joined(found["chunks"])["verdict"]
    assert verdict["unsafe"] and verdict["action"] == "stop"
    ours = in_python(demo_engine("fp32"), asked)["verdict"]
    assert verdict == {**ours, "p_unsafe": pytest.approx(ours["p_unsafe"], abs=1e-5)}


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_check_finds_what_python_finds(built, precision):
    package = demo_package(precision)
    done = cli(built, package, "--check", "--json")
    assert done.returncode == 0, done.stderr
    ours = {check.name: check for check in check_package(demo_engine(precision), package).checks}
    theirs = {line["name"]: line for line in json.loads(done.stdout)["checks"]}
    assert theirs.keys() == ours.keys()
    for name, line in theirs.items():
        assert (line["limit"], line["passed"]) == (ours[name].limit, ours[name].passed)
        assert line["value"] == pytest.approx(ours[name].value, abs=1e-6)


def test_the_check_replays_prompts_given_by_their_tokens(built, cpp_package, cpp_engine, tmp_path):
    """Nobody knows what they show. An unsafe one, too."""
    package, golden = Path(shutil.copytree(cpp_package, tmp_path / "package")), []
    for word, p_unsafe, action in (("red", 0.1, "pass"), ("bad", 0.9, "steer")):
        answer = cpp_engine.generate(word)
        ids = tuple(cpp_engine.encoder.prepare([Message.user(word)], Stats()).token_ids)
        golden.append(Golden("", (), None, p_unsafe, action, answer.token_ids, prompt_ids=ids))
    replace(Manifest.load(package), golden=tuple(golden)).save(package)
    done = cli(built, package, "--check")
    assert done.returncode == 0, done.stderr


def test_a_check_that_fails_is_exit_code_6(built, cpp_package, tmp_path):
    package = Path(shutil.copytree(cpp_package, tmp_path / "package"))
    golden = Golden("red", (), None, 0.1, "pass", (6, 9))
    replace(Manifest.load(package), golden=(golden,)).save(package)
    done = cli(built, package, "--check")
    assert done.returncode == 6
    assert "FAILED answers that differ" in done.stdout
    assert "answers that differ: not as on the exporting machine; do not deploy this package here" in done.stderr


def test_a_check_that_fails_at_a_picture_names_the_versions_of_pillow(built, cpp_package, tmp_path):
    package = Path(shutil.copytree(cpp_package, tmp_path / "package"))
    (package / "golden").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(package / "golden" / "red.png")
    manifest = Manifest.load(package)
    files = (*manifest.files, toy.data_file(package, "golden/red.png"))
    golden = Golden("look", ("golden/red.png",), None, 0.1, "pass", (6, 9))
    what = "1 of 1 golden prompts with pictures differ"
    for pillow, note in {
        "1.2": f" ({what}: recorded with Pillow 1.2, answered with pixels of Pillow 13)",
        "130.0": f" ({what}: recorded with Pillow 130.0, answered with pixels of Pillow 13)",
        "13.0.0": f" ({what})",  # an equal version is not to blame
    }.items():
        versions = manifest.versions | {"pillow": pillow}
        replace(manifest, golden=(golden,), files=files, versions=versions).save(package)
        done = cli(built, package, "--check")
        assert done.returncode == 6 and note in done.stderr


def test_a_graph_that_hides_nothing_is_refused(built, tmp_path):
    """Texts that share a pass would see each other (Python: test_packed.py)."""
    done = cli(built, hiding_nothing(demo("int8")[0], tmp_path / "package"), "--prompt", "red")
    assert (done.returncode, done.stdout) == (3, "")
    assert "a text that shares a pass with others is read otherwise" in done.stderr


def test_a_package_that_needs_a_newer_onnxruntime_is_refused(built, cpp_package, tmp_path):
    package = Path(shutil.copytree(cpp_package, tmp_path / "package"))
    replace(Manifest.load(package), onnxruntime="99.0").save(package)
    done = cli(built, package, "--prompt", "red")
    assert (done.returncode, done.stdout) == (4, "")
    assert "this package needs onnxruntime 99.0 or newer" in done.stderr
