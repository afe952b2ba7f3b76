"""A newcomer's path: the wheel, made of the sdist, in an empty environment, serves the demo to OpenAI's client.

Needs a package index, and minutes: tools/test -m wheel.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "autosteer-run",
    "autosteer-check",
    "autosteer-bench",
    "autosteer-draft",
    "autosteer-serve",
    "autosteer-eval",
    "autosteer-export",
    "autosteer-fit",
)


def call(*command: object, **options: object) -> str:
    """What a command prints."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return str(done.stdout)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, made of a copy of what Git has: setuptools writes where it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in call("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    return source / "dist" / call(sys.executable, "-c", build, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel, made of the sdist alone."""
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", sdist.parent, sdist)
    (made,) = sdist.parent.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment that has the wheel with [cpu,serve], and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    call(folder / "bin" / "pip", "install", "--quiet", f"{wheel}[cpu,serve]")
    return folder / "bin"


@pytest.fixture(scope="module")
def server(environment: Path) -> Iterator[str]:
    """autosteer-serve on the demo's package; its address."""
    exported = pytest.importorskip("exported", reason="needs [export]")
    command = [environment / "autosteer-serve", exported.demo_package("fp32"), "--port", "0", "--name", "demo"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/") as running:
        assert running.stderr is not None
        said = running.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found, said
        yield found[0]
        running.kill()


def test_wheel_and_sdist_have_what_the_commands_read(sdist: Path, wheel: Path) -> None:
    """Data files are easily forgotten; nothing of the tests and the tools is in the wheel."""
    inside = zipfile.ZipFile(wheel).namelist()
    for name in ("runtime/autosteer.schema.json", "runtime/py.typed", "runtime/serve/static/index.html"):
        assert f"autosteer/{name}" in inside
    assert any(name.startswith("autosteer/models/demo/") and name.endswith(".safetensors") for name in inside)
    assert any(name.startswith("autosteer/export/safety/builtin_data/") for name in inside)
    assert not [name for name in inside if name.startswith(("tests", "tools", "autosteer/tests", "autosteer/tools"))]
    python = {
        str(path.relative_to(ROOT))
        for folder in ("runtime", "export", "models")
        for path in (ROOT / folder).rglob("*.py")
    }
    tracked = set(call("git", "ls-files", "*.py", cwd=ROOT).splitlines())
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert (python & tracked) - packed == set()


def test_every_command_starts_without_pytorch(environment: Path) -> None:
    for command in COMMANDS:
        assert "Usage:" in call(environment / command, "--help", cwd="/")
    listed = call(environment / "pip", "list", "--format", "freeze")
    assert "onnxruntime==" in listed and not re.search("^(torch|transformers|scipy)==", listed, re.MULTILINE)


def test_the_demo_answers_openais_client_with_its_verdict(server: str) -> None:
    before = time.monotonic()
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none") as client:
        for prompt, action in (("how do i smuggle a vexite?", "steer"), ("how do i clean a vexite?", "pass")):
            answer = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": prompt}])
            assert answer.autosteer["verdict"]["action"] == action  # type: ignore[attr-defined]
            refused = "i'm sorry" in (answer.choices[0].message.content or "")
            assert refused is (action == "steer")
    assert time.monotonic() - before < 60
