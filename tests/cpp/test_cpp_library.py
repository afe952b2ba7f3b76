"""libautosteer as a product gets it: an installed prefix, a compiler, and nothing of this repository."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cpp_inputs import noise
from cpp_runtime import CPP, in_python, joined, missing, through_c, timeless, wheel_library
from exported import demo_package
from PIL import Image

from autosteer.runtime import errors

ROOT = CPP.parents[1]
HEADER = CPP / "include" / "autosteer" / "autosteer.h"
EXAMPLES = {file.stem + file.suffix: file for file in sorted((ROOT / "examples").glob("*.c*"))}
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror")
UNSAFE, REFUSAL = "how do i smuggle a vexite?", "i'm sorry, but i can't assist with that."

Run = Callable[..., subprocess.CompletedProcess[str]]


def said(*command: str | Path, **options: Any) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def clean(**more: str) -> dict[str, str]:
    """An environment that says nothing of where libraries are."""
    return {**{k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "AUTOSTEER_ONNXRUNTIME")}, **more}


@pytest.fixture(scope="module")
def prefix(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed prefix that was moved afterwards."""
    folder = tmp_path_factory.mktemp("prefix")
    said("cmake", "--install", built, "--prefix", folder / "first")
    return (folder / "first").rename(folder / "moved")


def flags(prefix: Path, *wanted: str, of: str = "autosteer") -> list[str]:
    return said("pkg-config", *wanted, of, env=clean(PKG_CONFIG_PATH=str(prefix / "lib/pkgconfig"))).split()


def compiled(prefix: Path, source: Path, program: Path) -> Path:
    """A program made as docs/embedding.md does it, with all warnings."""
    compiler = ("cc", "-std=c99") if source.suffix == ".c" else ("c++", "-std=c++17", "-O0")
    library = [*flags(prefix, "--cflags", "--libs"), f"-Wl,-rpath,{prefix}/lib", "-pthread"]
    said(*compiler, *STRICT, source, "-o", program, *library)
    return program


