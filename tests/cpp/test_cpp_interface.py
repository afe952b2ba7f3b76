"""autosteer-cli is autosteer-run without Python; the C functions let no exception out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import toy
from conformance_packages import PICTURES, Packages, cases, shown
from cpp_inputs import SIZES, noise
from cpp_runtime import cli, joined, python_json, through_c, timeless, use_byte_level_words
from exported import demo_package
from PIL import Image
from terminal import Terminal

from autosteer.runtime import Engine, SamplingConfig
from autosteer.runtime.cli.answer import answer_json
from autosteer.runtime.video import open_video


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    return Packages(tmp_path_factory.mktemp("packages"))


def test_text_that_is_not_unicode_is_an_input_error(built):
    done = subprocess.run(
        [built / "autosteer-cli", demo_package("fp32"), "--prompt", b"a\xff\xfeb"], capture_output=True, check=False
    )
    assert done.returncode == 5
    assert b"not valid Unicode" in done.stderr


def test_command_prints_the_json_of_autosteer_run(built, cpp_package, cpp_engine):
    """Keys in the same order, values the same but for timings."""
    done = cli(built, cpp_package, "--json", "-p", "red", "--max-tokens=2", "--stop", "zzz", "--seed", "3")
    found = json.loads(done.stdout)
    expected = json.loads(json.dumps(answer_json(cpp_engine.generate("red", sampling=SamplingConfig(max_tokens=2)))))
    assert timeless(found) == timeless(expected)
    assert list(found) == list(expected) and list(found["timings"]) == list(expected["timings"])
    assert list(found["verdict"]) == list(expected["verdict"])


@pytest.mark.parametrize("option", ["--json-schema", "--regex"])
def test_grammars_are_refused_and_not_ignored(built, cpp_package, option):
    done = cli(built, cpp_package, "-p", "red", option, "x")
    assert (done.returncode, done.stdout) == (2, "") and f"{option}: autosteer-cli has no grammars" in done.stderr


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_most_tiles_of_a_picture_are_those_of_autosteer_run(built, cpp_package, tmp_path, most):
    """By the command and by the C interface; several pictures take one tile each anyway."""
    engine = Engine.load(cpp_package, device="cpu", threads=1, max_tiles=most)
    pictures = [tmp_path / f"{i}.png" for i in range(len(SIZES[1:]))]
    for picture, (width, height) in zip(pictures, SIZES[1:], strict=True):
        Image.fromarray(noise(width, height)).save(picture)
    shown = [*([picture] for picture in pictures), pictures[:2]]
    expected = [python_json(engine, "look", images=images) for images in shown]
    for images, answer in zip(shown[::3], expected[::3], strict=True):
        options = [word for image in images for word in ("-i", str(image))]
        done = cli(built, cpp_package, "--json", "-p", "look", "--max-tiles", str(most), *options)
        assert timeless(json.loads(done.stdout)) == answer
    requests = [{"messages": [{"role": "user", "parts": [*({"image": str(i)} for i in im), "look"]}]} for im in shown]
    answers = through_c(built, cpp_package, requests, max_tiles=most)
    assert [joined(answer["chunks"]) for answer in answers] == expected
    assert max(answer["timings"]["image_tiles"] for answer in expected) == max(most if most < 4 else 5, 2)


def test_low_memory_answers_alike_and_checks_the_image_graph_again(built, cpp_package, cpp_engine, tmp_path):
    """By the command and by the C interface, which holds the engine while the package is damaged."""
    Image.fromarray(noise(30, 20)).save(tmp_path / "a.png")
    look = {"messages": [{"role": "user", "parts": [{"image": str(tmp_path / "a.png")}, "look"]}]}
    expected = python_json(cpp_engine, "look", images=[tmp_path / "a.png"])
    done = cli(built, cpp_package, "--json", "-p", "look", "-i", str(tmp_path / "a.png"), "--low-memory")
    assert timeless(json.loads(done.stdout)) == expected
    answers = through_c(built, cpp_package, [look, look], low_memory=True)
    assert [joined(answer["chunks"]) for answer in answers] == [expected] * 2
    package = shutil.copytree(cpp_package, tmp_path / "package")
    damage = {"append": [str(package / "vision_encoder.onnx"), "x"]}
    fine, refused = through_c(built, package, [look, {**look, **damage}], low_memory=True)
    assert joined(fine["chunks"]) == expected
    assert (refused["code"], refused["chunks"]) == (3, []) and "sha256 differs" in refused["error"]


def test_command_without_pictures_loads_no_image_graph(built, cpp_package, tmp_path):
    """As autosteer-run: nobody will need it. A graph that onnxruntime cannot load shows it."""
    package = shutil.copytree(cpp_package, tmp_path / "package")
    (package / "vision_encoder.onnx").write_bytes(b"no graph")
    toy.rehash(package)
    assert cli(built, package, "-p", "red").stdout == "orangeyellowgreen\n"
    Image.fromarray(noise(30, 20)).save(tmp_path / "a.png")
    done = cli(built, package, "-p", "look", "-i", str(tmp_path / "a.png"))
    assert done.returncode == 3 and "vision_encoder.onnx: onnxruntime cannot load it" in done.stderr


def test_command_shows_a_video_as_autosteer_run_does(built, cpp_package, cpp_engine, tmp_path):
    for i, (width, height) in enumerate(SIZES[1:], 1):
        Image.fromarray(noise(width, height)).save(tmp_path / f"{i}.png")
    for frames in ("1", "5", "8"):
        done = cli(built, cpp_package, "--json", "-p", "look", "--video", str(tmp_path), "--frames", frames)
        video = open_video(tmp_path, int(frames))
        assert done.returncode == 0, done.stderr
        assert timeless(json.loads(done.stdout)) == python_json(cpp_engine, "look", videos=[video])


def test_model_without_videos_says_so(built, tmp_path):
    use_byte_level_words(tmp_path / "package", toy.build(tmp_path / "package"))
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    done = cli(built, tmp_path / "package", "-p", "look", "--video", str(tmp_path))
    assert (done.returncode, done.stderr) == (5, "autosteer-cli: error: this model takes no videos\n")


def test_command_streams_the_answer_and_reports_on_stderr(built, cpp_package):
    done = cli(built, cpp_package, input="bad\n")
    assert (done.returncode, done.stdout) == (0, "sorryrefuse\n")
    assert done.stderr.startswith("[STEER  p_unsafe 0.900 > 0.500 at layer 1, strength 0.1]\n")
    assert "tok/s, stop, on CPUExecutionProvider]" in done.stderr
    drafted = cli(built, cpp_package, "-p", "tick", "--max-tokens", "30").stderr
    assert " drafts accepted) tokens, first after " in drafted


def test_chat(built, cpp_package, tmp_path):
    """As autosteer-run's: a refused turn is forgotten, a picture waits, nothing is computed twice, Ctrl-C leaves."""
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a red.png")
    chat = Terminal(built / "autosteer-cli", cpp_package, "--threads", "1", "--max-tokens", "3000")
    for typed, seen in (
        ("hello", "world"),
        ("bad", "(the turn is forgotten)"),
        ("hello", " cached) + 2 ("),
        ("/image gone.png", "error: gone.png: "),
        (f"/image '{tmp_path / 'a red.png'}' ", ""),
        (f"/image {tmp_path}/a\\ red.png", ""),
        ("red " * 99, "context holds 64"),
        ("/video gone", "error: gone: no such video file or folder"),
        ("/new", ""),
        ("/nonsense", "/nonsense: not a command. Type a message."),
        ("/help", "/new starts over"),
        ("", ""),
        ("tick", "tocktick"),
    ):
        chat.expect("> ")
        chat.type(f"{typed}\n")
        chat.expect(seen)
    chat.expect("> ")
    chat.type("\x03")
    chat.expect("autosteer-cli: interrupted")
    assert chat.exit_code() == 130


