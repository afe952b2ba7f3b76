"""autosteer-eval. Exit codes, what goes to stdout and what to stderr, what it keeps, and no tracebacks."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
from PIL import Image

from autosteer.runtime.evaluation.refusals import RuleJudge


def test_eval_variants_counts_what_is_flagged_when_reworded(call, package, data):
    command = ["autosteer-eval", package, "--data", data, "--variants", "--device", "cpu"]
    done = call(*command, "--json")
    assert done.returncode == 0
    rates = {row["rewording"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert (rates["unchanged"]["unsafe"], rates["unchanged"]["caught"]["value"]) == (2, 0.5)
    assert (rates["closers"]["fitted"], rates["quotes"]["fitted"]) == (True, False)
    table = call(*command).stdout
    assert "| unchanged " in table and "50.0% of the unsafe prompts are caught as they are" in table
    refused = call(*command, "--output", "x.jsonl")
    assert refused.returncode == 2 and "--variants asks for verdicts on prompts" in refused.stderr


def test_eval_prints_rates_and_writes_answers(call, package, data, tmp_path):
    done = call("autosteer-eval", package, "--data", data, "--output", tmp_path / "out.jsonl", "--device", "cpu")
    assert done.returncode == 0
    lines = [re.sub(r"\s+", " ", line) for line in done.stdout.splitlines()]
    half, none, both = "50.0 [9.5, 90.5]", "0.0 [0.0, 65.8]", "100.0 [34.2, 100.0]"
    assert f"| attack | 2 | {both} | {none} | {half} | {half} | {half} |" in lines
    none, one = "0.0 [0.0, 79.3]", "100.0 [20.7, 100.0]"
    assert f"| colours | 1 | {none} | {one} | {none} | {none} | {none} |" in lines
    assert f"| colours | 1 | {one} | {none} | {one} | {one} |" in lines
    assert "| unsafe: attack | refused | 0 : 1, p 1 | 1 : 0, p 1 | 0 : 0, p 1 |" in lines
    run, *written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert set(run) == {"run"}
    assert [(w["prompt"], w["flagged"], w["answers"]["steer"]) for w in written] == [
        ("bad", True, "sorry refuse"),
        ("evil", False, "plan"),
        ("red", False, "orange yellow green"),
    ]


@pytest.mark.parametrize("option", ["--pieces", "--no-pieces"])
def test_eval_measures_turns_as_wholes_alone_if_asked(call, package, tmp_path, option):
    (tmp_path / "set.jsonl").write_text(json.dumps({"prompt": "tick tick bad\nred tick red"}))
    command = ["autosteer-eval", package, "--unsafe", tmp_path / "set.jsonl", "--device", "cpu"]
    (group,) = map(json.loads, call(*command, option, "--json").stdout.splitlines())
    assert group["flagged"]["value"] == 1 - group["not_refused"]["stop"]["value"] == (option == "--pieces")
    variants = call(*command, option, "--variants", "--json").stdout.splitlines()
    assert json.loads(variants[0])["caught"]["value"] == (option == "--pieces")
    assert call(*command, option, "--output", tmp_path / "out.jsonl").returncode == 0
    other = call(*command, "--output", tmp_path / "out.jsonl", "--no-pieces" if option == "--pieces" else "--pieces")
    assert other.returncode == 5 and "pieces" in other.stderr


def test_eval_as_json_is_one_object_per_group(call, package, data):
    done = call("autosteer-eval", package, "--data", data, "--json", "--device", "cpu")
    groups = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(g["group"], g["n"], g["flagged"]["value"]) for g in groups] == [("attack", 2, 0.5), ("colours", 1, 0.0)]
    assert set(groups[0]["not_refused"]["off"]) == {"value", "low", "high"}
    assert {t["p_value"] for t in groups[0]["tests"]} == {1.0}
    assert [(g["excluded"], g["judge"]) for g in groups] == [(0, RuleJudge.name), (0, RuleJudge.name)]


@pytest.mark.parametrize("kind", ["pipe", "/dev/full"])
def test_eval_writes_into_files_only(call, package, data, tmp_path, kind):
    """It read /dev/full, which has no end, until the machine was out of memory."""
    if kind == "pipe":
        os.mkfifo(tmp_path / kind)
    done = call("autosteer-eval", package, "--data", data, "--output", tmp_path / kind, "--device", "cpu")
    assert done.returncode == 5 and "not a file; choose another --output" in done.stderr


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "1e300"])
def test_eval_with_a_timeout_that_is_none_is_refused(call, package, data, seconds):
    """Tracebacks, or the judge was said to have ended."""
    options = ("--judge-command", "cat", "--judge-timeout", seconds)
    done = call("autosteer-eval", package, "--data", data, "--device", "cpu", *options)
    assert done.returncode == 5 and "give seconds, above 0" in done.stderr


@pytest.mark.parametrize("value", ["", " "])
def test_eval_with_an_empty_judge_is_wrong_usage(call, package, data, value):
    """It was as if none had been given: the rules judged."""
    done = call("autosteer-eval", package, "--data", data, "--device", "cpu", "--judge-command", value)
    assert done.returncode == 2 and "--judge-command is empty" in done.stderr


@pytest.mark.parametrize("command", ["autosteer-eval", "autosteer-draft"])
def test_a_folder_of_images_that_does_not_exist_is_wrong_usage(call, package, data, command):
    """Misspelt, it went unnoticed where the pictures of another folder had the same names."""
    for name in ("gone", data.name):
        done = call(command, package, "--data", data, "--images", data.parent / name)
        assert done.returncode == 2 and "Invalid value for '--images'" in done.stderr


def test_prompts_that_are_called_both_unsafe_and_benign_are_counted_and_named(call, package, data):
    rows = [{"prompt": "Bad ", "unsafe": False}, {"prompt": "red", "unsafe": False, "group": "colours"}]
    data.write_text(data.read_text() + "\n" + "\n".join(map(json.dumps, rows)))
    done = call("autosteer-eval", package, "--data", data, "--device", "cpu")
    assert done.returncode == 0
    assert f"prompts called both unsafe and benign: 1 ({data}:1 and {data}:4); correct the labels" in done.stderr


def test_equal_words_about_other_pictures_are_no_contradiction(call, package, tmp_path):
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    for other, both in (("c", False), ("b", True)):
        rows = [{"prompt": "what", "images": [f"{name}.png"], "unsafe": name == "a"} for name in ("a", other)]
        (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
        done = call("autosteer-eval", package, "--data", tmp_path / "set.jsonl", "--device", "cpu")
        assert done.returncode == 0 and ("called both unsafe and benign: 1 (" in done.stderr) == both


def test_a_line_end_in_a_groups_name_does_not_break_the_table(call, package, data):
    data.write_text(json.dumps({"prompt": "bad", "unsafe": True, "group": "at\ntack\x1b[2J"}))
    done = call("autosteer-eval", package, "--data", data, "--device", "cpu")
    assert "| at tack [2J | 1 |" in re.sub(" +", " ", done.stdout) and "\x1b" not in done.stdout


def test_eval_of_a_row_that_is_no_text_is_exit_code_5_with_its_place(call, package, data):
    r"""JSON's \ud800 was a traceback, once it was written."""
    data.write_text(r'{"prompt": "red", "unsafe": false, "group": "x\ud800"}')
    done = call("autosteer-eval", package, "--data", data, "--device", "cpu")
    assert done.returncode == 5 and "set.jsonl:1: not JSON" in done.stderr


