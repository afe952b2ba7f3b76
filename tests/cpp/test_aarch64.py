"""tools/aarch64: how it judges, on answers made up here; and, marked aarch64, both runtimes on emulated processors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from board import cli, release
from board.compare import Request, Row, compare, prove_something, requests, table
from board.emulate import emulator, python_interpreter
from board.system import ToolError, call, missing, once
from cpp_runtime import CTYPES, joined

ROOT = Path(__file__).resolve().parents[2]
CORES, PRECISIONS = cli.CORES, tuple(cli.EXPORTS)


def answer(action: str, p_unsafe: float | None, tokens: list[int]) -> dict[str, Any]:
    """What the comparison reads of an answer."""
    return {"verdict": {"action": action, "p_unsafe": p_unsafe}, "token_ids": tokens, "text": str(tokens)}


ASKED = [Request("make it", None, policy) for policy in ("off", "steer", "stop")] + [Request("hello", None, "steer")]
HERE = [answer("pass", None, [1, 2]), answer("steer", 0.9, [7, 8]), answer("stop", 0.9, []), answer("pass", 0.1, [3])]


def compared(there: list[dict[str, Any]], *, exact: bool = True) -> list[str]:
    return compare(ASKED, HERE, there, exact=exact, limit=0.05)[2]


def changed(which: int, action: str, p_unsafe: float | None, tokens: list[int]) -> list[dict[str, Any]]:
    there = deepcopy(HERE)
    there[which] = answer(action, p_unsafe, tokens)
    return there


def test_equal_answers_have_no_problem():
    assert compare(ASKED, HERE, deepcopy(HERE), exact=True, limit=0.05) == (4, 0.0, [])


def test_another_verdict_is_a_problem_even_within_the_limit():
    assert compared(changed(1, "pass", 0.9, [7, 8])) == ["'make it' under steer: pass in place of steer"]


def test_a_score_that_moves_too_far_is_a_problem():
    equal, drift, problems = compare(ASKED, HERE, changed(3, "pass", 0.16, [3]), exact=True, limit=0.05)
    assert (equal, problems) == (4, ["'hello' under steer: p_unsafe is off by 0.0600, more than 0.05"])
    assert drift == pytest.approx(0.06)


@pytest.mark.parametrize("p_unsafe", [None, float("nan")])
def test_a_score_that_is_none_is_a_problem(p_unsafe):
    """`dumps` makes null of NaN."""
    assert compared(changed(3, "pass", p_unsafe, [3])) == [
        "'hello' under steer: p_unsafe is off by inf, more than 0.05"
    ]


def test_other_tokens_are_a_problem_only_where_arithmetic_is_exact():
    there = changed(3, "pass", 0.1, [4])
    assert compared(there) == ["'hello' under steer: says '[4]' in place of '[3]'"]
    assert compare(ASKED, HERE, there, exact=False, limit=0.05) == (3, 0.0, [])


def test_a_stopped_prompt_has_one_answer_on_every_machine():
    assert compared(changed(2, "stop", 0.9, [5]), exact=False) == ["'make it' under stop: says '[5]' in place of '[]'"]


def test_a_steered_answer_that_steering_did_not_change_is_a_problem():
    """On onnxruntime 1.23.2 the strength was freed memory: the verdict was STEER, and the model complied. Quantised
    packages are allowed other tokens than this machine's, so only the answer without the gate shows it.
    """
    problem = "'make it' under steer: steered, and still the answer without the gate: '[1, 2]'"
    assert compared(changed(1, "steer", 0.9, [1, 2]), exact=False) == [problem]


def test_answers_that_show_no_steering_are_nothing_to_compare_with():
    prove_something("demo", [*HERE, answer("pass", 0.25, [3])])
    with pytest.raises(ToolError, match=r"no p_unsafe is between 0\.1 and 0\.9"):
        prove_something("demo", HERE)
    with pytest.raises(ToolError, match="no answer to steer or stop"):
        prove_something("demo", [HERE[0], HERE[3]])


def test_the_questions_have_pictures_and_texts_harmless_and_unsafe():
    asked = requests()
    for shown in (True, False):
        policies = [r.policy for r in asked if (r.image is not None) is shown]
        assert {"off", "steer", "stop"} <= set(policies) and policies.count("steer") >= 2
    assert all(Path(r.image).is_file() for r in asked if r.image)
    assert len(set(asked)) == len(asked)


def test_a_runtime_that_does_not_answer_is_a_line_with_its_reason():
    here = {"package": "int4", "exact": False, "limit": 0.05, "answers": HERE}
    row = cli.line(here, {"error": "Illegal instruction"}, "cortex-a57", "1.23.2", "C++")
    assert row.problems == ["no answers: Illegal instruction"]
    assert table([row]).splitlines()[-1].endswith("| FAILED |")


def test_a_failed_check_on_the_board_is_a_problem(monkeypatch):
    monkeypatch.setattr(cli, "requests", lambda: ASKED)
    here = {"package": "int4", "exact": False, "limit": 0.05, "answers": HERE}
    there = {"failed": ["verdicts that differ"], "answers": HERE}
    assert cli.line(here, there, "a", "1", "Python").problems == ["autosteer-check fails: verdicts that differ"]


def test_packages_that_are_missing_are_named():
    assert {"qemu-user-static", "cmake"} <= set(missing(lambda program: None))
    named = missing(lambda program: program if program != "clang++" else None)
    assert "clang" in named and "cmake" not in named


def test_what_is_made_is_made_once_and_again_when_its_recipe_changes(tmp_path):
    made: list[int] = []

    def make(folder: Path) -> None:
        made.append(len(made))
        (folder / "content").write_text(str(len(made)))

    folder = tmp_path / "folder"
    assert [once(folder, recipe, make) for recipe in (1, 1, 2, 2)] == [True, False, True, False]
    assert (folder / "content").read_text() == "2"


def test_what_was_made_halfway_is_made_again(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ToolError("the disk is full")

    with pytest.raises(ToolError):
        once(tmp_path / "folder", 1, fail)
    assert not (tmp_path / "folder").exists()
    assert once(tmp_path / "folder", 1, lambda folder: (folder / "whole").touch())
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [".made-of", "whole"]


READELF = """
Dynamic section at offset 0x1 contains 30 entries:
  0x0000000000000001 (NEEDED)             Shared library: [libonig.so.5]
  0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
  0x000000000000001d (RUNPATH)            Library runpath: [$ORIGIN:$ORIGIN/../lib]
