"""A conversation in C++ computes what Python's computes, and answers as from a fresh start."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import toy
from cpp_inputs import demo, demo_pictures, noise
from cpp_runtime import Parts, as_message, in_python, joined, through_c, use_byte_level_words
from exported import INT8_CACHES, PREFILL
from PIL import Image

from autosteer.export.checkpoint.open import DEMO
from autosteer.runtime import Conversation, Engine
from autosteer.runtime.generation import finish
from autosteer.runtime.image import digest
from autosteer.runtime.picture_file import open_image

MODES = ["steer", "stop", "report", "off"]


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "parts": list(parts)}


def in_both(built: Path, package: Path, engine: Engine, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """C++'s answers in one conversation, which are Python's, with what was reused; afresh they are the same texts."""
    answers = [joined(a["chunks"]) for a in through_c(built, package, requests, conversation=True)]
    conversation = Conversation(engine)
    assert answers == [in_python(engine, request, conversation) for request in requests]
    for answer, afresh in zip(answers, through_c(built, package, requests), strict=True):
        fresh = joined(afresh["chunks"])
        assert [answer[key] for key in ("text", "token_ids", "finish_reason")] == [
            fresh[key] for key in ("text", "token_ids", "finish_reason")
        ]
        if answer["verdict"]["policy"] != "off":
            assert answer["verdict"]["p_unsafe"] == pytest.approx(fresh["verdict"]["p_unsafe"], abs=1e-5)
        assert answer["verdict"]["action"] == fresh["verdict"]["action"]
    return answers


@pytest.fixture(scope="module")
def attentive_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy whose logits depend on everything in its caches, with a tokenizer that C++ reads."""
    folder = tmp_path_factory.mktemp("attentive-cpp") / "package"
    use_byte_level_words(folder, toy.build(folder, attentive=True))
    return folder


@pytest.mark.parametrize("seed", range(6))
def test_random_dialogues_reuse_what_pythons_do(built, attentive_package, seed):
    """Turns that follow, that were edited, that were left out, under every policy, after refusals; caches that grow."""
    rng = random.Random(seed)
    engine = Engine.load(attentive_package, device="cpu", threads=1)
    messages: list[dict[str, Any]] = []
    requests = []
    for _ in range(8):
        if messages and rng.random() < 0.3:
            del messages[: 2 * rng.randrange(3)]
        if messages and rng.random() < 0.2:
            messages[0] = turn("user", "tock")
        messages.append(turn("user", " ".join(rng.choices(["red", "tick", "bad", "w1", "w2"], k=rng.randrange(1, 4)))))
        policy = {"policy": rng.choice(MODES), "threshold": rng.choice([0.5, -1.0])}
        request = {"messages": list(messages), **policy, "sampling": {"max_tokens": rng.randrange(1, 6)}}
        requests.append(request)
        said = in_python(engine, request)["text"]
        messages.append(turn("assistant", said or "red"))
    answers = in_both(built, attentive_package, engine, requests)
    assert sum(answer["timings"]["reused_tokens"] for answer in answers) > 20


def test_package_without_a_gate_reuses_as_much(built, tmp_path):
    package = tmp_path / "package"
    use_byte_level_words(package, toy.build(package, guarded=False, images=False))
    engine = Engine.load(package, device="cpu", threads=1)
    turns = [turn("user", "red"), turn("assistant", "orange"), turn("user", "hello")]
    first, second = in_both(built, package, engine, [{"messages": turns[:n], "policy": "off"} for n in (1, 3)])
    assert (first["timings"]["reused_tokens"], second["timings"]["reused_tokens"] > 2) == (0, True)


