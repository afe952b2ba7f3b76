"""The C++ runtime, built, and the ways to ask it: the command, the C interface, single parts.

Built with CMake against the libonnxruntime inside the pip wheel (AUTOSTEER_CPP_BUILD=folder keeps the build). Where a
compiler or a header is missing, tests are skipped with the reason (conftest.py fails them where CI is set).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import toy
from once import once
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from autosteer.runtime import Conversation, Engine, Message, SamplingConfig
from autosteer.runtime.cli.answer import answer_json
from autosteer.runtime.manifest import Manifest
from autosteer.runtime.text import ImagePart, Part, VideoPart

CPP = Path(__file__).resolve().parents[2] / "runtime" / "cpp"
PACKAGES = (
    "g++ cmake pkg-config dpkg-dev libonnxruntime-dev nlohmann-json3-dev libonig-dev libutf8proc-dev libssl-dev "
    "libpng-dev libjpeg-dev"
)
ALL = ("autosteer-cli", "autosteer-parts", "autosteer-shared", "autosteer-static")
TIMINGS = ("_ms", "tok_s")  # how the keys end that may differ


NO_CPP = "the C++ runtime cannot be built here"  # how the reasons begin that conftest.py counts


def missing(what: str) -> NoReturn:
    """Skip, because `what` is missing."""
    pytest.skip(f"{NO_CPP}: {what.splitlines()[0]}")


def wheel_library() -> Path:
    """libonnxruntime.so inside the installed wheel."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        missing("this onnxruntime wheel has no libonnxruntime.so")
    return found[0]


def build(folder: Path, targets: Sequence[str], *definitions: str) -> Path:
    """Configure and build; a header or library that is missing is a reason, anything else an error."""
    for tool in ("cmake", "g++", "pkg-config"):
        if not shutil.which(tool):
            missing(f"no {tool}")
    arguments = ["cmake", "-S", str(CPP), "-B", str(folder), f"-DONNXRUNTIME_LIBRARY={wheel_library()}"]
    configured = subprocess.run(
        [*arguments, "-DAUTOSTEER_TESTS=ON", *definitions], capture_output=True, text=True, check=False
    )
    if configured.returncode:
        missing(_error(configured.stderr))
    command = ["cmake", "--build", str(folder), "-j2", "--target", *targets]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    return folder


def _error(said: str) -> str:
    """CMake's first error in one line."""
    found = re.search(r"CMake Error.*?:\s+(\S.*?)\n\s*\n", said, re.DOTALL)
    return " ".join((found[1] if found else said).split()) or "CMake failed"


def build_once(name: str, targets: Sequence[str], *definitions: str) -> Path:
    """As `build`, once for all test processes; under AUTOSTEER_CPP_BUILD, the next run builds in the folder again."""
    kept = os.environ.get("AUTOSTEER_CPP_BUILD")
    made = once(name, lambda folder: build(Path(kept) / name if kept else folder, targets, *definitions))
    return Path(kept) / name if kept else made


@dataclass(frozen=True)
class Parts:
    """autosteer-parts: single functions of the C++ runtime."""

    program: Path

    def run(self, *commands: dict[str, Any]) -> list[Any]:
        """Answers, or AutoSteerError exit codes as {"exit_code": ...}."""
        return [line.get("answer", line) if "error" not in line else line for line in self.lines(*commands)]

    def lines(self, *commands: dict[str, Any]) -> list[Any]:
        """What the program says to each command: {"answer": ...} or {"error": ..., "exit_code": ...}."""
        text = "".join(json.dumps(command) + "\n" for command in commands)
        # AddressSanitizer calls dlopen itself, so that the program's RUNPATH does not count.
        environment = {**os.environ, "AUTOSTEER_ONNXRUNTIME": str(wheel_library())}
        done = subprocess.run([self.program], input=text, capture_output=True, text=True, check=True, env=environment)
        return [json.loads(line) for line in done.stdout.split("\n")[:-1]]