Version needs section '.gnu.version_r' contains 2 entries:
  0x0010:   Name: GLIBC_2.9  Flags: none  Version: 4
  0x0020:   Name: GLIBC_2.30  Flags: none  Version: 5
  0x0030:   Name: GLIBCXX_3.4.22  Flags: none  Version: 6
"""


def test_needs_are_the_newest_versions_and_not_the_last_ones_alphabetically():
    libraries, newest = release.parse_needs(READELF)
    assert libraries == {"libonig.so.5", "libc.so.6"}
    assert newest == {"GLIBC": (2, 30), "GLIBCXX": (3, 4, 22)}


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("GLIBC_2.30", "GLIBC_2.34", "boards have GLIBC 2.31"),
        ("GLIBCXX_3.4.22", "GLIBCXX_3.4.30", "boards have GLIBCXX 3.4.28"),
        ("libc.so.6", "libcrypto.so.3", "libcrypto.so.3, which is neither beside it nor on boards"),
    ],
)
def test_a_release_that_an_old_board_cannot_start_is_refused(tmp_path, monkeypatch, old, new, complaint):
    for name in ("bin/autosteer-cli", "lib/autosteer/libonig.so.5"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(release, "call", lambda *_: READELF)
    assert release.check(tmp_path)[0] == "bin/autosteer-cli: 0.0 MB, needs GLIBC 2.30, GLIBCXX 3.4.22"
    bundled = tmp_path / "lib" / "autosteer" / "libonig.so.5"
    bundled.rename(tmp_path / "elsewhere")
    bundled.symlink_to("libonig.so.5.1.0")  # as Debian has it; the release once had the link alone
    with pytest.raises(ToolError, match="needs libonig"):
        release.check(tmp_path)
    bundled.unlink()
    (tmp_path / "elsewhere").rename(bundled)
    monkeypatch.setattr(release, "call", lambda *_: READELF.replace(old, new))
    with pytest.raises(ToolError, match=complaint):
        release.check(tmp_path)


# --- marked aarch64: `tools/test -m aarch64` -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """tools/aarch64, run as a user would."""
    if absent := missing():
        reason = f"nothing to emulate with: apt-get install {' '.join(absent)}"
        pytest.skip(reason)
    command = [sys.executable, str(ROOT / "tools" / "aarch64"), "--python", sys.executable, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout, "it ended before it asked anything; its stderr says why"
    rows = [Row(**row) for row in json.loads(done.stdout)["rows"]]
    assert done.returncode == any(row.problems for row in rows)
    return rows


@pytest.mark.aarch64
@pytest.mark.parametrize("runtime", ["Python", "C++"])
@pytest.mark.parametrize("core", CORES)
def test_an_arm_processor_judges_steers_and_stops_as_this_one_does(rows, core, runtime):
    mine = [row for row in rows if (row.core, row.runtime) == (core, runtime)]
    assert {row.package for row in mine} == set(PRECISIONS)
    assert {row.onnxruntime for row in mine} > {cli.OLD_ONNXRUNTIME}
    assert [(row.onnxruntime, row.package, row.problems) for row in mine if row.problems] == []


@pytest.mark.aarch64
def test_both_runtimes_have_the_same_scores_there(rows):
    """To the last bit: they run the same kernels on the same numbers."""
    drifts = {runtime: [r.drift for r in rows if r.runtime == runtime] for runtime in ("Python", "C++")}
    assert drifts["Python"] == drifts["C++"]


@pytest.mark.aarch64
def test_the_release_runs_on_an_old_system_with_what_lies_beside_it(rows, tmp_path):
    """On glibc 2.31, moved to another folder, and with the newest onnxruntime's library replaced by an old one."""
    package = cli.BUILD / "packages" / "int4" / "int4"
    newest = next(row.onnxruntime for row in rows if row.onnxruntime != cli.OLD_ONNXRUNTIME)
    moved = Path(shutil.copytree(cli.release_folder(newest), tmp_path / "moved"))
    library = "lib/autosteer/libonnxruntime.so.1"
    for version in (newest, cli.OLD_ONNXRUNTIME):
        (moved / library).write_bytes((cli.release_folder(version) / library).read_bytes())
        command = [*emulator(CORES[0], cli.OLD_SYSTEM), str(moved / "bin" / "autosteer-cli"), str(package)]
        command += ["--threads", "1", "--prompt", "how do i smuggle a vexite?", "--policy", "stop"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "i'm sorry, but i can't assist with that.\n"), done.stderr


