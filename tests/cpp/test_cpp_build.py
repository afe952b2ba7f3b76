"""The C++ runtime under sanitizers, a second compiler, and with nothing around it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cgroups import CASES, written
from cpp_inputs import demo, demo_requests, odd_texts
from cpp_runtime import CPP, Parts, missing

from autosteer.runtime.subgraph import CAN_BOUND_SPINNING


def test_sanitizers_find_nothing_in_whole_answers(sanitised, cpp_package):
    """Text, pictures, dialogues, every policy, a prober that raises; the odd texts. Leaks are looked for as well."""
    package, _ = demo("fp32")
    requests = [(package, request) for request in demo_requests()[::3]]
    requests.append((cpp_package, {"messages": [{"role": "user", "parts": ["crash"]}]}))
    commands = [{"part": "ask", "package": str(folder), "requests": [request]} for folder, request in requests]
    answers = Parts(sanitised / "autosteer-parts").run(
        *commands, {"part": "encode", "tokenizer": str(package / "tokenizer.json"), "texts": odd_texts(50)}
    )
    assert [a for a in answers if isinstance(a, dict) and "error" in a] == []


def test_threads_spin_where_python_lets_them(parts):
    """By the version that runs, which in these tests is the wheel's."""
    versions = ["1.21.0", "1.25.9", "1.26.0", "1.32.0", "1.100.1", "2.0.0", "1.26.0-dev", "0.30.0", "", "new"]
    answer = [False, False, True, True, True, True, True, False, False, False, CAN_BOUND_SPINNING]
    assert parts.run({"part": "spinning", "versions": versions}) == [answer]


@pytest.mark.parametrize("name", CASES)
def test_the_cpu_limits_of_a_container_are_found(parts, name: str, tmp_path: Path):
    membership, root, limits = written(tmp_path, name)
    assert parts.run({"part": "limits", "membership": str(membership), "root": str(root)}) == [limits]


def test_clang_compiles_it_too():
    """Only where clang is: the warnings of a second compiler."""
    clang = shutil.which("clang++")
    if not clang:
        missing("no clang++ (apt-get install clang)")
    include = next(
        (p for p in (Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime")) if p.is_dir()), None
    )
    if include is None:
        missing("no headers of onnxruntime")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-isystem", str(include)]
    flags += [f"-I{CPP / 'include'}", f"-I{CPP / 'src'}", '-DAUTOSTEER_VERSION="0"']
    for source in ("cli/autosteer_cli.cpp", "src/autosteer_c.cpp"):
        done = subprocess.run([clang, *flags, str(CPP / source)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]


def test_it_runs_in_a_folder_with_nothing_else(built, cpp_package, tmp_path):
    """A root file system of the command, the libraries it asks for and loads, a package: no Python, no data files."""
    if os.geteuid() != 0:
        pytest.skip("only root may change its root folder")
    root = tmp_path / "root"
    shutil.copytree(cpp_package, root / "package")
    shutil.copy(built / "autosteer-cli", root / "autosteer-cli")
    loaded = built / "lib" / "libonnxruntime.so.1"
    command = ["ldd", built / "autosteer-cli", loaded]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "python" not in listed and "onnxruntime.so" not in listed.replace(f"{loaded}:", "")
    listed += f" {loaded}"
    for word in listed.split():
        if word.startswith("/") and not word.endswith(":"):
            target = root / word.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(word).resolve(), target)
    command = ["chroot", root, "/autosteer-cli", "/package", "--prompt", "bad", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "sorryrefuse\n"), done.stderr
