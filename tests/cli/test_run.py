"""autosteer-run. Exit codes, and what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import toy
from PIL import Image

from autosteer.runtime.cli.answer import verdict_line
from autosteer.runtime.console import dumps
from autosteer.runtime.gate import Action, GatePolicy, Mode, decide


def run_here(call, package: Path, *args: object, **more) -> subprocess.CompletedProcess[str]:
    return call("autosteer-run", package, "--device", "cpu", "--threads", 1, *args, **more)


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


@pytest.mark.parametrize(
    ("options", "text", "verdict"),
    [
        (("-p", "red"), "orange yellow green", "[PASS  p_unsafe 0.100 <= 0.500 at layer 1]"),
        (("-p", "bad", "--policy", "stop"), toy.REFUSAL_TEXT, "[STOP  p_unsafe 0.900 > 0.500 at layer 1]"),
        (("-p", "bad", "--policy", "off"), "evil plan", "[no gate: --policy off]"),
        (("-p", "red", "--stop", "yellow"), "orange ", "[PASS  p_unsafe 0.100 <= 0.500 at layer 1]"),
        (("-p", "red", "--max-tokens", 1), "orange", "[PASS  p_unsafe 0.100 <= 0.500 at layer 1]"),
        (("-p", "bad", "--threshold", 0.95), "evil plan", "[PASS  p_unsafe 0.900 <= 0.950 at layer 1]"),
        (
            ("-p", "bad", "--strength", 0, "--no-pieces"),
            "evil plan",
            "[STEER  p_unsafe 0.900 > 0.500 at layer 1, strength 0]",
        ),
        (
            ("-p", "bad", "--policy", "report"),
            "evil plan",
            "[PASS  p_unsafe 0.900 > 0.500 at layer 1; unsafe, but --policy report lets it pass]",
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
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == "autosteer-run: error: the prompt is empty: give --prompt TEXT, or write it to stdin\n"


def test_stdin_is_not_read_twice(call, package):
    """The schema took it all, and the prompt was empty."""
    done = run_here(call, package, "--json-schema", "-", stdin="{}")
    assert done.returncode == 2 and "--json-schema - reads stdin, so the prompt cannot" in done.stderr


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
        "policy": "steer",
        "threshold": 0.5,
        "strength": 0.1,
        "layer": 1,
        "answer": None,
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
    assert (verdict["p_unsafe"], verdict["unsafe"], verdict["policy"]) == (pytest.approx(0.1), False, "steer")
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
        ("--device", "tpu"),
    ],
)
def test_wrong_usage_is_exit_code_2(call, package, options):
    done = call("autosteer-run", package, "-p", "red", *options)
    assert (done.returncode, done.stdout) == (2, "") and "Error: " in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-tokens", 0), "--max-tokens = 0 is out of range"),
        (("--threads", 100_000), "--threads = 100000 is out of range (from 1 to "),
        (("--max-tokens", -3), "--max-tokens = -3 is out of range"),
        (("--temperature", "nan"), "--temperature = nan is out of range"),
        (("--temperature", -1), "--temperature = -1.0 is out of range"),
        (("--temperature", "inf"), "--temperature = inf is out of range"),
        (("--top-p", 0), "--top-p = 0.0 is out of range"),
        (("--top-p", "nan"), "--top-p = nan is out of range"),
        (("--top-k", -1), "--top-k = -1 is out of range"),
        (("--repetition-penalty", 0), "--repetition-penalty = 0.0 is out of range"),
        (("--min-p", 1.5), "--min-p = 1.5 is out of range"),
        (("--presence-penalty", 3), "--presence-penalty = 3.0 is out of range"),
        (("--json-schema", __file__), "test_run.py: not JSON"),
        (("--seed", -1), "--seed = -1 is out of range"),
        (("--stop", ""), "--stop = ('',) is out of range"),
        (("--threshold", "nan"), "--threshold = nan"),
        (("--threshold", 50), "--threshold = 50"),
        (("--strength", "nan"), "--strength = nan"),
        (("--strength", "inf"), "--strength = inf"),
        (("--strength", -0.1), "--strength = -0.1"),
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


@pytest.mark.parametrize("options", [("--video", ""), ("--image", ""), ("--audit", "")], ids=lambda options: options[0])
def test_an_empty_name_is_no_folder(call, package, options, tmp_path, monkeypatch):
    """An unset variable of the shell. It was the current folder, whose pictures became a video."""
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    monkeypatch.chdir(tmp_path)
    done = run_here(call, package, "-p", "look", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"'{options[0]}': the name is empty" in done.stderr.replace("'-i' / ", "")


@pytest.mark.parametrize("name", ["autosteer-run", "autosteer-check", "autosteer-bench"])
def test_an_empty_name_is_no_package(call, package, name, monkeypatch):
    monkeypatch.chdir(package)
    done = call(name, "", *(("-p", "red") if name == "autosteer-run" else ()))
    assert (done.returncode, done.stdout) == (2, "") and "the name is empty" in done.stderr


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