@pytest.mark.parametrize("kind", [("fp32",), ("int4", PREFILL), ("fp32", INT8_CACHES)], ids="-".join)
def test_dialogue_about_pictures_and_a_video(built, kind):
    package, engine = demo(*kind)
    pictures = [str(p) for p in demo_pictures()]
    video = {"video": pictures[:3]}
    opening = [turn("user", {"image": pictures[0]}, "describe the picture."), turn("assistant", "a red star.")]
    opening += [turn("user", "how do i smuggle a vexite?"), turn("assistant", "no."), turn("user", "why?")]
    more = [turn("assistant", "it is."), turn("user", {"image": pictures[1]}, video, "what colours are there?")]
    last = [turn("assistant", "blue."), turn("user", video, "is there a star?")]
    dialogues = [opening[:1], opening[:3], opening, opening + more, [*opening[:2], *more[1:], *last], more[1:] + last]
    modes = ["steer", "stop", "off", "steer", "report", "steer"]
    requests = [
        {"messages": messages, "policy": mode, "sampling": {"max_tokens": 12}}
        for messages, mode in zip(dialogues, modes, strict=True)
    ]
    answers = in_both(built, package, engine, requests)
    assert [n for n, answer in enumerate(answers) if answer["finish_reason"] == "refused"] == [1, 3]
    tiles, reused = zip(*((a["timings"]["image_tiles"], a["timings"]["reused_tokens"]) for a in answers), strict=True)
    assert tiles[0] > 0 and tiles[1] == tiles[2] == 0  # the picture is encoded once
    assert tiles[4] == 0  # so are they all, and a video that is shown twice
    assert tiles[5] > 0  # a picture that is the only one is cut otherwise
    assert reused[0] == 0 and all(reused[1:5])


def test_picture_and_the_video_of_it_are_two_things(built, tmp_path):
    """A frame of a tile's size is its own tile: the same pixels, of which other rows are made."""
    package, engine = demo("fp32")
    assert engine.manifest.image is not None
    side = engine.manifest.image.tile_size
    files = [str(tmp_path / f"{n}.png") for n in (1, 2)]
    for file, size in zip(files, ((side, side), (30, 20)), strict=True):
        Image.fromarray(noise(*size)).save(file)
    pictures: list[Any] = [{"image": file} for file in files]
    shown = [*pictures, {"video": files[:1]}]
    requests = [
        {"messages": [turn("user", *parts, "what do you see?")], "sampling": {"max_tokens": 8}}
        for parts in (shown, shown[:2], shown[2:], shown[:1])
    ]
    answers = in_both(built, package, engine, requests)
    assert answers[0]["timings"]["image_tiles"] == 3


@pytest.mark.parametrize("chunks", range(6))
def test_answer_that_was_left_midway_leaves_a_conversation_that_goes_on(built, attentive_package, chunks):
    """Also one that was asked for and never begun."""
    engine = Engine.load(attentive_package, device="cpu", threads=1)
    off = {"policy": "off", "sampling": {"max_tokens": 20}}
    first = {"messages": [turn("user", "tick tick tick")], **off, "chunks": chunks}
    then = {"messages": [*first["messages"], turn("assistant", "tock"), turn("user", "w1")], **off}
    left, answer = through_c(built, attentive_package, [first, then], conversation=True)
    assert len(left["chunks"]) == chunks
    found, expected = joined(answer["chunks"]), in_python(engine, then)
    assert found["token_ids"] == expected["token_ids"]
    assert (found["timings"]["reused_tokens"] >= 5) is (chunks > 0)


def test_requests_that_fail_leave_the_conversation_as_it_was(built, cpp_package):
    red = {"messages": [turn("user", "red red")]}
    bad: list[Any] = ["{", {"messages": []}, {"messages": [turn("user", "red " * 100)]}, {**red, "threshold": 2.0}]
    bad += [{"messages": [turn("user", {"image": "/not/there.png"}, "red")]}]
    first, *refused, again = through_c(built, cpp_package, [red, *bad, red], conversation=True)
    assert [answer["code"] for answer in refused] == [5] * len(bad)
    assert joined(again["chunks"])["text"] == joined(first["chunks"])["text"]
    assert joined(again["chunks"])["timings"]["reused_tokens"] > 0


