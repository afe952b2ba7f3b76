"""The oldest onnxruntime that pyproject.toml allows answers as the installed one does, in both runtimes.

The whole matrix is tools/matrix; this is its first and its last row, on packages that other tests have exported, too.
The wheel is installed once, into build/matrix.
"""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from exported import INT8_CACHES, PREFILL, demo_package
from onnxruntime_matrix import KINDS, Row, Runtimes, as_table, numbers, oldest, rows
from version_matrix.cases import KINDS as CASE_KINDS
from version_matrix.cases import make_cases
from version_matrix.compare import Cell, compare
from version_matrix.environments import Interpreter, installed

# Every precision; also what the oldest may not run, because it has to say so instead of answering.
PACKAGES = {
    "fp32": ("fp32",),
    "fp16": ("fp16",),
    "int8": ("int8",),
    "int4": ("int4",),
    "int4-head4": ("int4", "--head-bits=4"),
    "int4-kv8": ("int4", INT8_CACHES),
    "int4-prefill8": ("int4", PREFILL),
}


def packages() -> dict[str, Path]:
    return {name: demo_package(*arguments) for name, arguments in PACKAGES.items()}


@pytest.fixture(scope="module", params=["Python", "C++"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The oldest and the installed onnxruntime, with one of the runtimes."""
    both, pictures = [oldest(), installed()], tmp_path_factory.mktemp("pictures")
    if request.param == "Python":
        return list(rows(both, packages(), pictures, Runtimes(Interpreter()), (), "Python"))
    runtimes = Runtimes(Interpreter(), request.getfixturevalue("built"))
    return list(rows((), packages(), pictures, runtimes, both, "Python"))


def test_the_oldest_and_the_newest_onnxruntime_answer_alike(table: list[Row]) -> None:
    """A strength in freed memory steered nothing up to 1.28, and nobody noticed: the tests ran 1.32."""
    print(as_table(table, list(PACKAGES)))
    assert [row.version for row in table] == [oldest(), installed()]
    assert {row.version: row.wrong for row in table} == {oldest(): [], installed(): []}
    compared = {(row.version, name) for row in table for name in PACKAGES if row.supported(name)}
    assert compared == {(v, n) for v in (oldest(), installed()) for n in PACKAGES} - {(oldest(), "int4-kv8")}


def test_what_a_version_cannot_compute_gives_no_answer_there(table: list[Row]) -> None:
    cells = {(row.version, name): cell for row in table for name, cell in row.cells.items() if not row.supported(name)}
    assert cells.keys() == {(oldest(), "int4-kv8")}  # by export/floor.py
    for (version, name), cell in cells.items():
        assert cell.error and cell.equal == 0, f"{name} answers on {version}: export/floor.py says it cannot"


def test_the_cases_are_what_they_are_called_and_no_token_hangs_by_a_thread(tmp_path: Path) -> None:
    """Else a version that steers nothing could pass, or one that rounds otherwise could fail."""
    import onnxruntime_matrix as matrix

    cases = make_cases(tmp_path)
    assert len(cases) == sum(CASE_KINDS.values()) == 30
    command, environ = Runtimes(Interpreter()).python(installed())
    for precision in ("fp32", "int4"):
        lines = matrix.ask(command, environ, demo_package(precision), cases)
        answers = {line["name"]: line["answers"] for line in lines}
        assert all(m > 0.75 for given in answers.values() for answer in given for m in answer["margins"])
        for case in cases:
            given = answers[case["name"]]
            actions = {answer["action"] for answer in given}
            expected = {"steered": {"steer"}, "stopped": {"stop"}, "passed": {"pass"}, "watched": {"pass"}}
            assert actions == expected.get(case["kind"], actions), case["name"]
            if case["kind"] == "watched":
                assert given[0]["p_unsafe"] > 0.5
            if case["forced"]:
                assert given[1]["drafts_held"] > 0
        assert [a["action"] for a in answers["two-turns-2"]] == ["pass", "steer"]
        assert [a["action"] for a in answers["two-turns-3"]] == ["steer", "stop"]
        assert answers["two-pictures-3"][0]["action"] == answers["drafted-1"][1]["action"] == "steer"


def test_the_oldest_onnxruntime_exports_in_half_precision(tmp_path: Path) -> None:
    """From 1.23 to 1.29 an optimiser ended the process over a cast weight that validation keeps as it is."""
    command = [sys.executable, "-c", "from autosteer.export.cli import main; main()", "--model", "demo"]
    command += ["--precision", "fp16", "--output", str(tmp_path / "package")]
    done = subprocess.run(command, env=Interpreter().environ(oldest()), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


ANSWER = {"token_ids": [1, 2], "action": "steer", "p_unsafe": 0.9, "margins": [3.0, 4.0]}


@pytest.mark.parametrize(
    "changed",
    [
        {"token_ids": [1, 3]},
        {"token_ids": [1]},
        {"action": "pass"},
        {"p_unsafe": 0.8},
        {"p_unsafe": math.nan},
        {"p_unsafe": None},
        {"margins": [3.0, 2.0]},
        {"margins": [3.0, math.nan]},
    ],
    ids=str,
)
def test_a_cell_is_good_only_if_everything_is_alike(changed: dict) -> None:
    expected = [{"name": "a", "answers": [ANSWER]}, {"name": "b", "answers": [ANSWER, ANSWER]}]
    assert compare(expected, expected).good("int4")
    given = [expected[0], {"name": "b", "answers": [ANSWER, {**ANSWER, **changed}]}]
    assert not compare(given, expected).good("int4")


def test_an_answer_that_is_missing_or_failed_is_a_difference() -> None:
    expected = [{"name": "a", "answers": [ANSWER]}, {"name": "b", "answers": [ANSWER]}]
    died, failed = expected[:1], [expected[0], {"name": "b", "error": "no kernel"}]
    assert compare(died, expected) == Cell(2, 1, 0.0, 0.0, "no answer: the process has died")
    assert compare(failed, expected) == Cell(2, 1, 0.0, 0.0, "no kernel")
    assert not compare([{"error": "not loaded"}], expected).good("fp32")


def test_a_row_is_wrong_only_where_the_package_may_run() -> None:
    bad = Cell(30, 29, 0.0, 0.0, None)
    row = Row("1.26.0", "Python", {"int4": bad, "int4-kv8": bad})
    assert KINDS["int4-kv8"].lowest == "1.27" and row.wrong == ["int4"]
    assert replace(row, version="1.27.0").wrong == ["int4", "int4-kv8"]
    assert numbers("1.9.2") < numbers("1.23.0")