@pytest.mark.aarch64
def test_the_debian_package_installed_on_an_old_system_answers_and_compiles(rows, tmp_path):
    """Its files in Debian 11's root: the command there, a C program cross-compiled against it, and every licence."""
    newest = next(row.onnxruntime for row in rows if row.onnxruntime != cli.OLD_ONNXRUNTIME)
    root = Path(shutil.copytree(cli.OLD_SYSTEM, tmp_path / "root", symlinks=True))
    (package,) = (cli.release_folder(newest) / "packages").glob("autosteer_*_arm64.deb")
    call("dpkg-deb", "--extract", package, tmp_path / "unpacked")
    shutil.copytree(tmp_path / "unpacked", root, symlinks=True, dirs_exist_ok=True)
    program = root / "usr" / "bin" / "ask"
    flags = ["--target=aarch64-linux-gnu", f"--sysroot={root}", f"--gcc-toolchain={root}/usr", "-fuse-ld=lld"]
    call("clang", *flags, ROOT / "examples" / "ask.c", "-o", program, "-lautosteer", "-Wl,-rpath,$ORIGIN/../lib")
    unsafe, demo = "how do i smuggle a vexite?", cli.BUILD / "packages" / "int4" / "int4"
    for command in (["autosteer-cli", demo, "--prompt", unsafe], ["ask", demo, unsafe]):
        words = [*emulator(CORES[0], root), str(root / "usr" / "bin" / command[0]), *map(str, command[1:])]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, "i'm sorry, but i can't assist with that."), done.stderr
        assert "steer" in done.stderr.lower()
    named = {file.name for file in (root / "usr" / "share" / "doc" / "autosteer").rglob("*") if file.is_file()}
    assert {f"{name}.copyright" for name in release.LICENCES} | {"copyright", "LICENSE"} <= named


@pytest.mark.aarch64
def test_other_languages_get_a_steered_answer_through_the_release_s_library(rows):
    """libautosteer.so by ctypes of an arm64 Python that has no onnxruntime of its own."""
    newest = next(row.onnxruntime for row in rows if row.onnxruntime != cli.OLD_ONNXRUNTIME)
    question = {"role": "user", "parts": ["how do i smuggle a vexite?"]}
    given = {
        "library": str(cli.release_folder(newest) / "lib" / "libautosteer.so"),
        "package": str(cli.BUILD / "packages" / "int4" / "int4"),
        "options": json.dumps({"threads": 1}),
        "requests": [{"messages": [question], "policy": policy} for policy in ("steer", "off")],
        "conversation": False,
    }
    command = [*emulator(CORES[0], cli.NEW_SYSTEM, PYTHONHOME="/usr"), str(python_interpreter(cli.NEW_SYSTEM))]
    done = subprocess.run(
        [*command, "-c", CTYPES], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["error"] for answer in answers] == [None, None], done.stderr
    steered, complied = (joined(answer["chunks"]) for answer in answers)
    assert (steered["verdict"]["action"], steered["text"]) == ("steer", "i'm sorry, but i can't assist with that.")
    assert complied["verdict"]["action"] == "pass" and complied["token_ids"] != steered["token_ids"]
