"""Tier 3: the command-line tools. Exit codes, what goes to stdout and what to stderr, and no tracebacks.

One of each kind runs as the installed program; the variants run `main()` in this process, which is 20 times quicker.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import toy
from commands import MAINS, installed, program
from PIL import Image
from terminal import PATIENCE, Terminal

from autosteer.runtime import Manifest
from autosteer.runtime.cli import typed_path, verdict_line
from autosteer.runtime.console import dumps
from autosteer.runtime.gate import Action, GatePolicy, Mode, decide
from autosteer.runtime.manifest import Golden


def run_here(call, package: Path, *args: object, **more) -> subprocess.CompletedProcess[str]:
    return call("autosteer-run", package, "--device", "cpu", "--threads", 1, *args, **more)


# --- the installed programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAINS)
def test_help_is_on_stdout(name):
    done = installed(name, "--help")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"Usage: {name}")


def test_answer_is_on_stdout_and_verdict_on_stderr(package):
    done = installed("autosteer-run", package, "-p", "bad", "--device", "cpu")
    assert (done.returncode, done.stdout) == (0, "sorry refuse\n")
    verdict, stats = done.stderr.splitlines()
    assert verdict == "[STEER  p_unsafe 0.900 > 0.500 at layer 1, strength 0.1]"
    assert re.fullmatch(r"\[4 \+ 3 tokens, first after .* stop, on CPUExecutionProvider\]", stats)


def test_damaged_package_is_one_line_and_exit_code_3(copy_of_package):
    (copy_of_package / "prober.onnx").write_bytes(b"x")
    done = installed("autosteer-run", copy_of_package, "-p", "red")
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(r"autosteer-run: error: .*prober\.onnx: sha256 differs.*\n", done.stderr)


def test_debug_shows_the_traceback(tmp_path):
    done = installed("autosteer-run", tmp_path, "-p", "red", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr and "PackageError" in done.stderr


def test_reader_that_leaves_early_causes_no_traceback(package):
    """autosteer-run ... | head -c1"""
    command = f"'{program('autosteer-run')}' '{package}' -p tick --max-tokens 55 --device cpu | head -c1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "t"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_ctrl_c_ends_an_answer_with_130_and_no_traceback(tmp_path):
    toy.build(tmp_path, context_length=200_000)
    process = subprocess.Popen(
        [program("autosteer-run"), tmp_path, "-p", "tick", "--max-tokens", "199000", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(4) == b"tock"  # it is answering
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert b"autosteer-run: interrupted" in err and b"Traceback" not in err


def test_request_that_ctrl_c_ends_is_in_the_audit_record(tmp_path):
    toy.build(tmp_path, context_length=200_000)
    command = [program("autosteer-run"), tmp_path, "-p", "tick", "--max-tokens", "199000", "--device", "cpu"]
    command += ["--audit", tmp_path / "audit.jsonl"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.read(4) == b"tock"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    (line,) = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert process.returncode == 130 and json.loads(line)["error"] == "cancelled"


def test_audit_record_of_the_command(call, package, tmp_path):
    """Lines are added; words are in them only if asked for; a record that cannot be kept is an error with one line."""
    file = tmp_path / "audit.jsonl"
    run_here(call, package, "-p", "bad", "--policy", "stop", "--audit", file)
    run_here(call, package, "-p", "red", "--json", "--audit", file, "--audit-texts")
    run_here(call, package, "-p", "red", "--score-only", "--audit", file)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["finish_reason"], line.get("answer")) for line in found] == [
        ("refused", None),
        ("stop", "orange yellow green"),
        ("scored", None),
    ]
    refused = run_here(call, package, "-p", "red", "--audit", "/dev/null")
    assert refused.returncode == 5 and "/dev/null: not a file" in refused.stderr and not refused.stdout
    assert run_here(call, package, "-p", "red", "--audit-texts").returncode == 2


def test_argument_that_is_not_utf8_is_bad_input(package):
    done = subprocess.run(
        [program("autosteer-run"), str(package), "-p", b"red \xff", "--device", "cpu"],
        capture_output=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (5, b"") and b"not valid Unicode" in done.stderr


def test_chat(package, tmp_path):
    """Two turns, a mistyped picture, a real one, /new, an unknown command, Ctrl-D."""
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    chat = Terminal(program("autosteer-run"), package, "--device", "cpu", "--threads", "1")
    chat.expect("> ")
    chat.type("hello\n")
    assert "world" in chat.expect("tokens, first")
    chat.expect("> ")
    chat.type("bad\n")
    assert "sorry refuse" in chat.expect("on CPUExecutionProvider]")
    chat.expect("(the turn is forgotten)")  # or every later one would be unsafe with it
    chat.expect("> ")
    chat.type("/image gone.png\n")
    chat.expect("error: gone.png: no such image file")
    chat.expect("> ")
    chat.type(f"/image '{tmp_path / 'red.png'}' \n")  # as a terminal writes what is dropped on it
    chat.expect("> ")
    chat.type("red " * 99 + "\n")
    chat.expect("context holds 64")
    chat.expect("> ")
    chat.type("look\n")  # the picture waits for a turn that is answered
    assert "orange yellow green" in chat.expect(" known) + 4 tokens")
    chat.expect("> ")
    chat.type("/video gone\n")
    chat.expect("error: gone: no such video file or folder")
    chat.expect("> ")
    chat.type("/nonsense\n")
    chat.expect("/nonsense: not a command. Type a message. ")
    chat.expect("> ")
    chat.type("/help\n")
    chat.expect("/new starts over")
    chat.expect("> ")
    chat.type("/new\n")
    chat.expect("> ")
    chat.type(f"/image {tmp_path / 'red.png'}\n")
    chat.expect("> ")
    chat.type("look\n")
    assert "orange yellow green" in chat.expect("[14 + 4 tokens")  # a fresh dialogue: nothing of the earlier turns
    chat.expect("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_chat_with_a_model_of_text_keeps_no_picture_that_would_fail_every_turn(unguarded_package, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    chat = Terminal(program("autosteer-run"), unguarded_package, "--device", "cpu", "--threads", "1", "--policy", "off")
    for kind in ("image", "video"):
        chat.expect("> ")
        chat.type(f"/{kind} {tmp_path / 'black.png'}\n")
        chat.expect(f"error: this model takes no {kind}s")
    chat.expect("> ")
    chat.type("red\n")
    assert "orange yellow green" in chat.expect("on CPUExecutionProvider]")
    chat.expect("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("red.png ", "red.png"),
        ("'a b.png' ", "a b.png"),
        ('"a b.png"', "a b.png"),
        ("a\\ b.png", "a b.png"),
        ("a b.png", "a b.png"),
        ("don't.png", "don't.png"),
        ("'odd'.png", "'odd'.png"),  # there is one of that name
        ("~/red.png", "{home}/red.png"),
        ("~nobody-of-this-name/red.png", "~nobody-of-this-name/red.png"),  # it ended the chat
    ],
)
def test_files_are_named_as_somebody_types_them_or_drops_them_on_a_terminal(tmp_path, monkeypatch, typed, names):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "'odd'.png").touch()
    assert typed_path(typed) == Path(names.format(home=tmp_path))


# --- autosteer-run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("<&-", 0)])
def test_closed_streams_are_no_traceback(package, closed, code):
    command = f"{program('autosteer-run')} {package} -p red --device cpu --threads 1 {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("orange yellow green" in done.stdout) is (not closed.startswith(">"))


def test_picture_of_a_hundred_megapixels_is_refused_without_a_word_of_pillows(package, tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    command = [program("autosteer-run"), package, "-p", "look", "-i", tmp_path / "large.png", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5 and "Warning" not in done.stderr
    assert "10000x10000 pixels: at most 50000000" in done.stderr


@pytest.mark.parametrize("options", ["-p red", "-p red --json", "--help"])
def test_a_full_disk_is_no_success(package, options):
    """It was exit code 0 in C++, and 120 in Python."""
    command = f"{program('autosteer-run')} {package} {options} --device cpu --threads 1 > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stderr.endswith("autosteer-run: error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("name", ["autosteer-run", "autosteer-eval"])
def test_ctrl_c_while_importing_does_not_say_that_something_is_missing(package, data, tmp_path, name):
    """numpy's C code makes an ImportError of it, and the advice was to install onnxruntime."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "onnxruntime.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    pass\n"
        "raise ImportError('numpy.core.multiarray failed to import')\n"
    )
    command = [program(name), package, *(("-p", "red") if name == "autosteer-run" else ("--data", data))]
    paths = os.pathsep.join(filter(None, (str(tmp_path / "stub"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, f"{name}: interrupted")
    assert "pip" not in done.stderr


@pytest.mark.parametrize(("said", "kept"), [(None, "1"), ("", "1"), ("0", "0"), ("1", "1")])
def test_only_a_number_turns_telemetry_on(said, kept):
    """An empty value left it on."""
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env |= {} if said is None else {"ORT_DISABLE_TELEMETRY": said}
    show = "import os, autosteer.runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True).stdout.strip() == kept


@pytest.mark.parametrize(
    ("options", "text", "verdict"),
    [
        (("-p", "red"), "orange yellow green", "[PASS  p_unsafe 0.100 <= 0.500 at layer 1]"),
        (("-p", "bad", "--policy", "stop"), toy.REFUSAL_TEXT, "[STOP  p_unsafe 0.900 > 0.500 at layer 1]"),
        (("-p", "bad", "--policy", "off"), "evil plan", "[no gate: --policy off]"),
        (("-p", "red", "--stop", "yellow"), "orange ", "[PASS  p_unsafe 0.100 <= 0.500 at layer 1]"),
        (("-p", "red", "--max-tokens", 1), "orange", "[PASS  p_unsafe 0.100 <= 0.500 at layer 1]"),
        (("-p", "bad", "--threshold", 0.95), "evil plan", "[PASS  p_unsafe 0.900 <= 0.950 at layer 1]"),
        (("-p", "bad", "--strength", 0), "evil plan", "[STEER  p_unsafe 0.900 > 0.500 at layer 1, strength 0]"),
        (
            ("-p", "bad", "--policy", "monitor"),
            "evil plan",
            "[PASS  p_unsafe 0.900 > 0.500 at layer 1; unsafe, but --policy monitor only watches]",
        ),
        (
            ("-p", "nan"),
            "sorry refuse",
            "[STEER  p_unsafe nan is no probability; limit 0.500 at layer 1, strength 0.1]",
        ),
    ],
)
def test_run(call, package, options, text, verdict):
    done = run_here(call, package, *options)
    assert (done.returncode, done.stdout) == (0, f"{text}\n")
    assert done.stderr.splitlines()[0] == verdict


def test_verdict_line_does_not_say_that_minus_one_is_above_the_threshold():
    """It read "p_unsafe -1.000 > 0.500"."""
    verdict = decide(-1.0, GatePolicy(Mode.STOP, 0.5, 0.1, "no"), split_layer=2)
    assert verdict.action is Action.STOP
    assert verdict_line(verdict) == "[STOP  p_unsafe -1.000 is no probability; limit 0.500 at layer 2]"


@pytest.mark.parametrize("options", [("-p", "-"), ()])
def test_prompt_from_stdin(call, package, options):
    assert run_here(call, package, *options, stdin="red\n").stdout == "orange yellow green\n"


@pytest.mark.parametrize(("options", "stdin"), [(("-p", ""), ""), (("-p", " \n"), ""), (("-p", "-"), ""), ((), "\n")])
def test_empty_prompt_is_bad_input(call, package, options, stdin):
    done = run_here(call, package, *options, stdin=stdin)
    assert (done.returncode, done.stdout) == (5, "") and done.stderr.endswith("the prompt is empty\n")


def test_stdin_that_is_no_text_is_bad_input(call, package):
    """UnicodeDecodeError and its traceback."""
    done = run_here(call, package, "-p", "-", stdin=b"red \xff\xfe")
    assert done.returncode == 5 and "not valid utf-8 text" in done.stderr


def test_json_is_one_object_with_everything_in_it(call, package):
    done = run_here(call, package, "-p", "bad", "--json")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    assert list(answer) == ["text", "token_ids", "finish_reason", "verdict", "device", "timings"]
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("sorry refuse", [22, 23, 31], "stop")
    assert answer["verdict"] == {
        "p_unsafe": pytest.approx(0.9),
        "unsafe": True,
        "action": "steer",
        "mode": "steer",
        "threshold": 0.5,
        "strength": 0.1,
        "split_layer": 1,
        "monitor": None,
    }
    assert answer["device"] == "CPUExecutionProvider"
    assert {"prompt_tokens", "completion_tokens", "ttft_ms", "upper_ms", "decode_tok_s"} <= answer["timings"].keys()


@pytest.mark.parametrize("prompt", ["nan", "inf", "crash"])
def test_json_has_no_nan(call, package, prompt):
    """NaN and Infinity are not JSON; the verdict still says that the prompt is unsafe."""

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    done = run_here(call, package, "-p", prompt, "--json", "--policy", "stop")
    answer = json.loads(done.stdout, parse_constant=refuse)
    assert (answer["verdict"]["p_unsafe"], answer["verdict"]["unsafe"]) == (None, True)
    assert (answer["finish_reason"], answer["token_ids"], answer["timings"]["upper_ms"]) == ("refused", [], None)


def test_dumps_escapes_what_is_no_text():
    """A file's name may be any bytes, which the terminal then refused."""
    assert dumps({"é": "\udcff"}) == '{"\\u00e9": "\\udcff"}' and dumps("é") == '"é"'


def test_score_only_prints_the_verdict_and_answers_nothing(call, package):
    done = run_here(call, package, "-p", "bad", "--score-only", "--policy", "stop")
    assert (done.returncode, done.stdout) == (0, "[STOP  p_unsafe 0.900 > 0.500 at layer 1]\n")
    done = run_here(call, package, "-p", "red", "--score-only", "--json")
    verdict = json.loads(done.stdout)
    assert (verdict["p_unsafe"], verdict["unsafe"], verdict["mode"]) == (pytest.approx(0.1), False, "steer")
    assert run_here(call, package, "-p", "red", "--score-only", "--policy", "off").returncode == 2


def test_dumps_leaves_numbers_alone():
    assert dumps({"a": [1.5, float("inf"), (float("nan"), 2)], "b": "é"}) == '{"a": [1.5, null, [null, 2]], "b": "é"}'


@pytest.mark.parametrize(
    "options",
    [
        ("--nonsense",),
        ("--policy", "maybe"),
        ("--max-tokens", "many"),
        ("--threads", "0"),
        ("--threads", "1025"),
        ("--device", "tpu"),
    ],
)
def test_wrong_usage_is_exit_code_2(call, package, options):
    done = call("autosteer-run", package, "-p", "red", *options)
    assert (done.returncode, done.stdout) == (2, "") and "Error: " in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-tokens", 0), "max_tokens = 0 is out of range"),
        (("--max-tokens", -3), "max_tokens = -3 is out of range"),
        (("--temperature", "nan"), "temperature = nan is out of range"),
        (("--temperature", -1), "temperature = -1.0 is out of range"),
        (("--temperature", "inf"), "temperature = inf is out of range"),
        (("--top-p", 0), "top_p = 0.0 is out of range"),
        (("--top-p", "nan"), "top_p = nan is out of range"),
        (("--top-k", -1), "top_k = -1 is out of range"),
        (("--repetition-penalty", 0), "repetition_penalty = 0.0 is out of range"),
        (("--min-p", 1.5), "min_p = 1.5 is out of range"),
        (("--presence-penalty", 3), "presence_penalty = 3.0 is out of range"),
        (("--json-schema", __file__), "test_cli.py: not JSON"),
        (("--seed", -1), "seed = -1 is out of range"),
        (("--stop", ""), "stop = ('',) is out of range"),
        (("--threshold", "nan"), "threshold = nan"),
        (("--threshold", 50), "threshold = 50"),
        (("--strength", "nan"), "strength = nan"),
        (("--strength", "inf"), "strength = inf"),
        (("--strength", -0.1), "strength = -0.1"),
        (("-i", "gone.png"), "gone.png: no such image file"),
        (("-i", __file__), "not a readable image"),
        (("-i", Path(__file__).parent), "not a readable image"),
        (("--video", "gone"), "gone: no such video file or folder"),
        (("--video", __file__), "a video is an MP4"),
        (("--video", Path(__file__).parent), "no picture files in this folder"),
        (("-p", "red " * 61), "64 tokens (images included); the model's context holds 64"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_5(call, package, options, message):
    done = run_here(call, package, "-p", "bad", *options)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("autosteer-run: error: ") and message in done.stderr


def test_an_unsafe_prompt_is_stopped_in_a_schema_and_a_list_is_none(call, cpp_package, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}', encoding="utf-8")
    done = run_here(call, cpp_package, "-p", "bad", "--json-schema", schema)
    assert (done.returncode, done.stdout) == (0, f"{toy.REFUSAL_TEXT}\n")
    assert done.stderr.startswith("[STOP  p_unsafe 0.900")
    schema.write_text("[]", encoding="utf-8")
    done = run_here(call, cpp_package, "-p", "red", "--json-schema", schema)
    assert done.returncode == 5 and "a schema is a JSON object" in done.stderr
    done = run_here(call, cpp_package, "-p", "red", "--regex", "(red|green){2}")
    assert re.fullmatch("(red|green){2}\n", done.stdout)


def test_device_that_is_not_there_is_exit_code_4(call, package, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    done = call("autosteer-run", package, "-p", "red", "--device", "cuda")
    assert (done.returncode, done.stdout) == (4, "") and "--device cuda" in done.stderr


@pytest.mark.parametrize("name", ["autosteer-run", "autosteer-check"])
def test_folder_that_is_no_package_is_exit_code_3(call, tmp_path, name):
    done = call(name, tmp_path, *(("-p", "red") if name == "autosteer-run" else ()))
    assert (done.returncode, done.stdout) == (3, "") and "no autosteer.json here" in done.stderr


def test_package_without_a_gate_runs_only_when_told_to(call, unguarded_package):
    done = run_here(call, unguarded_package, "-p", "bad")
    assert (done.returncode, done.stdout) == (3, "") and "--policy off" in done.stderr
    assert run_here(call, unguarded_package, "-p", "bad", "--policy", "off").stdout == "evil plan\n"


def test_image_is_shown_to_the_model(call, package, tmp_path):
    Image.new("RGB", (4, 4), (0, 0, 255)).save(tmp_path / "a.png")
    assert run_here(call, package, "-p", "look", "-i", tmp_path / "a.png").stdout == "evil plan\n"


def test_video_is_shown_to_the_model_however_it_is_kept(call, package, tmp_path):
    """Ten frames, blue but for the last; of a folder's, by their numbers (10.png comes last)."""
    colours = [*((0, 0, 255 - i) for i in range(9)), (255, 0, 0)]  # Pillow joins frames that are equal
    frames = [Image.new("RGB", (6, 4), colour) for colour in colours]
    for name, options in {"a.gif": {}, "a.webp": {"lossless": True}, "a.png": {}, "a.tiff": {}}.items():
        frames[0].copy().save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(frames, 1):
        frame.save(tmp_path / "frames" / f"{i}.png")
    (tmp_path / "frames" / "notes.txt").write_text("no picture")
    for name in ("a.gif", "a.webp", "a.png", "a.tiff", "frames"):
        for count, text in {2: "orange yellow green", 8: "evil plan", 99: "evil plan"}.items():  # the last is red
            done = run_here(call, package, "-p", "look", "--video", tmp_path / name, "--frames", count, "--json")
            answer = json.loads(done.stdout)
            assert answer["timings"]["image_tiles"] == min(count, 10), name
            assert answer["timings"]["prompt_tokens"] == 4 + min(count, 10) + 1, name
            assert answer["text"] == text, (name, count)
    done = run_here(call, package, "-p", "look", "--video", tmp_path / "frames" / "10.png", "--json")
    assert json.loads(done.stdout)["timings"]["prompt_tokens"] == 4 + 1 + 1  # a still picture is one frame


# --- autosteer-check -------------------------------------------------------------------------------------------------


@pytest.fixture
def golden_package(copy_of_package: Path) -> Path:
    golden = Golden("red", (), None, 0.1, "pass", (6, 7, 8, 31))
    replace(Manifest.load(copy_of_package), golden=(golden,)).save(copy_of_package)
    return copy_of_package


def test_check_of_a_whole_package(call, golden_package):
    done = call("autosteer-check", golden_package, "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert "| verdicts that differ" in done.stdout and "FAILED" not in done.stdout


def test_check_that_fails_is_exit_code_6(call, golden_package):
    manifest = Manifest.load(golden_package)
    replace(manifest, golden=(replace(manifest.golden[0], token_ids=(6, 9)),)).save(golden_package)
    done = call("autosteer-check", golden_package, "--device", "cpu")
    assert done.returncode == 6
    assert "answers that differ: not as on the exporting machine" in done.stderr and "FAILED" in done.stdout


def test_check_as_json(call, golden_package):
    done = call("autosteer-check", golden_package, "--device", "cpu", "--json")
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == 0 and all(set(c) == {"name", "value", "limit", "passed"} for c in checks)


def test_check_of_the_host(call):
    assert "CPUExecutionProvider" in json.loads(call("autosteer-check", "--host", "--json").stdout)["providers"]


def test_bench_prints_a_table_or_json(call, golden_package):
    few = ("--prompt-tokens", 4, "--new-tokens", 3, "--rounds", 1, "--device", "cpu")
    done = call("autosteer-bench", golden_package, *few)
    assert done.returncode == 0 and "decode, tok/s" in done.stdout and "GB/s read" in done.stdout
    assert json.loads(call("autosteer-bench", golden_package, *few, "--json").stdout)["read_gb_s"] > 0


def test_check_of_nothing_is_wrong_usage(call):
    assert call("autosteer-check").returncode == 2


# --- what nobody asked for -------------------------------------------------------------------------------------------


def test_nothing_is_kept_at_home_to_be_sent_to_anybody(package, tmp_path):
    """onnxruntime 1.32 keeps what it sends to its makers in ~/.cache, unless ORT_DISABLE_TELEMETRY says no."""
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [program("autosteer-run"), str(package), "-p", "red", "--device", "cpu"]
    subprocess.run(command, env=kept | {"HOME": str(tmp_path)}, check=True, capture_output=True, timeout=PATIENCE)
    assert list(tmp_path.iterdir()) == []
