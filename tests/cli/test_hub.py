"""Packages on the hub: named instead of a folder, and uploaded by the export. The hub is tests/helpers/hub_stub.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stub import COMMIT, TOKEN, HubStub

from autosteer.export.push import model_card
from autosteer.runtime.manifest import Manifest

REPO = "me/toy"


@pytest.fixture
def hub(package: Path) -> Iterator[HubStub]:
    """A hub with the toy package, and a file that belongs to no package."""
    stub = HubStub()
    files = {str(f.relative_to(package)): f.read_bytes() for f in package.rglob("*") if f.is_file()}
    stub.files[REPO] = {**files, "notes.txt": b"not the package's"}
    with stub.serving():
        yield stub


def run(hub: HubStub, home: Path, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """autosteer-run on a package of the hub, as a new process (huggingface_hub reads its environment once)."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    code = "from autosteer.runtime.cli import run_main; run_main()"
    if hub.cut_after is not None:
        code = f"import time; time.sleep = lambda seconds: None; {code}"  # huggingface_hub waits before it tries again
    return subprocess.run(
        [sys.executable, "-c", code, name, "-p", "hello", "--device", "cpu", "--threads", "1", "--max-tokens", "2"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def folder(home: Path, revision: str = "main") -> Path:
    """Where the toy's download is kept."""
    return home / "autosteer" / REPO.replace("/", "--") / revision


def test_a_package_is_downloaded_checked_and_used_again_without_the_hub(hub: HubStub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, f"hf:{REPO}")
    assert done.returncode == 0, done.stderr
    assert not (folder(tmp_path) / "notes.txt").exists(), "what is not the package's is not downloaded"
    hub.requests.clear()
    assert run(hub, tmp_path, f"hf:{REPO}").returncode == 0
    assert not any(asked.startswith("GET decoder") for asked in hub.requests), "nothing is downloaded twice"
    offline = run(hub, tmp_path, f"hf:{REPO}", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


def test_a_revision_has_its_own_folder(hub: HubStub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, f"hf:{REPO}@refs/pr/1").returncode == 0
    assert (folder(tmp_path, "refs--pr--1") / "autosteer.json").exists()


def test_a_file_that_was_changed_on_the_hub_is_refused(hub: HubStub, tmp_path: Path) -> None:
    weights = next(name for name in hub.files[REPO] if name.endswith("lm_head.onnx"))
    hub.files[REPO][weights] += b"\0"
    done = run(hub, tmp_path, f"hf:{REPO}")
    assert done.returncode == 3 and "sha256 differs" in done.stderr


def test_a_download_that_was_cut_off_goes_on(hub: HubStub, tmp_path: Path) -> None:
    hub.cut_after = 3000
    done = run(hub, tmp_path, f"hf:{REPO}", HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert done.returncode == 5 and "run the command again to go on" in done.stderr, done.stderr
    hub.cut_after = None
    assert run(hub, tmp_path, f"hf:{REPO}").returncode == 0


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("hf:me", {}, "write hf:owner/name, or hf:owner/name@revision"),
        ("hf:me/../..", {}, "write hf:owner/name"),
        ("hf:me/none", {}, "hf:me/none: not downloaded"),
        (f"hf:{REPO}", {"HF_HUB_OFFLINE": "1"}, "not downloaded yet, and the hub cannot be reached"),
    ],
)
def test_what_cannot_be_downloaded_is_said_in_one_line(
    name: str, environment: dict[str, str], message: str, hub: HubStub, tmp_path: Path
) -> None:
    done = run(hub, tmp_path, name, **environment)
    assert done.returncode == 5 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_card_says_what_the_gate_was_measured_to_do(package: Path) -> None:
    manifest = Manifest.load(package)
    card = model_card(manifest, REPO)
    assert f"autosteer-run hf:{REPO}" in card
    assert manifest.prober is not None and f"{manifest.prober.threshold:g}" in card


def test_a_package_is_uploaded_with_its_card_and_can_be_run_from_the_hub(
    hub: HubStub, package: Path, tmp_path: Path
) -> None:
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    code = "import sys; from pathlib import Path; from autosteer.export.push import *"
    code += "; check_login('me/new'); print(push(Path(sys.argv[1]), 'me/new'))"
    hub.lfs_bytes = 1000
    done = subprocess.run(
        [sys.executable, "-c", code, str(package)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/new/commit/{COMMIT}"
    assert hub.objects, "nothing was uploaded as an LFS object"
    uploaded = hub.files["me/new"]
    assert uploaded.keys() - {"README.md"} == Manifest.load(package).paths().keys() | {"autosteer.json"}
    assert b"library_name: autosteer-edge" in uploaded["README.md"]
    assert run(hub, tmp_path / "other", "hf:me/new").returncode == 0


def test_who_may_not_upload_learns_it_before_the_export(hub: HubStub, tmp_path: Path) -> None:
    arguments = ["--model", "demo", "--output", str(tmp_path / "demo"), "--push", "me/demo"]
    code = "from autosteer.export.cli import main; main()"
    for token, message in (("", "not logged in"), ("hf_wrong", "--push me/demo: ")):
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": token}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 5 and message in done.stderr, done.stderr
        assert not (tmp_path / "demo").exists()
