"""How the cases of tests/conformance/*.json are asked: of Python, and of C++ through autosteer-parts."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from conformance_packages import PICTURES, Packages, cases, shown
from cpp_runtime import as_message, as_sampling, in_python
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from autosteer.runtime import Conversation, Engine, GatePolicy
from autosteer.runtime.gate import Mode, decide, is_safe
from autosteer.runtime.image import at_most, prepare
from autosteer.runtime.manifest import ImageSpec
from autosteer.runtime.obfuscation import deobfuscated
from autosteer.runtime.picture_file import open_image
from autosteer.runtime.pieces import pieces
from autosteer.runtime.sampling import make_sampler
from autosteer.runtime.stats import Stats
from autosteer.runtime.strict_json import decode
from autosteer.runtime.text import Detokeniser, load_tokenizer
from autosteer.runtime.video import open_video

Case = dict[str, Any]


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


def words(rows: list[int | None]) -> str:
    """Token ids of the toy as its words; a picture's rows are *."""
    return " ".join("*" if row is None else toy.VOCABULARY[row] for row in rows)


def damage_in_python(case: Case, places: Places) -> Any:
    Engine.load(places.packages.of(case), device="cpu", **{"threads": 1, **case.get("options", {})})
    return {"loads": True}


def damage_in_cpp(case: Case, places: Places) -> Case:
    return {"part": "load", "package": str(places.packages.of(case)), "options": case.get("options", {})}


def rule_in_python(case: Case, places: Places) -> Any:
    return {"safe": is_safe(number(case["p_unsafe"]), number(case["threshold"]))}


def verdict_in_python(case: Case, places: Places) -> Any:
    policy = GatePolicy(
        *(Mode(case["mode"]), number(case["threshold"]), number(case["strength"]), "no"),
        judge_threshold=number(case.get("judge_threshold", 1.0)),
    )
    p_unsafe = None if case["p_unsafe"] is None else number(case["p_unsafe"])
    verdict = decide(p_unsafe, policy, split_layer=1)
    return {
        "unsafe": verdict.unsafe,
        "action": verdict.action.value,
        "strength": verdict.strength,
        "judged_above": verdict.judged_above,
    }


def verdict_in_cpp(case: Case, places: Places) -> Case:
    keys = ("p_unsafe", "mode", "threshold", "judge_threshold", "strength")
    return {"part": "gate", **{key: case[key] for key in keys if key in case}}


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
    """A case's picture; or a pipe, a file without content or a black picture, which Git does not keep."""
    if "special" not in case:
        return PICTURES / case["file"]
    path = places.file(case).with_suffix(".special")
    if case["special"] == "pipe" and not path.exists():
        os.mkfifo(path)
    if case["special"].endswith(" bytes"):
        path.touch()
        os.truncate(path, int(case["special"].removesuffix(" bytes")))
    if case["special"].endswith(" pixels"):
        width, height = map(int, case["special"].removesuffix(" pixels").split("x"))
        Image.new("1", (width, height)).save(path, "PNG")
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


def video_of(case: Case, places: Places) -> Path:
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
    """What `ffmpeg -i VIDEO FOLDER/%04d.png` makes of a case's video: SHA-256 of each frame's pixels -> its name."""
    if not isinstance(case["files"], dict):
        return {}
    folder = places.file(case).with_suffix(".frames")
    if not folder.exists():
        folder.mkdir()
        video = video_of(case, places)
        decode = ["ffmpeg", "-v", "error", "-i", video, "-fps_mode", "passthrough", folder / "%04d.png"]
        subprocess.run(decode, check=True)
    return {hashlib.sha256(open_image(file).tobytes()).hexdigest(): file.name for file in folder.iterdir()}


def video_in_python(case: Case, places: Places) -> Any:
    frames = open_video(video_of(case, places), case["frames"])
    known = frames_in_a_folder(case, places)
    digests = [f.name if isinstance(f, Path) else hashlib.sha256(np.asarray(f).tobytes()).hexdigest() for f in frames]
    found = {"chosen": [known.get(digest, digest) for digest in digests]}
    return found | ({"seconds": [round(s, 6) for s in frames.seconds]} if "seconds" in case["expected"] else {})


def video_in_cpp(case: Case, places: Places) -> Case:
    return {"part": "frames", "path": str(video_of(case, places)), "frames": case["frames"]}


def video_from_cpp(case: Case, places: Places, answer: Any) -> Any:
    known = frames_in_a_folder(case, places)
    found = {"chosen": [known.get(digest, digest) for digest in answer["chosen"]]}
    return found | ({"seconds": [round(s, 6) for s in answer["seconds"]]} if "seconds" in case["expected"] else {})


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
    "obfuscation": Theme(
        lambda case, _: {"plain": deobfuscated(case["text"])},
        lambda case, _: {"part": "deobfuscate", "texts": [case["text"]]},
        lambda _case, _places, a: {"plain": a[0]},
    ),
    "pieces": Theme(
        lambda case, _: {"pieces": pieces(case["text"])},
        lambda case, _: {"part": "cut", "texts": [case["text"]]},
        lambda _case, _places, a: {"pieces": a[0]},
    ),
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