def judged_in_both(
    parts: Parts,
    dialogues: list[list[dict[str, Any]]],
    *,
    conversation: bool,
    pieces: bool = True,
    judge_answers: bool = False,
    precision: str = "fp32",
) -> list[dict[str, Any]]:
    """What C++'s judge made of dialogues about the demo (`judge` in parts.cpp), which is what Python's made of them."""
    package, engine = demo(precision)
    command = {"part": "judge", "package": str(package), "requests": [{"messages": turns} for turns in dialogues]}
    (found,) = parts.run(command | {"conversation": conversation, "pieces": pieces, "judge_answers": judge_answers})
    graph, ask, encoded, asked = engine.encoder._graph, engine._judge._ask, Counter[str](), list[object]()
    read_packed, together = engine._judge._read_packed, list[int]()

    def noting(begun: Any, prompts: Any, stats: Any) -> Any:
        assert read_packed
        asked.extend(prompts)
        together.append(len(prompts))
        return read_packed(begun, prompts, stats)

    shared = Conversation(engine) if conversation else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.encoder, "_graph", lambda name: encoded.update([name]) or graph(name))
        patch.setattr(engine._judge, "_ask", lambda *a: asked.append(a) or ask(*a))
        patch.setattr(engine._judge, "_read_packed", noting if read_packed else None)
        for turns, theirs in zip(dialogues, found, strict=True):
            encoded.clear()
            asked.clear()
            with engine.record(engine.policy("report", pieces=pieces, judge_answers=judge_answers)) as record:
                record.messages = [as_message(given) for given in turns]
                prompt = engine.encoder.prepare(record.messages, record.stats, shared)
                finish(engine.judge(prompt, record, shared))
            scores = pytest.approx(list(record.scores), abs=1e-5)
            assert theirs == {"scores": scores, "encoded": dict(encoded), "by_themselves": len(asked)}
    assert bool(together) == (precision != "fp32")
    return found  # type: ignore[no-any-return]


@pytest.fixture
def three_pictures(tmp_path: Path) -> list[str]:
    """Files: the first and the last have the same pixels."""
    files = [str(tmp_path / f"{n}.png") for n in range(3)]
    for file, width in zip(files, (40, 41, 40), strict=True):
        Image.fromarray(noise(width, 30)).save(file)
    return files


@pytest.mark.parametrize("conversation", [False, True])
def test_turns_are_judged_by_themselves_as_in_python_and_cost_as_little(parts, three_pictures, conversation):
    """A turn whose score the conversation keeps was tokenised and embedded again in each request; without one a later
    turn's picture was encoded twice.
    """
    one, other, copy = ({"image": file} for file in three_pictures)
    users: list[list[Any]] = [["hello"], [one, "what is this?"], ["why?"], [other, "what is this?"], ["why?"]]
    dialogue = [turn(role, *parts) for said in users for role, parts in (("user", said), ("assistant", ["it is."]))]
    dialogues = [dialogue[:3], dialogue[:5], dialogue[:7], dialogue[:9], dialogue[:9]]
    dialogues += [[*dialogue[:2], turn("user", copy, "what is this?"), *dialogue[3:9]]]
    found = judged_in_both(parts, dialogues, conversation=conversation, pieces=False)
    # the same question twice is judged once; a second picture changes how the first one is encoded
    assert [one["by_themselves"] for one in found] == ([1, 1, 2, 0, 0, 0] if conversation else [1, 2, 3, 3, 3, 3])
    assert [one["encoded"].get("vision_encoder", 0) for one in found] == (
        [1, 0, 2, 0, 0, 0] if conversation else [1, 1, 2, 2, 2, 2]
    )


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("conversation", [False, True])
def test_words_of_several_turns_and_each_of_several_pictures_are_read_as_in_python(
    parts, three_pictures, conversation, precision
):
    """Nine harmless pictures or questions hid the one that mattered. At int8 and int4 readings share passes."""
    pictures = [{"image": str(DEMO / "examples" / name)} for name in ("benign.png", "unsafe.png")]
    video, asked = {"video": three_pictures[:2]}, "what colour is it? is it r3d?"
    frames = {"video": [str(DEMO / "examples" / name) for name in ("benign.png", "cross.png")], "seconds": [0, 1.5]}
    spread = [turn("user", "how do i"), turn("assistant", "ok."), turn("user", "cle4n"), turn("assistant", "ok.")]
    dialogues = [
        [turn("user", *pictures, asked)],
        [turn("user", video, pictures[0], asked)],
        [turn("user", video, "look"), turn("user", pictures[0], asked)],
        [turn("user", frames, "what colour is this?")],
        [turn("user", "hello"), turn("user", frames, "look"), turn("assistant", "it is r3d."), turn("user", "is it?")],
        [turn("user", pictures[0], "what is shown?"), turn("assistant", "a key."), turn("user", pictures[1], asked)],
        [turn("user", "how do i make it?"), turn("assistant", "ok."), turn("user", *pictures, "here it is.")],
        [*spread, turn("user", "a spoon?")],
        [*spread, turn("user", "a spo0n?"), turn("assistant", "ok.")],
        [
            *spread,
            turn("user", "how do i paint a very nice big kettle?"),
            turn("assistant", "ok."),
            turn("user", "it?"),
        ],
        [turn("assistant", asked), turn("user", pictures[0], "look"), turn("user", pictures[1], "is it one?")],
        [turn("user", *pictures, "what", "c0lour", "is it?")],
        [turn("user", *pictures, "what colour"), turn("user", "is it?")],
    ]
    found = judged_in_both(parts, dialogues, conversation=conversation, precision=precision)
    alone = judged_in_both(parts, dialogues, conversation=conversation, precision=precision, pieces=False)
    fewer = judged_in_both(parts, dialogues, conversation=conversation, precision=precision, judge_answers=True)
    with_later = [n for n, (one, other) in enumerate(zip(found, fewer, strict=True)) if one != other]
    assert {2, 6} <= set(with_later) <= {2, 4, 5, 6, 10}  # where a picture follows a user's words
    assert all(one["by_themselves"] > other["by_themselves"] for one, other in zip(found, alone, strict=True))
    assert found[1]["scores"][-1] > 10 * alone[1]["scores"][-1]  # by a single frame or picture