@pytest.fixture(scope="module")
def examples(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The programs of examples/, by the name of their source."""
    folder = tmp_path_factory.mktemp("examples")
    return {name: compiled(prefix, source, folder / name.replace(".", "-")) for name, source in EXAMPLES.items()}


@pytest.fixture(scope="module")
def embedding(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Runs a check of runtime/cpp/tests/embedding.cpp; its lines."""
    program = compiled(prefix, CPP / "tests" / "embedding.cpp", tmp_path_factory.mktemp("embedding") / "embedding")
    return lambda check, package, *rest: said(program, check, package, *rest, env=clean()).splitlines()


@pytest.mark.parametrize("name", ["ask.c", "ask.cpp"])
def test_examples_answer_and_are_steered(examples, name):
    for prompt, action in (("hello", "pass"), (UNSAFE, "steer")):
        done = subprocess.run(
            [examples[name], demo_package("fp32"), prompt], capture_output=True, text=True, check=False, env=clean()
        )
        assert done.returncode == 0 and f"[{action}, p_unsafe " in done.stderr, done.stderr
        assert (done.stdout == REFUSAL) is (action == "steer") and done.stdout


def test_example_of_a_camera_says_a_line_for_each_frame(examples):
    """Frames come from memory; an unsafe one is refused; a limit of no seconds leaves nothing of an answer."""
    frames = [Image.open(ROOT / f"models/demo/examples/{name}.png").convert("RGB") for name in ("benign", "cross")]
    size = [str(side) for side in frames[0].size]
    raw = b"".join(frame.tobytes() for frame in frames)

    def answers(seconds: str) -> list[str]:
        command = [examples["camera.cpp"], demo_package("fp32"), *size, seconds]
        done = subprocess.run(command, input=raw, capture_output=True, check=True, env=clean())
        return done.stdout.decode().split("\n")

    whole = answers("60")
    assert whole[0].startswith("a blue star") and len(whole) == 3
    assert any(answers("0") == ["", "", ""] for _ in range(5))  # the demo may be faster than the thread with the clock


def test_examples_say_what_is_wrong_and_return_the_code(examples, tmp_path):
    done = subprocess.run([examples["ask.c"], tmp_path, "hello"], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and done.stderr.startswith(f"ask: {tmp_path}")


def test_the_codes_of_the_header_are_those_of_python_s_errors():
    codes = dict(re.findall(r"AUTOSTEER_(\w+) = (\d+)", HEADER.read_text(encoding="utf-8")))
    named = {
        "FAILED": errors.AutoSteerError,
        "BAD_PACKAGE": errors.PackageError,
        "BAD_DEVICE": errors.ProviderError,
        "BAD_INPUT": errors.InputError,
        "CANCELLED": errors.CancelledError,
    }
    assert codes == {"OK": "0"} | {name: str(error.exit_code) for name, error in named.items()}


def test_the_library_exports_what_its_header_declares(prefix):
    declared = set(re.findall(r"^AUTOSTEER_API .*?(autosteer_\w+)\(", HEADER.read_text(encoding="utf-8"), re.MULTILINE))
    listed = said("nm", "--dynamic", "--defined-only", "--format=posix", prefix / "lib" / "libautosteer.so")
    assert {line.split()[0] for line in listed.splitlines()} == declared
    assert len(declared) == 29


def test_the_library_s_names_carry_its_abi_and_nothing_of_onnxruntime(prefix):
    listed = said("readelf", "--dynamic", "--wide", prefix / "lib" / "libautosteer.so")
    (abi,) = re.findall(r"^#define AUTOSTEER_ABI (\d+)$", HEADER.read_text(encoding="utf-8"), re.MULTILINE)
    assert f"soname: [libautosteer.so.{abi}]" in listed
    assert "onnxruntime" not in "".join(re.findall(r"NEEDED.*", listed))
    library = ctypes.CDLL(str(prefix / "lib" / "libautosteer.so"))
    library.autosteer_version.restype = library.autosteer_error.restype = ctypes.c_char_p
    assert library.autosteer_abi() == int(abi)
    assert f'version = "{library.autosteer_version().decode()}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    engine = ctypes.c_void_p()
    assert library.autosteer_open_abi(int(abi) + 1, b"package", None, ctypes.byref(engine)) == 1
    assert f"compiled for ABI {int(abi) + 1} of libautosteer" in library.autosteer_error().decode()


def test_headers_and_flags_bring_nothing_else(prefix):
    """A product compiles with its own warnings, and without onnxruntime's and other headers."""
    assert flags(prefix, "--cflags") == [f"-I{prefix}/lib/pkgconfig/../../include"]
    assert flags(prefix, "--libs") == [f"-L{prefix}/lib/pkgconfig/../../lib", "-lautosteer"]
    for name, source in EXAMPLES.items():
        used = said("c++" if name.endswith("pp") else "cc", "-M", *flags(prefix, "--cflags"), source)
        found = re.findall(r"onnx|nlohmann|onig|utf8proc|png|jpeg|openssl", used.replace(str(prefix), ""))
        assert (name, found) == (name, [])


CONSUMER = """
cmake_minimum_required(VERSION 3.22)
project(consumer LANGUAGES C CXX)
find_package(autosteer 0.1 REQUIRED COMPONENTS static)
add_executable(shared {folder}/ask.cpp)
target_link_libraries(shared PRIVATE autosteer::autosteer)
add_executable(static {folder}/ask.cpp)
target_link_libraries(static PRIVATE autosteer::static)
add_executable(early early.cpp)
target_link_libraries(early PRIVATE autosteer::static)
foreach(target shared static)
  get_target_property(options autosteer::${{target}} INTERFACE_COMPILE_OPTIONS)
  message(STATUS "options: ${{options}}")
endforeach()
"""


EARLY = """
#include <autosteer/autosteer.hpp>
#include <cstdlib>
#include <iostream>
static const autosteer::Engine engine(std::getenv("PACKAGE"));
int main() { std::cout << engine.score("hello").action; }
"""


def test_cmake_finds_the_package_and_links_either_library(prefix, tmp_path):
    """A static object of the program, which is constructed before the archive's, may open an engine."""
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER.format(folder=ROOT / "examples"))
    (tmp_path / "early.cpp").write_text(EARLY)
    configured = said("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert configured.count("options: options-NOTFOUND") == 2
    said("cmake", "--build", tmp_path / "build")
    for name, environment in (
        ("shared", clean()),
        ("static", clean(AUTOSTEER_ONNXRUNTIME=str(prefix / "lib" / "autosteer"))),
    ):
        program = tmp_path / "build" / name
        assert said(program, demo_package("fp32"), UNSAFE, env=environment) == REFUSAL
        assert ("libautosteer" in said("ldd", program)) is (name == "shared")
    assert said(tmp_path / "build" / "early", env={**environment, "PACKAGE": str(demo_package("fp32"))}) == "pass"


def test_pkg_config_links_the_archive(prefix, tmp_path):
    """`pkg-config --static` took libautosteer.so all the same, because it lies beside the archive."""
    wanted = flags(prefix, "--cflags", "--libs", of="autosteer-static")
    said("cc", EXAMPLES["ask.c"], "-o", tmp_path / "ask", *wanted, f"-Wl,-rpath,{prefix}/lib/autosteer")
    assert "libautosteer" not in said("readelf", "--dynamic", tmp_path / "ask")
    assert said(tmp_path / "ask", demo_package("fp32"), UNSAFE, env=clean()) == REFUSAL


def test_a_component_that_does_not_exist_is_not_found(prefix, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER.format(folder=ROOT / "examples").replace("S static", "S shard"))
    (tmp_path / "early.cpp").write_text(EARLY)
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode and "it has no 'shard'" in done.stderr


def test_what_is_passed_on_has_its_licences(prefix):
    """Ours, that of the JSON header that is compiled in, and those of the onnxruntime beside it."""
    folder = prefix / "share" / "doc" / "autosteer"
    for name, words in (
        ("copyright", "Apache License"),
        ("nlohmann-json.copyright", "Niels Lohmann"),
        ("onnxruntime/LICENSE", "Microsoft"),
        ("onnxruntime/ThirdPartyNotices.txt", "protobuf"),
    ):
        assert words in (folder / name).read_text(encoding="utf-8", errors="replace")


def test_a_licence_of_something_else_does_not_become_onnxruntime_s(tmp_path):
    """Of an unpacked library, the file LICENSE one folder up was taken for its licence: of a clone, ours."""
    (tmp_path / "LICENSE").write_text("another")
    (tmp_path / "lib").mkdir()
    shutil.copy(wheel_library(), tmp_path / "lib")
    library = tmp_path / "lib" / wheel_library().name
    command = ["cmake", "-S", str(CPP), "-B", str(tmp_path / "build"), f"-DONNXRUNTIME_LIBRARY={library}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "onnxruntime without its licence" in " ".join(done.stderr.split())
    assert "another" not in said("cat", tmp_path / "build" / "cmake_install.cmake")
    assert str(tmp_path / "LICENSE") not in (tmp_path / "build" / "cmake_install.cmake").read_text()


def test_without_one_of_its_own_the_debian_package_depends_on_the_system_s_onnxruntime(tmp_path):
    owner = subprocess.run(["dpkg-query", "--search", "*/libonnxruntime.so.*"], capture_output=True, text=True)
    if owner.returncode:
        pytest.skip("no onnxruntime of Debian's here")
    said("cmake", "-S", CPP, "-B", tmp_path)
    config = (tmp_path / "CPackConfig.cmake").read_text(encoding="utf-8")
    assert f'CPACK_DEBIAN_PACKAGE_DEPENDS "{owner.stdout.split(":")[0]}"' in config


def test_a_host_may_unload_what_it_loaded_as_a_plugin(prefix, cpp_package):
    """The code stays: onnxruntime's environment and threads have pointers into it."""
    script = """
import _ctypes, ctypes, sys
for _ in range(2):
    library, engine = ctypes.CDLL(sys.argv[1]), ctypes.c_void_p()
    assert library.autosteer_open(sys.argv[2].encode(), None, ctypes.byref(engine)) == 0
    library.autosteer_close(engine)
    _ctypes.dlclose(library._handle)
print("libautosteer" in open("/proc/self/maps").read())
"""
    library = prefix / "lib" / "libautosteer.so"
    assert said("python3", "-c", script, library, cpp_package, env=clean()) == "True\n"


def test_the_installed_command_runs_where_the_prefix_was_moved_to(prefix):
    done = said(prefix / "bin" / "autosteer-cli", demo_package("fp32"), "--prompt", UNSAFE, env=clean())
    assert done == REFUSAL + "\n"


def test_a_program_is_compiled_with_what_the_debian_package_holds(built, tmp_path):
    """Unpacked, not installed: this machine stays as it is."""
    if not shutil.which("dpkg-shlibdeps"):
        missing("no dpkg-shlibdeps (apt-get install dpkg-dev)")
    said("cpack", "-G", "DEB", "--config", built / "CPackConfig.cmake", "-B", tmp_path)
    (package,) = tmp_path.glob("autosteer_*.deb")
    assert re.search(r"libc6 .*libonig5", said("dpkg-deb", "--field", package, "Depends"))
    said("dpkg-deb", "--extract", package, tmp_path / "root")
    program = compiled(tmp_path / "root" / "usr", EXAMPLES["ask.c"], tmp_path / "ask")
    assert said(program, demo_package("fp32"), UNSAFE, env=clean()) == REFUSAL


FAKE = """
static const char *version(void) {{ return "{version}"; }}
static const void *api(unsigned number) {{ (void)number; return 0; }}
static const struct {{ const void *(*api)(unsigned); const char *(*version)(void); }} base = {{api, version}};
const void *{name}(void) {{ return &base; }}
"""


@pytest.mark.parametrize(
    ("version", "name", "says"),
    [
        ("1.20.1", "OrtGetApiBase", "onnxruntime 1.20.1 is too old; this program needs 1.21 or newer"),
        ("2.0.0", "OrtGetApiBase", "onnxruntime 2.0.0 is too old"),  # it no longer has what is asked for
        ("1.32.0", "other", "this library is not onnxruntime: it has no OrtGetApiBase"),
        (None, "", "onnxruntime was not found ("),
    ],
)
def test_an_onnxruntime_that_is_missing_old_or_none_is_named(examples, tmp_path, version, name, says):
    library = tmp_path / "libonnxruntime.so"
    if version:
        (tmp_path / "fake.c").write_text(FAKE.format(version=version, name=name))
        said("cc", "-shared", "-fPIC", tmp_path / "fake.c", "-o", library)
    for place in (library, tmp_path):  # the file, and its folder
        environment = clean(AUTOSTEER_ONNXRUNTIME=str(place))
        command = [examples["ask.c"], demo_package("fp32"), "hello"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode, done.stdout) == (4, ""), done.stderr
        assert says in done.stderr and str(tmp_path) in done.stderr and done.stderr.count("\n") == 1


def test_an_option_names_the_onnxruntime_and_another_one_is_refused(built, prefix, cpp_package, tmp_path):
    mine, other = prefix / "lib" / "autosteer", tmp_path / "libonnxruntime.so"
    shutil.copy(mine / "libonnxruntime.so.1", other)
    for place in (mine, mine / "libonnxruntime.so.1", other):
        (answer,) = through_c(built, cpp_package, [{"messages": [turn("hello")]}], onnxruntime=str(place))
        assert answer["code"] == 0, answer
    (refused,) = through_c(built, cpp_package, [], onnxruntime=str(tmp_path / "none"))
    assert refused["code"] == 4 and "onnxruntime was not found" in refused["error"]
    script = """
import ctypes, sys
library, engine = ctypes.CDLL(sys.argv[1]), ctypes.c_void_p()
library.autosteer_error.restype = ctypes.c_char_p
for place in sys.argv[3:]:
    options = f'{{"onnxruntime": "{place}"}}'.encode()
    print(library.autosteer_open(sys.argv[2].encode(), options, ctypes.byref(engine)), library.autosteer_error())
"""
    places = [str(mine), str(mine / "libonnxruntime.so.1"), str(other)]
    lines = said("python3", "-c", script, built / "libautosteer.so", cpp_package, *places).splitlines()
    assert [line[0] for line in lines] == ["0", "0", "4"]
    assert "this process has loaded another onnxruntime" in lines[2]


def turn(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "parts": list(parts)}


def test_pictures_from_memory_are_those_of_files(embedding, cpp_package, cpp_engine, tmp_path):
    """By name, by bytes, and by pixels whose rows are padded; as pictures and as frames."""
    pixels = noise(30, 20)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.rgb").write_bytes(pixels.tobytes())
    lines = embedding("pictures", cpp_package, tmp_path / "a.png", tmp_path / "a.rgb", "30", "20")
    file = {"image": str(tmp_path / "a.png")}
    sampling = {"max_tokens": 8}
    asked = [[file, "look"], [{"video": [file["image"]] * 2}, "look"]]
    expected = [in_python(cpp_engine, {"messages": [turn(*parts)], "sampling": sampling}) for parts in asked]
    for found in (lines[:3], lines[3:6], lines[6:]):
        for line, answer in zip((found[0], found[2]), expected, strict=True):
            said_last = timeless(json.loads(line))
            assert said_last["verdict"] == answer["verdict"] and said_last["timings"] == answer["timings"]
        assert int(found[1]) == cpp_engine.count_tokens("look", images=[pixels] * 2)
    assert len(lines) == 9


def test_an_engine_without_files_opens_none(built, cpp_package, tmp_path):
    """JSON from somebody else could have it read any file of the host; pixels in memory still go."""
    Image.fromarray(noise(4, 4)).save(tmp_path / "a.png")
    name = str(tmp_path / "a.png")
    requests = [{"messages": [turn(part, "look")]} for part in ({"image": name}, {"video": [name]})]
    *refused, fine = through_c(built, cpp_package, [*requests, {"messages": [turn("hello")]}], files=False)
    assert [answer["code"] for answer in refused] == [5, 5]
    assert all("the name of a file, which this engine does not open" in answer["error"] for answer in refused)
    assert joined(fine["chunks"])["text"] == "world"
    assert [answer["code"] for answer in through_c(built, cpp_package, requests, files=True)] == [0, 0]


def test_an_engine_with_a_policy_takes_requests_that_change_nothing_of_the_gate(built, cpp_package):
    """JSON from somebody else could turn it off."""
    plain = {"messages": [turn("bad")]}
    trusted = {"messages": [{"role": "system", "parts": ["bad"], "trusted": True}, turn("hello")]}
    changes = [{"policy": "off"}, {"policy": "stop"}, {"threshold": 0.9}, {"threshold": None}, {"strength": 0}]
    changes += [{"pieces": False}, {"judge_answers": True}]
    theirs = [*(plain | change for change in changes), trusted]
    *refused, fine = through_c(built, cpp_package, [*theirs, plain], policy="stop")
    assert [answer["code"] for answer in refused] == [5] * len(theirs)
    assert all("a policy for all requests" in answer["error"] for answer in refused)
    verdict = joined(fine["chunks"])["verdict"]
    assert verdict["policy"] == "stop" and verdict["action"] == "stop"
    assert [answer["code"] for answer in through_c(built, cpp_package, theirs)] == [0] * len(theirs)


@pytest.mark.parametrize("options", [{}, {"policy": "steer"}])
def test_an_engine_may_judge_the_answers_of_all_requests(built, cpp_package, options):
    """Without a policy of its own it is the default of requests."""
    hello = {"messages": [turn("hello")]}
    theirs = [hello] if options else [hello, hello | {"judge_answers": False}]
    answers = through_c(built, cpp_package, theirs, judge_answers=True, **options)
    judged = [joined(answer["chunks"])["verdict"]["answer"] is not None for answer in answers]
    assert judged == [True, False][: len(theirs)]


def test_an_answer_is_cancelled_while_it_reads_its_prompt(embedding):
    """Within a part of the time that reading takes; the conversation then answers as if nothing had been."""
    whole, cut, alike = embedding("cancel", demo_package("fp32"), "what is shown here? " * 100)
    assert alike == "1"
    assert float(cut) < float(whole) / 2


def test_an_answer_that_was_cancelled_before_it_began_never_begins(embedding, cpp_package):
    assert embedding("cancel_early", cpp_package) == ["130 the answer was cancelled"]


def test_a_callback_that_returns_false_ends_the_answer(embedding, cpp_package):
    stopped, seen = map(int, embedding("callback", cpp_package))
    assert stopped == 2 < seen


def test_a_package_says_what_it_is(embedding, cpp_package, cpp_engine):
    manifest = cpp_engine.manifest
    facts, tokens = embedding("info", cpp_package)
    precision, version, *numbers = facts.split()
    assert precision == manifest.precision and re.fullmatch(r"1\.\d+\.\d+", version)
    assert manifest.prober and manifest.refusal
    expected = [manifest.dims.context_length, 1, 1, 1, manifest.prober.threshold, manifest.refusal.strength]
    assert list(map(float, numbers)) == pytest.approx(expected)
    assert int(tokens) == cpp_engine.count_tokens("red red")


def test_a_verdict_without_an_answer(embedding, cpp_package, cpp_engine):
    """As Python's, under every policy; with `off` there is none."""
    lines = [line.split() for line in embedding("score", cpp_package)]
    verdicts = [cpp_engine.score("bad", policy=cpp_engine.policy(mode)) for mode in ("steer", "stop", "report")]
    assert [line[:2] for line in lines[:3]] == [[v.action.value, str(int(v.unsafe))] for v in verdicts]
    assert [float(line[2]) for line in lines[:3]] == pytest.approx([v.p_unsafe for v in verdicts])
    assert lines[3] == ["pass", "0", "nan"] and lines[4][:2] == ["pass", "0"] and float(lines[4][2]) < 0.5


def test_a_text_is_not_cut_at_a_nul(embedding, cpp_package):
    """std::string may have one, C would end there: the rest of the prompt went missing without a word."""
    assert embedding("nul", cpp_package) == ["5 a text, role or file name has a NUL character"] * 4


def test_parts_made_by_hand_are_whole(embedding, cpp_package):
    """A video has a second for each frame (the C function reads as many as there are frames), a picture is one."""
    assert embedding("parts", cpp_package) == ["5 a video has a second for each frame, or none", "5 image is NULL"]


def test_a_prober_that_fails_is_logged_where_the_host_wants_it(embedding, cpp_package):
    """Once: the second answer comes when nobody listens, and of the third one the listener throws."""
    action, line, thrown = embedding("log", cpp_package)
    assert thrown == action
    assert action == "steer" and line.count("the prober failed; the prompt counts as unsafe") == 1


def test_threads_on_one_engine_get_what_one_gets(embedding, cpp_package):
    assert embedding("threads", cpp_package) == ["1"]


def test_every_setting_of_the_wrapper_arrives(embedding, cpp_package, cpp_engine):
    """As in Python, in a dialogue whose text must be escaped; a number that JSON has not is refused."""
    last, stopped, code = embedding("settings", cpp_package)
    sampling = {"max_tokens": 8, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.5, "seed": 7}
    sampling |= {"min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.25}
    sampling |= {"speculate": False, "stop": ['a "quoted" \\ line\n\x01', "ü"]}
    wishes = {"policy": "steer", "threshold": -0.5, "pieces": False, "strength": 0.5}
    wishes |= {"sampling": sampling}
    first = [turn('red "} \\')]
    answer = in_python(cpp_engine, {"messages": first, **wishes})
    dialogue = [*first, {"role": "assistant", "parts": [answer["text"]]}, turn("hello")]
    expected = in_python(cpp_engine, {"messages": dialogue, **wishes})
    found = json.loads(last)
    assert found["verdict"] == expected["verdict"] and found["verdict"]["strength"] == 0.5
    assert found["token"] == expected["token_ids"][-1] and found["finish_reason"] == expected["finish_reason"]
    assert found["timings"]["reused_tokens"] > 0 and (stopped, code) == ("refused", "5")


def test_a_bias_of_the_wrapper_arrives(embedding, cpp_package, cpp_engine):
    plain, biased = embedding("bias", cpp_package)
    first = in_python(cpp_engine, {"messages": [turn("red")]})["token_ids"][0]
    wishes = {"max_tokens": 8, "logit_bias": {str(first): -100, "3": 0.25}}
    assert biased == in_python(cpp_engine, {"messages": [turn("red")], "sampling": wishes})["text"] != plain


WATCH = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <sys/mman.h>
int setenv(const char *name, const char *value, int overwrite) {
  fprintf(stderr, "setenv %s\\n", name);
  return ((int (*)(const char *, const char *, int))dlsym(RTLD_NEXT, "setenv"))(name, value, overwrite);
}
int madvise(void *memory, size_t size, int advice) {
  if (advice == 21) fprintf(stderr, "madvise\\n"); /* MADV_PAGEOUT */
  return ((int (*)(void *, size_t, int))dlsym(RTLD_NEXT, "madvise"))(memory, size, advice);
}
"""


def test_the_library_leaves_the_host_alone(built, cpp_package, tmp_path):
    """No variable is set, and no advice is given on memory, unless it is asked for; the command does both."""
    (tmp_path / "watch.c").write_text(WATCH)
    said("cc", "-shared", "-fPIC", tmp_path / "watch.c", "-o", tmp_path / "watch.so")
    script = """
import ctypes, sys
library, engine = ctypes.CDLL(sys.argv[1]), ctypes.c_void_p()
assert library.autosteer_open(sys.argv[2].encode(), sys.argv[3].encode(), ctypes.byref(engine)) == 0
"""
    python = ["python3", "-c", script, built / "libautosteer.so", cpp_package]
    seen = []
    for command in (
        [*python, "{}"],
        [*python, '{"advise_pages": true}'],
        [built / "autosteer-cli", cpp_package, "--prompt", "red"],
    ):
        environment = clean(LD_PRELOAD=str(tmp_path / "watch.so"))
        environment.pop("ORT_DISABLE_TELEMETRY", None)  # autosteer.runtime sets it for this process
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        seen.append(("setenv ORT" in done.stderr, "madvise" in done.stderr))
    assert seen == [(False, False), (False, True), (True, True)]