def test_chat_about_a_picture_and_its_end(built, cpp_package, tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    chat = Terminal(built / "autosteer-cli", cpp_package, "--threads", "1")
    for typed, seen in ((f"/image {tmp_path / 'red.png'}", ""), ("look", "orangeyellowgreen"), ("look", " cached) + ")):
        chat.expect("> ")
        chat.type(f"{typed}\n")
        chat.expect(seen)
    chat.expect("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


@pytest.mark.parametrize("text", ["red\n", "red\n\n", "red\r\n", "\nred", "red\r"])
def test_standard_input_is_the_prompt_that_python_reads(built, cpp_package, text):
    """Python took one line end off and C++ none: another prompt, and another score."""
    run = "from autosteer.runtime.cli import run_main; run_main()"
    python = [sys.executable, "-c", run, str(cpp_package), "--json", "--threads", "1", "--device", "cpu"]
    theirs = subprocess.run(python, input=text.encode(), capture_output=True, check=True, timeout=60)
    ours = cli(built, cpp_package, "--json", input=text)
    assert timeless(json.loads(ours.stdout)) == timeless(json.loads(theirs.stdout))


def plain(theme: str, error: str) -> list[dict[str, Any]]:
    """Cases of one theme about the toy as it is that end in an error."""
    return [case for case in cases(theme) if case["expected"].get("error") == error and "package" not in case]


def test_c_interface_turns_errors_into_codes(built, packages):
    """No exception crosses it, whatever is asked, and it goes on answering."""
    asked = [case for theme in ("requests", "json_requests") for case in plain(theme, "input")]
    asked = [case for case in asked if not {"change", "options"} & case.keys()]
    requests = [case["text"] if "text" in case else shown(case["request"]) for case in asked]
    hello = {"messages": [{"role": "user", "parts": ["hello"]}]}
    *refused, fine = through_c(built, packages.whole("toy"), [*requests, hello])
    for case, found in zip(asked, refused, strict=True):
        assert (found["code"], found["chunks"]) == (5, []), case["name"]
        assert case["expected"]["says"] in found["error"], case["name"]
    assert len(asked) > 30
    assert joined(fine["chunks"])["text"] == "world"


HOSTILE = """
import ctypes, json, sys
from ctypes import POINTER, byref, c_char_p, c_int64, c_size_t, c_uint8, c_void_p
lib = ctypes.CDLL(sys.argv[1])
lib.autosteer_error.restype = c_char_p
for name in ("end", "conversation_end", "request_free", "close", "image_free", "cancel"):
    getattr(lib, "autosteer_" + name).argtypes = [c_void_p]
    getattr(lib, "autosteer_" + name)(None)
for name, types in {
    "image_from_rgb": [c_int64] * 3 + [c_void_p] * 2, "image_from_bytes": [c_void_p, c_size_t, c_void_p],
    "image_from_file": [c_char_p, c_void_p], "open": [c_char_p, c_char_p, c_void_p],
    "request_new": [c_char_p, c_void_p], "request_turn": [c_void_p, c_char_p], "request_text": [c_void_p, c_char_p],
    "request_image": [c_void_p, c_void_p], "request_video": [c_void_p, c_void_p, c_size_t], "request_trust": [c_void_p],
    "request_video_at": [c_void_p, c_void_p, c_void_p, c_size_t],
    "count_tokens": [c_void_p] * 3, "score": [c_void_p] * 5, "run": [c_void_p] * 3, "next": [c_void_p] * 2,
    "conversation_begin": [c_void_p] * 2, "conversation_run": [c_void_p] * 3,
}.items():
    getattr(lib, "autosteer_" + name).argtypes = types
engine, request, stream, out = c_void_p(), c_void_p(), c_void_p(), c_void_p()
assert lib.autosteer_open(sys.argv[2].encode(), b'{"threads": 1, "files": false}', byref(engine)) == 0
assert lib.autosteer_request_new(None, byref(request)) == 0
assert lib.autosteer_request_turn(request, b"user") == 0
assert lib.autosteer_run(engine, request, byref(stream)) == 0
handles = {"ENGINE": engine, "REQUEST": request, "STREAM": stream, "OUT": byref(out), "DATA": (c_uint8 * 603)()}
handles["FRAMES"] = (c_void_p * 2)()
for name, *arguments in json.load(sys.stdin):
    out.value = 1
    words = [handles.get(a, a.encode()) if isinstance(a, str) else a for a in arguments]
    code = getattr(lib, "autosteer_" + name)(*words)
    print(json.dumps([code, lib.autosteer_error().decode(), out.value]))
"""
BIG = 2**63 - 1
HOSTILE_CALLS = [  # a function, its arguments, and what it says
    (["open", None, None, "OUT"], "package is NULL"),
    (["open", "package", None, None], "engine is NULL"),
    (["image_from_rgb", 3, 3, 0, None, "OUT"], "data is NULL"),
    (["image_from_rgb", 3, 3, 0, "DATA", None], "image is NULL"),
    (["image_from_rgb", 0, 0, 0, "DATA", "OUT"], "image of 0x0 pixels: it is empty"),
    (["image_from_rgb", 0, 1, 0, "DATA", "OUT"], "image of 0x1 pixels: it is empty"),
    (["image_from_rgb", 3, -3, 0, "DATA", "OUT"], "image of 3x-3 pixels: it is empty"),
    (["image_from_rgb", -(2**63), 1, 0, "DATA", "OUT"], f"image of {-(2**63)}x1 pixels: it is empty"),
    (["image_from_rgb", 2**31, 1, 0, "DATA", "OUT"], "image of 2147483648x1 pixels: at most 50000000"),
    (["image_from_rgb", 2**31, 2**31, 0, "DATA", "OUT"], "image of 2147483648x2147483648 pixels: at most 50000000"),
    (["image_from_rgb", BIG, BIG, BIG, "DATA", "OUT"], f"image of {BIG}x{BIG} pixels: at most 50000000"),
    (["image_from_rgb", 201, 1, 0, "DATA", "OUT"], "image of 201x1 pixels: sides may differ by 200 times at most"),
    (["image_from_rgb", 3, 3, 8, "DATA", "OUT"], "image: a stride of 8 bytes, but a row has 9"),
    (["image_from_rgb", 3, 3, -9, "DATA", "OUT"], "image: a stride of -9 bytes, but a row has 9"),
    (["image_from_bytes", None, 3, "OUT"], "data is NULL"),
    (["image_from_bytes", "DATA", 0, "OUT"], "image: not a readable image (neither PNG nor JPEG)"),
    (["image_from_file", None, "OUT"], "path is NULL"),
    (["image_from_file", "/not\nthere\x1b.png", "OUT"], "/not there .png: no such image file"),
    (["image_from_file", "/dev/zero", "OUT"], "/dev/zero: not a readable image (not a file)"),
    (["request_new", None, None], "request is NULL"),
    (["request_new", "", "OUT"], "request: not readable as JSON (at byte 1)"),
    (["request_turn", None, "user"], "request is NULL"),
    (["request_turn", "REQUEST", None], "role is NULL"),
    (["request_text", "REQUEST", None], "text is NULL"),
    (["request_image", "REQUEST", None], "image is NULL"),
    (["request_video", "REQUEST", None, 1], "frames is NULL"),
    (["request_video", "REQUEST", "FRAMES", BIG], "a frame is NULL"),
    (["request_video_at", None, "FRAMES", None, 1], "request is NULL"),
    (["request_video_at", "REQUEST", None, "DATA", 1], "frames is NULL"),
    (["request_trust", None], "request is NULL"),
    (["count_tokens", "ENGINE", "REQUEST", None], "count is NULL"),
    (["score", None, "REQUEST", None, None, None], "engine is NULL"),
    (["score", "ENGINE", None, None, None, None], "request is NULL"),
    (["run", None, "REQUEST", "OUT"], "engine is NULL"),
    (["run", "ENGINE", None, "OUT"], "request is NULL"),
    (["run", "ENGINE", "REQUEST", None], "stream is NULL"),
    (["next", None, "OUT"], "stream is NULL"),
    (["next", "STREAM", None], "chunk is NULL"),
    (["conversation_begin", None, "OUT"], "engine is NULL"),
    (["conversation_run", None, "REQUEST", "OUT"], "conversation is NULL"),
]


def test_c_interface_survives_what_no_program_should_pass(built, cpp_package):
    """Each call says what is wrong in one line, and leaves NULL where a handle would be."""
    command = [sys.executable, "-c", HOSTILE, str(built / "libautosteer.so"), str(cpp_package)]
    asked = json.dumps([call for call, _ in HOSTILE_CALLS])
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for (call, says), line in zip(HOSTILE_CALLS, done.stdout.splitlines(), strict=True):
        assert json.loads(line) == [5, says, None if "OUT" in call else 1], call


def test_a_verdict_alone_opens_no_files_either(built, cpp_package, tmp_path):
    """As an answer does not, where the engine was opened with {"files": false}."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    script = (
        HOSTILE.partition("engine, request")[0]
        + """
engine, request = c_void_p(), c_void_p()
for files in (b"true", b"false"):
    assert lib.autosteer_open(sys.argv[2].encode(), b'{"threads": 1, "files": ' + files + b"}", byref(engine)) == 0
    assert lib.autosteer_request_new(sys.argv[3].encode(), byref(request)) == 0
    print(lib.autosteer_score(engine, request, None, None, None), lib.autosteer_error().decode())
"""
    )
    request = {"messages": [{"role": "user", "parts": [{"image": str(tmp_path / "a.png")}, "look"]}]}
    command = [sys.executable, "-c", script, built / "libautosteer.so", cpp_package, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    allowed, refused = done.stdout.splitlines()
    assert allowed == "0 " and refused.startswith("5 a picture is the name of a file, which this engine"), done.stderr


@pytest.mark.parametrize("ahead", ["", "x"])
def test_errors_are_valid_utf8_wherever_they_are_cut(built, cpp_package, ahead):
    """A message of 60 bytes ended within a character, and no reader of the C interface could decode it."""
    text = ahead + "é" * 99
    requests = [
        {"messages": text},
        {"messages": [{"role": text, "parts": []}]},
        {"messages": [{"role": "user", "parts": [{"image": text}]}]},
        {"messages": [], "policy": text},
        {text: 1},
    ]
    for found in through_c(built, cpp_package, requests):
        assert found["code"] == 5 and "éé" in found["error"]  # `through_c` decodes it strictly


def test_brackets_without_end_do_not_overflow_the_stack(built, packages, cpp_package):
    """200 KB of them ended the process that had loaded the library."""
    nested = ["[" * 200_000, '{"messages":' * 50_000, '{"messages": ' + "[" * 200_000]
    for found in through_c(built, cpp_package, nested):
        assert (found["code"], "nested deeper than 64 levels" in found["error"]) == (5, True)
    for case in (case for case in cases("damage") if "without end" in case["name"]):
        (unopened,) = through_c(built, packages.of(case), [])
        assert unopened["code"] == 3 and "nested deeper than 64 levels" in unopened["error"], case["name"]


def test_a_full_disk_is_no_success(built, cpp_package):
    """The answer was lost, without a word."""
    for options in (["-p", "red"], ["-p", "red", "--json"], ["--help"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [built / "autosteer-cli", cpp_package, *options],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 1 and "stdout: the answer cannot be written" in done.stderr


def peak(*command: object, **more: Any) -> tuple[int, int]:
    """A command's exit code and the most memory that it had, in MB."""
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss // 1024


def test_what_is_too_much_takes_no_memory(built, cpp_package, tmp_path):
    """A prompt of a megabyte took 1.1 GB, a header of 68 bytes 1.2 GB."""
    command = (built / "autosteer-cli", cpp_package, "--threads", "1")
    (tmp_path / "prompt").write_text("red " * 250_000)
    code, usual = peak(*command, "-p", "red")
    assert code == 0
    with open(tmp_path / "prompt") as prompt:
        code, most = peak(*command, stdin=prompt)
    assert code == 5 and most < usual + 200
    for name in ("13000x13000.png", "header-7000x7000.png"):
        code, most = peak(*command, "-p", "look", "-i", PICTURES / name)
        assert code == 5 and most < usual + 50, name


def test_c_interface_turns_errors_of_opening_into_codes(built, packages, tmp_path):
    (nowhere,) = through_c(built, tmp_path / "nowhere", [])
    assert nowhere["code"] == 3 and "autosteer.json" in nowhere["error"]
    for case in (c for c in plain("json_requests", "input") if c["expected"]["says"].startswith("options")):
        (unopened,) = through_c(built, packages.whole("toy"), [], **case["options"])
        assert unopened["code"] == 5 and case["expected"]["says"] in unopened["error"], case["name"]
    for case in plain("damage", "package")[::25]:
        (unopened,) = through_c(built, packages.of(case), [])
        assert unopened["code"] == 3 and case["expected"]["says"] in unopened["error"], case["name"]


def test_command_refuses_a_package_in_one_line(built, packages, tmp_path):
    """With exit code 3, and nothing on stdout."""
    (tmp_path / "file").write_text("")
    bad = [tmp_path / "nowhere", tmp_path / "file", *(packages.of(case) for case in plain("damage", "package")[::25])]
    for folder in bad:
        done = cli(built, folder, "--prompt", "red")
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert done.stderr.startswith("autosteer-cli: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("option", "value"), [("--max-tokens", "0"), ("--threshold", "2"), ("--threads", "100000")])
def test_an_error_names_the_option_as_it_is_typed(built, cpp_package, option, value):
    """And the field where JSON has one."""
    done = subprocess.run(
        [built / "autosteer-cli", cpp_package, "--prompt", "red", option, value],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.startswith(f"autosteer-cli: error: {option}")


def test_stop_string_that_is_not_unicode_is_an_input_error(built, cpp_package):
    """JSON cannot say one; a command line can."""
    command = [built / "autosteer-cli", cpp_package, "--prompt", "red", "--stop", b"a\xff"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, b"a stop string is not valid Unicode text" in done.stderr) == (5, True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["{package}", "--bogus"], 2),
        (["{package}", "--prompt"], 2),
        (["{package}", "--prompt", "red", "--policy", "none"], 2),
        (["{package}", "--prompt", "red", "--max-tokens", "many"], 2),
        (["{package}", "--prompt", "red", "--threads", "0"], 2),
        (["{package}", "other", "--prompt", "red"], 2),
        (["{package}", "--prompt", "red", "--device", "cuda"], 4),
        (["{package}", "--prompt", " \n"], 5),
        (["{package}", "--prompt", "red", "--image", "/not/there.png"], 5),
        (["{package}", "--prompt", "red", "--video", "/not/there"], 5),
        (["{package}", "--prompt", "red", "--video", "{package}"], 5),
        (["{package}", "--prompt", "red", "--video", "/not/there", "--frames", "0"], 2),
        (["{package}", "--prompt", "red", "--max-tiles", "0"], 2),
        (["{package}", "--prompt", "red", "--threads", "100000"], 5),
        (["{package}", "--prompt", "red", "--temperature", "-1"], 5),
        (["{package}", "--prompt", "red", "--threshold", "nan"], 5),
        (["{package}", "--prompt", "red", "--threshold", "1.01"], 5),
        (["{package}", "--prompt", "red " * 100], 5),
    ],
)
def test_exit_codes_are_those_of_autosteer_run(built, cpp_package, arguments, code):
    words = [str(cpp_package) if a == "{package}" else a for a in arguments]
    done = subprocess.run(
        [built / "autosteer-cli", *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == code, done.stderr
    assert bool(done.stdout) is (code == 0)


LARGE_PICTURE = """
import ctypes, json, resource, sys
library, package, text = sys.argv[1:]
lib = ctypes.CDLL(library)
lib.autosteer_error.restype = ctypes.c_char_p
engine, image, asked, stream = (ctypes.c_void_p() for _ in range(4))
chunk = ctypes.POINTER(ctypes.c_char_p)()
pixels = bytes(3 * 4000 * 3000)
wishes = json.dumps({"messages": [], "policy": "report", "sampling": {"max_tokens": 1}}).encode()
def do(code):
    if code:
        sys.exit(lib.autosteer_error().decode())
do(lib.autosteer_open(package.encode(), b'{"threads": 1}', ctypes.byref(engine)))
width, height = ctypes.c_int64(4000), ctypes.c_int64(3000)
do(lib.autosteer_image_from_rgb(width, height, ctypes.c_int64(0), pixels, ctypes.byref(image)))
do(lib.autosteer_request_new(wishes, ctypes.byref(asked)))
for words in (text, "and this?"):
    do(lib.autosteer_request_turn(asked, b"user"))
    do(lib.autosteer_request_image(asked, image))
    do(lib.autosteer_request_text(asked, words.encode()))
do(lib.autosteer_run(engine, asked, ctypes.byref(stream)))
do(lib.autosteer_next(stream, ctypes.byref(chunk)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_reading_a_turn_in_pieces_copies_no_pictures(built):
    """Each piece had the pixels of every picture of its turn: 36 MB here, of 30 pieces."""

    def peak_mb(text: str) -> int:
        command = [sys.executable, "-c", LARGE_PICTURE, built / "libautosteer.so", demo_package("fp32"), text]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    sentences = " ".join(f"how do i clean spoon number {n}?" for n in range(30))
    assert peak_mb(sentences) < peak_mb("what is shown?") + 100
