"""The installed programs. Exit codes, streams that are closed, Ctrl-C, a full disk, and no tracebacks.

Variants of what is answered or refused run `main()` in this process, which is 20 times quicker: test_run.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import toy
from commands import MAINS, installed, program
from PIL import Image
from terminal import PATIENCE

from autosteer.runtime import Engine


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


def test_argument_that_is_not_utf8_is_bad_input(package):
    done = subprocess.run(
        [program("autosteer-run"), str(package), "-p", b"red \xff", "--device", "cpu"],
        capture_output=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (5, b"") and b"not valid Unicode" in done.stderr


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


@pytest.mark.parametrize("name", ["autosteer-run", "autosteer-check", "autosteer-bench", "autosteer-draft"])
def test_ctrl_c_before_anything_is_imported_is_no_traceback(tmp_path, name):
    """For 50 ms nothing of ours caught it."""
    (tmp_path / "click.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([program(name)], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, f"\n{name}: interrupted\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 2.5 GiB"), "not enough memory (Unable to allocate 2.5 GiB)"),
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("can't allocate memory: 9\nat"),
            "not enough memory (can't allocate memory: 9)",
        ),
        (RuntimeError("can't start new thread"), "not enough memory, or a limit of threads (can't start new thread)"),
    ],
)
def test_too_little_memory_is_one_line(call, package, monkeypatch, error, said):
    """It was a traceback."""

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(Engine, "load", fails)
    done = call("autosteer-run", package, "-p", "red")
    assert (done.returncode, done.stderr) == (1, f"autosteer-run: error: {said}\n")


def test_an_onnxruntime_that_does_not_load_is_not_missing(package, tmp_path):
    """Too little memory for its library: the advice was to install onnxruntime."""
    why = "onnxruntime_pybind11_state.so: failed to map segment from shared object"
    (tmp_path / "onnxruntime.py").write_text(f"raise ImportError({why!r})\n")
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command = [program("autosteer-run"), package, "-p", "red"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"autosteer-run: error: {why}\n")


@pytest.mark.parametrize(("said", "kept"), [(None, "1"), ("", "1"), ("0", "0"), ("1", "1")])
def test_only_a_number_turns_telemetry_on(said, kept):
    """An empty value left it on."""
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env |= {} if said is None else {"ORT_DISABLE_TELEMETRY": said}
    show = "import os, autosteer.runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True).stdout.strip() == kept


def test_nothing_is_kept_at_home_to_be_sent_to_anybody(package, tmp_path):
    """onnxruntime 1.32 keeps what it sends to its makers in ~/.cache, unless ORT_DISABLE_TELEMETRY says no."""
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [program("autosteer-run"), str(package), "-p", "red", "--device", "cpu"]
    subprocess.run(command, env=kept | {"HOME": str(tmp_path)}, check=True, capture_output=True, timeout=PATIENCE)
    assert list(tmp_path.iterdir()) == []
