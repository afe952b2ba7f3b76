"""The package runs where only ONNX Runtime is: tests/node/smoke.mjs on onnxruntime-node answers as Python does.

Skipped with the reason where Node.js or its package cannot be had.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cpp_inputs import demo
from exported import INT8_CACHES, PREFILL, demo_package

from autosteer.runtime import Message, SamplingConfig
from autosteer.runtime.text import render

NODE = Path(__file__).resolve().parent
PROMPTS = ["hello", "what is a red circle?", "how do i smuggle a vexite?", "<|im_end|> 你好\n"]


@pytest.fixture(scope="session")
def node(tmp_path_factory) -> Path:
    """smoke.mjs with its one dependency beside it. Install scripts stay off: they download CUDA."""
    if not shutil.which("npm"):
        pytest.skip("no Node.js: apt-get install nodejs npm")
    folder = tmp_path_factory.mktemp("node")
    for name in ("smoke.mjs", "package.json"):
        shutil.copy(NODE / name, folder)
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install onnxruntime-node: {done.stderr.strip()[-300:]}")
    return folder


@pytest.mark.parametrize("kind", [("fp32",), ("fp32", INT8_CACHES), ("int4", PREFILL)], ids="-".join)
def test_node_gives_the_token_ids_and_verdicts_of_python(node, kind):
    """Free and steered answers, from token ids; nothing of ours but the manifest and the graphs."""
    package, engine = demo(*kind)
    requests, expected = [], []
    for prompt in PROMPTS:
        (ids,) = render([Message.user(prompt)], engine.manifest.prompt, engine.tokenizer)
        for threshold in (None, -1.0):
            requests.append({"token_ids": ids, "max_tokens": 16, "threshold": threshold})
            policy = engine.policy("steer", threshold=threshold, pieces=False)  # smoke.mjs reads whole turns alone
            expected.append(engine.generate(prompt, policy=policy, sampling=SamplingConfig(max_tokens=16)))
    done = subprocess.run(
        ["node", "smoke.mjs", str(package)],
        cwd=node,
        input="".join(json.dumps(r) + "\n" for r in requests),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line, python in zip(done.stdout.splitlines(), expected, strict=True):
        found = json.loads(line)
        assert found["token_ids"] == list(python.token_ids)
        assert (found["action"], found["finish_reason"]) == (python.verdict.action.value, python.finish_reason)
        assert found["p_unsafe"] == pytest.approx(python.verdict.p_unsafe, abs=1e-4)


def test_node_refuses_a_damaged_package(node, tmp_path):
    folder = Path(shutil.copytree(demo_package("fp32"), tmp_path / "package"))
    content = bytearray((folder / "prober.onnx").read_bytes())
    content[100] ^= 1
    (folder / "prober.onnx").write_bytes(content)
    done = subprocess.run(
        ["node", "smoke.mjs", str(folder)], cwd=node, capture_output=True, text=True, check=False, input=""
    )
    assert done.returncode != 0 and "prober.onnx: sha256 differs" in done.stderr
