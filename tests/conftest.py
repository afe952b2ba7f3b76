"""The toy packages and the C++ runtime, built once, and the engines that run packages on one thread.

Also what becomes of skipped tests: locally, one line says how to run those of the C++ runtime; in CI they fail.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from cpp_runtime import ALL, NO_CPP, PACKAGES, Parts, build_once, use_byte_level_words
from once import end_run, start_run

from autosteer.runtime import Engine

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the command-line tools that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # `pytest &` ignores Ctrl-C, and so would the tools we start
    signal.signal(signal.SIGINT, signal.default_int_handler)


TOY_DIRECTORIES = ("unit", "cli", "serve", "conformance")

# Why tests may be skipped in CI, too: any other reason is a failure there.
ALLOWED_IN_CI = (
    "AUTOSTEER_ORT_GPU names no folder",  # no onnxruntime-gpu
    "this machine has CUDA",
    "only root may change its root folder",
)


def pytest_configure(config: pytest.Config) -> None:
    """The process that starts pytest-xdist's workers makes their folder."""
    if not hasattr(config, "workerinput"):
        start_run()


def pytest_unconfigure(config: pytest.Config) -> None:
    """And deletes it."""
    if not hasattr(config, "workerinput"):
        end_run()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the C++ runtime, so that `tools/test --fast` can leave it out."""
    for item in items:
        if {"built", "sanitised"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("cpp")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    outcome: Any = yield
    _fail_in_ci(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    outcome: Any = yield
    _fail_in_ci(outcome.get_result())


def _fail_in_ci(report: Any) -> None:
    """Make a failure of a skipped test, or a skipped file, where CI is set. Expected failures stay what they are."""
    if not (os.environ.get("CI") and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = _reason(report)
    if not any(allowed in reason for allowed in ALLOWED_IN_CI):
        report.outcome = "failed"
        report.longrepr = f"CI is set, so a skipped test fails: {reason}"


def _reason(report: Any) -> str:
    """Why a test was skipped."""
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Iterator[None]:
    """One line at the end for all tests of the C++ runtime that were skipped: why, and what to install."""
    stats = terminalreporter.stats
    skipped = stats.get("skipped", [])
    cpp = [_reason(report) for report in skipped if NO_CPP in _reason(report)]
    if cpp:
        stats["skipped"] = [report for report in skipped if NO_CPP not in _reason(report)]
    yield
    if cpp:
        stats["skipped"] = skipped
        why = cpp[0].partition(f"{NO_CPP}: ")[2]
        terminalreporter.write_line(f"{len(cpp)} tests of the C++ runtime skipped ({why}): apt-get install {PACKAGES}")


@pytest.fixture(autouse=True, scope="module")
def _toys_stay_where_they_are(request: pytest.FixtureRequest) -> Iterator[None]:
    """Packages of a few KB have nothing for huge pages, and to look for it took a third of a load (test_pages.py has
    one). Engines that tests start in other processes, and those of tests/parity, look.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name in TOY_DIRECTORIES:
            patch.setattr("autosteer.runtime.engine.placing", contextlib.nullcontext)
        yield


def load(folder: Path) -> Engine:
    """The engine of a package, on one CPU thread."""
    return Engine.load(folder, device="cpu", threads=1)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guarded toy. The whole session shares it: tests that damage something use `copy_of_package`."""
    folder = tmp_path_factory.mktemp("toy") / "package"
    toy.build(folder, videos=True)
    return folder


@pytest.fixture
def copy_of_package(package: Path, tmp_path: Path) -> Path:
    """A package that the test may damage."""
    return Path(shutil.copytree(package, tmp_path / "package"))


@pytest.fixture(scope="session")
def engine(package: Path) -> Engine:
    """The guarded toy, loaded."""
    return load(package)


@pytest.fixture(scope="session")
def attentive(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The toy whose logits depend on everything in its caches."""
    folder = tmp_path_factory.mktemp("attentive") / "package"
    toy.build(folder, attentive=True)
    return load(folder)


@pytest.fixture(scope="session")
def unguarded_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package without a gate and without images."""
    folder = tmp_path_factory.mktemp("unguarded") / "package"
    toy.build(folder, guarded=False, images=False)
    return folder


@pytest.fixture(scope="session")
def unguarded(unguarded_package: Path) -> Engine:
    """The package without a gate, loaded."""
    return load(unguarded_package)


@pytest.fixture(scope="session")
def built() -> Path:
    """autosteer-cli, autosteer-parts and libautosteer.so, with the flags that docs/embedding.md builds with."""
    return build_once("cpp", ALL)


@pytest.fixture(scope="session")
def sanitised() -> Path:
    """autosteer-parts with AddressSanitizer and UndefinedBehaviorSanitizer: its part "answer" is the whole runtime."""
    return build_once("cpp-san", ["autosteer-parts"], "-DAUTOSTEER_SANITIZE=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")


@pytest.fixture(scope="session")
def parts(built) -> Parts:
    """The parts program."""
    return Parts(built / "autosteer-parts")


@pytest.fixture(scope="session")
def cpp_package(tmp_path_factory) -> Path:
    """toy.py's package, with a tokenizer that C++ reads."""
    folder = tmp_path_factory.mktemp("toy-cpp") / "package"
    use_byte_level_words(folder, toy.build(folder, videos=True))
    return folder


@pytest.fixture(scope="session")
def cpp_engine(cpp_package) -> Engine:
    """The same in Python."""
    return Engine.load(cpp_package, device="cpu", threads=1)