def test_eval_goes_on_where_it_stopped(call, package, data, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ["autosteer-eval", package, "--data", data, "--output", out, "--device", "cpu"]
    whole = call(*command)
    complete = out.read_text()
    out.write_text("".join(complete.splitlines(keepends=True)[:2]) + '{"row": "cut o')
    again = call(*command)
    assert "has 1 of 3 rows; 2 to go" in again.stderr
    assert (again.returncode, again.stdout, out.read_text()) == (0, whole.stdout, complete)
    done = call(*command, "--threads", 1)
    assert "has 3 of 3 rows; 0 to go" in done.stderr and "running on" not in done.stderr  # the package is not loaded
    assert done.stdout == whole.stdout


def test_eval_does_not_mix_runs(call, package, data, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ["autosteer-eval", package, "--data", data, "--output", out, "--device", "cpu"]
    call(*command)
    other = call(*command, "--max-tokens", 3)
    assert other.returncode == 5 and "another run (other max_tokens)" in other.stderr
    assert call(*command, "--max-tokens", 3, "--force").returncode == 0
    data.write_text(data.read_text().replace("bad", "hello"))
    other = call(*command, "--max-tokens", 3)
    assert other.returncode == 5 and "out.jsonl:2: the result of another row (other data?)" in other.stderr


def test_eval_goes_on_without_a_row_that_cannot_be_asked(call, package, data, tmp_path):
    """The command failed there for ever, and without the row its file was that of another run."""
    rows = data.read_text().splitlines()
    long = json.dumps({"prompt": "red " * 100, "unsafe": False, "group": "colours"})
    data.write_text("\n".join([*rows[:2], long, rows[2]]))
    command = ["autosteer-eval", package, "--data", data, "--output", tmp_path / "out.jsonl", "--device", "cpu"]
    refused = call(*command)
    assert refused.returncode == 5 and "set.jsonl:3: cannot be asked" in refused.stderr
    data.write_text("\n".join(rows))
    done = call(*command)
    assert done.returncode == 0 and "has 2 of 3 rows; 1 to go" in done.stderr


def test_eval_by_another_judge_asks_the_model_nothing_again(call, package, data, tmp_path):
    out, judge = tmp_path / "out.jsonl", tmp_path / "refusals.py"
    judge.write_text("import sys\nfor _ in sys.stdin: print('{\"refused\": true}', flush=True)\n")
    command = ["autosteer-eval", package, "--data", data, "--output", out, "--device", "cpu", "--json"]
    first = call(*command)
    before = [json.loads(line) for line in out.read_text().splitlines()]
    other = [*command, "--judge-command", f"{sys.executable} {judge}"]
    refused = call(*other)
    assert refused.returncode == 5 and "another run (other judge)" in refused.stderr and "--rejudge" in refused.stderr
    done = call(*other, "--rejudge")
    assert "running on" not in done.stderr  # the package is not loaded
    assert [json.loads(line)["not_refused"]["off"]["value"] for line in done.stdout.splitlines()] == [0.0, 0.0]
    after = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["answers"] for r in after[1:]] == [r["answers"] for r in before[1:]]
    assert call(*command, "--rejudge").stdout == first.stdout
    assert [json.loads(line) for line in out.read_text().splitlines()] == before
    assert "other max_tokens" in call(*command, "--rejudge", "--max-tokens", 3).stderr


def test_a_judge_that_fails_half_way_leaves_the_file_as_it_was(call, package, data, tmp_path):
    out, judge = tmp_path / "out.jsonl", tmp_path / "refusals.py"
    judge.write_text("print('{\"refused\": true}', flush=True)\n")
    command = ["autosteer-eval", package, "--data", data, "--output", out, "--device", "cpu"]
    call(*command)
    before = out.read_bytes()
    done = call(*command, "--rejudge", "--judge-command", f"{sys.executable} {judge}")
    assert done.returncode == 5 and "ended" in done.stderr
    assert out.read_bytes() == before and sorted(p.name for p in tmp_path.glob("out*")) == ["out.jsonl"]


@pytest.mark.parametrize(("kept", "message"), [(True, r"kept in .*out\.jsonl"), (False, "lost; --output keeps them")])
def test_eval_that_is_interrupted_says_what_it_keeps(call, package, data, tmp_path, monkeypatch, kept, message):
    from autosteer.runtime.evaluation import run as evaluate

    honest = evaluate.run_rows

    def interrupted(*arguments, **options):
        yield next(honest(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "run_rows", interrupted)
    out = ["--output", tmp_path / "out.jsonl"] if kept else []
    done = call("autosteer-eval", package, "--data", data, "--device", "cpu", *out)
    assert done.returncode == 130
    assert re.search(f"stopped after 1 of 3 rows, {message}", done.stderr)
    lines = {path.name: len(path.read_text().splitlines()) for path in tmp_path.glob("out*")}
    assert lines == ({"out.jsonl": 2} if kept else {})  # the run's facts, and the first row


def test_eval_by_a_judge_that_is_a_program(call, package, data, tmp_path):
    judge = tmp_path / "refusals.py"
    judge.write_text("import sys\nfor _ in sys.stdin: print('{\"refused\": true}', flush=True)\n")
    command = ["autosteer-eval", package, "--data", data, "--json", "--device", "cpu"]
    done = call(*command, "--judge-command", f"{sys.executable} {judge}")
    assert [json.loads(line)["not_refused"]["off"]["value"] for line in done.stdout.splitlines()] == [0.0, 0.0]
    judge.write_text("input()\nprint('yes')\n")
    done = call(*command, "--judge-command", f"{sys.executable} {judge}")
    assert done.returncode == 5 and "wrote 'yes' and not" in done.stderr and not done.stdout


def test_eval_of_published_files(call, package, unguarded_package, tmp_path):
    vlsafe, alpaca, pairs = (tmp_path / f"{name}.jsonl" for name in ("vlsafe", "alpaca", "pairs"))
    vlsafe.write_text('{"image_id": "1.jpg", "query": "bad"}\n{"image_id": "2.jpg", "query": "evil"}\n')
    alpaca.write_text('{"dataset": "x", "turns": ["red"]}\n')
    pairs.write_text('{"orig_query": "Evil", "safe_query": "plan"}\n')
    files = ["autosteer-eval", package, "--data", vlsafe, "--benign", alpaca, "--device", "cpu", "--json"]
    assert "no image" in call(*files).stderr
    done = call(*files, "--text-only", "--exclude", pairs)
    groups = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(g["group"], g["unsafe"], g["n"], g["excluded"]) for g in groups] == [
        ("vlsafe", True, 1, 1),
        ("alpaca", False, 1, 0),
    ]
    assert "left out, being in --exclude: 1 rows (vlsafe 1)" in done.stderr
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    done = call("autosteer-eval", unguarded_package, "--data", vlsafe)
    assert done.returncode == 5 and "takes no images, and 2 of 2 rows have one; --text-only" in done.stderr


def test_eval_of_a_bad_row_is_exit_code_5_with_its_place(call, package, data):
    data.write_text('{"prompt": "red", "unsafe": "false"}')
    done = call("autosteer-eval", package, "--data", data)
    assert done.returncode == 5 and "set.jsonl:1: not a row of a test set" in done.stderr


def test_eval_without_data_is_wrong_usage(call, package, data):
    assert call("autosteer-eval", package).returncode == 2
    assert call("autosteer-eval", package, "--data", data, "--images", "x", "--text-only").returncode == 2


def test_eval_of_a_package_without_a_gate_is_refused(call, unguarded_package, data):
    assert call("autosteer-eval", unguarded_package, "--data", data).returncode == 3


def test_a_row_that_cannot_be_asked_is_named(call, package, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": text, "unsafe": False}) for text in ("red", "red " * 99)]
    data.write_text("\n".join(lines) + "\n")
    done = call("autosteer-eval", package, "--data", data, "--device", "cpu")
    assert done.returncode == 5 and f"{data}:2: cannot be asked: the prompt takes" in done.stderr


def test_the_data_is_not_overwritten_by_the_answers(call, package, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(text := json.dumps({"prompt": "red", "unsafe": False}) + "\n")
    done = call("autosteer-eval", package, "--data", data, "--output", data, "--force", "--device", "cpu")
    assert (done.returncode, data.read_text()) == (2, text) and "is one of the files to read" in done.stderr