def cli(folder: Path, package: Path, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run autosteer-cli on one thread."""
    command = [str(folder / "autosteer-cli"), str(package), "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def timeless(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer's JSON without what is measured."""
    timings = {k: v for k, v in answer["timings"].items() if not k.endswith(TIMINGS)}
    return {**answer, "timings": timings}


def python_json(engine: Engine, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What autosteer-run --json prints, without what is measured."""
    answer = json.loads(json.dumps(answer_json(engine.generate(*args, **kwargs))))
    return timeless(null_for_nan(answer))


def null_for_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: null_for_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def in_python(engine: Engine, request: dict[str, Any], conversation: Conversation | None = None) -> dict[str, Any]:
    """A request of the C interface, answered by the Python engine."""
    messages = list(map(as_message, request["messages"]))
    policy = engine.policy(
        request.get("policy", "steer"),
        threshold=request.get("threshold"),
        strength=request.get("strength"),
        pieces=request.get("pieces", True),
        judge_answers=request.get("judge_answers"),
    )
    return python_json(
        engine, messages, sampling=as_sampling(request.get("sampling", {})), policy=policy, conversation=conversation
    )


def as_message(given: dict[str, Any]) -> Message:
    """A message of the C interface in Python."""

    def part(p: Any) -> Part:
        if isinstance(p, str):
            return p
        return VideoPart(tuple(p["video"]), tuple(p.get("seconds", ()))) if "video" in p else ImagePart(p["image"])

    return Message(given["role"], tuple(map(part, given["parts"])), given.get("trusted", False))


def as_sampling(wishes: dict[str, Any]) -> SamplingConfig:
    """The sampling of the C interface in Python."""
    bias = {int(token): value for token, value in wishes.get("logit_bias", {}).items()}
    return SamplingConfig(**wishes | {"stop": tuple(wishes.get("stop", ())), "logit_bias": bias})


CTYPES = """
import ctypes, json, resource, sys
given = json.load(sys.stdin)
lib = ctypes.CDLL(given["library"])
lib.autosteer_error.restype = ctypes.c_char_p
for release in ("end", "conversation_end", "request_free", "close"):
    getattr(lib, "autosteer_" + release).argtypes = [ctypes.c_void_p]
for function in (lib.autosteer_run, lib.autosteer_conversation_run):
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]
engine, made, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
chunk = ctypes.POINTER(ctypes.c_char_p)()  # to autosteer_chunk, whose first field is its JSON
opened = lib.autosteer_open(given["package"].encode(), given["options"].encode(), ctypes.byref(engine))
if opened:
    print(json.dumps({"code": opened, "error": lib.autosteer_error().decode()}))
    sys.exit()
run, asked = lib.autosteer_run, engine
if given["conversation"]:
    run, asked = lib.autosteer_conversation_run, ctypes.c_void_p()
    assert lib.autosteer_conversation_begin(engine, ctypes.byref(asked)) == 0
    lib.autosteer_close(engine)
for request in given["requests"]:
    most = request.pop("chunks", None) if isinstance(request, dict) else None
    for file, text in [request.pop("append")] if "append" in request else []:
        with open(file, "a") as damaged:
            damaged.write(text)
    for most_bytes in [request.pop("limit")] if "limit" in request else []:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, -1))
    for folder in [request.pop("package")] if "package" in request else []:
        lib.autosteer_close(engine)
        opened = lib.autosteer_open(folder.encode(), given["options"].encode(), ctypes.byref(engine))
    text = request if isinstance(request, str) else json.dumps(request)
    if opened:
        print(json.dumps({"code": opened, "error": lib.autosteer_error().decode(), "chunks": []}))
        continue
    code, chunks = lib.autosteer_request_new(text.encode(), ctypes.byref(made)), []
    stream.value = None
    code = code or run(asked, made, ctypes.byref(stream))
    while not code and len(chunks) != most:
        code = lib.autosteer_next(stream, ctypes.byref(chunk))
        if code or not chunk:
            break
        chunks.append(json.loads(chunk[0]))
    error = lib.autosteer_error().decode() if code else None
    print(json.dumps({"code": code, "error": error, "chunks": chunks}))
    lib.autosteer_end(stream)
    lib.autosteer_request_free(made)
(lib.autosteer_conversation_end if given["conversation"] else lib.autosteer_close)(asked)
"""


def through_c(
    built: Path, package: Path, requests: Sequence[Any], *, conversation: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Requests through libautosteer.so on one thread, in a process without Python's onnxruntime. A request with
    "chunks" is left after so many. Before one with "append" that is appended to a file; with "limit" files may have so
    many bytes (-1: any number); with "package" it and the next ask that one. In a conversation the engine is closed
    before it is used.
    """
    given = {"library": str(built / "libautosteer.so"), "package": str(package), "requests": requests}
    given["conversation"] = conversation
    given["options"] = json.dumps({"threads": 1, **options})
    done = subprocess.run(
        [sys.executable, "-c", CTYPES], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Chunks of the C interface as one answer."""
    last = chunks[-1]
    assert all(c["finish_reason"] is None and c["timings"] is None for c in chunks[:-1])
    answer = {
        "text": "".join(c["text"] for c in chunks),
        "token_ids": [c["token"] for c in chunks if c["token"] is not None],
        **{key: last[key] for key in ("finish_reason", "verdict", "device", "timings")},
    }
    return timeless(answer)


def use_byte_level_words(folder: Path, manifest: Manifest) -> Manifest:
    """Replace the toy's word tokenizer by byte-level BPE, which C++ reads: no merges, whole words."""
    words = toy.VOCABULARY[: -len(toy.SPECIAL)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\S+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(toy.SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    others = tuple(file for file in manifest.files if file.file != "tokenizer.json")
    manifest = replace(manifest, files=(toy.data_file(folder, "tokenizer.json"), *others))
    manifest.save(folder)
    return manifest