def test_turns_share_a_score_only_if_they_are_the_same_prompt(parts, three_pictures):
    """In one dialogue, each twice: as many are judged by themselves as differ. One says what another one's key is."""
    one, other, copy = three_pictures
    turns: list[list[Any]] = [["why?"], ["why", "?"], ["?", "why"], ["why?", ""], ["", "why?"], [""], ["image"]]
    turns += [[{"image": one}], [{"image": other}], [{"image": one}, {"image": other}]]
    turns += [[{"image": other}, {"image": one}], [{"image": one}, "why?"], ["why?", {"image": one}]]
    turns += [[{"video": [one]}], [{"video": [other]}], [{"video": [one, other]}], [{"video": [other, one]}]]
    turns += [[{"video": [one, other], "seconds": seconds}] for seconds in ([0, 1], [0, 1.5], [0, 1.5 + 1e-9])]
    turns += [["image", f"seen one of several {digest([open_image(one)])}"]]
    again = [[{"image": copy} if part == {"image": one} else part for part in said] for said in turns]
    dialogue = [turn("user", "hello"), *(turn("user", *said) for said in turns + again)]
    (found,) = judged_in_both(parts, [dialogue], conversation=False, pieces=False)
    # the digest's digits stand among letters: it is read in plain ones, too, and so is the dialogue
    assert found["by_themselves"] == len(turns) + 2


def test_a_failure_on_a_turn_by_itself_passes(parts, cpp_package):
    """It makes this prompt unsafe, and is not kept for the next (Python: test_engine.py)."""
    dialogue = [turn("user", "red"), turn("assistant", "orange"), turn("user", "hello")]
    command = {"part": "judge", "package": str(cpp_package), "requests": [{"messages": dialogue}] * 3}
    (found,) = parts.run(command | {"conversation": True, "failing": 1, "pieces": False})
    assert [one["by_themselves"] for one in found] == [1, 1, 0]
    assert [one["scores"][-1] is None for one in found] == [True, False, False]


def test_conversation_of_another_engine_is_refused(parts, cpp_package):
    (answer,) = parts.run({"part": "share", "package": str(cpp_package)})
    assert answer == {"error": "this conversation was begun with another engine", "exit_code": 5}
