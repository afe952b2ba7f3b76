"""Answer requests with the Python runtime, wherever this runs: a JSON object on stdin, a JSON line for each package.

    {"packages": [folder], "requests": [{"prompt", "policy", "image": path or null}]}
    {"package": folder, "onnxruntime", "exact", "limit", "failed": [check of the package], "answers": [as `--json`]}

`exact` says that everything is computed in float32, `limit` how far p_unsafe may be off on another machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime

from autosteer.runtime import Engine, Message, SamplingConfig
from autosteer.runtime.check import P_UNSAFE_LIMIT, check_package
from autosteer.runtime.cli import answer_json
from autosteer.runtime.console import dumps


def main() -> None:
    asked = json.load(sys.stdin)
    for name in asked["packages"]:
        folder = Path(name)
        engine = Engine.load(folder, device="cpu", threads=1)
        answers = [
            engine.generate(
                [Message.user(request["prompt"], [request["image"]] if request["image"] else [])],
                policy=engine.policy(request["policy"]),
                sampling=SamplingConfig(max_tokens=asked["max_tokens"]),
            )
            for request in asked["requests"]
        ]
        said = {
            "package": folder.name,
            "onnxruntime": onnxruntime.__version__,
            "exact": engine.manifest.exact,
            "limit": P_UNSAFE_LIMIT[engine.manifest.exact],
            "failed": [check.name for check in check_package(engine, folder) if not check.passed],
            "answers": [answer_json(answer) for answer in answers],
        }
        print(dumps(said), flush=True)


main()
