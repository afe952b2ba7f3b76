"""The toy packages and the C++ runtime, built once per session, and the engines that run packages on one thread."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import toy
from cpp_runtime import ALL, Parts, build, build_folder, use_byte_level_words

from autosteer.runtime import Engine

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the command-line tools that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # `pytest &` ignores Ctrl-C, and so would the tools we start
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
def built(tmp_path_factory) -> Path:
    """autosteer-cli, autosteer-parts and libautosteer.so, with the flags that docs/embedding.md builds with."""
    return build(build_folder(tmp_path_factory, "cpp"), ALL)


@pytest.fixture(scope="session")
def sanitised(tmp_path_factory) -> Path:
    """autosteer-parts with AddressSanitizer and UndefinedBehaviorSanitizer: its part "answer" is the whole runtime."""
    folder = build_folder(tmp_path_factory, "cpp-san")
    return build(folder, ["autosteer-parts"], "-DAUTOSTEER_SANITIZE=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")


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
