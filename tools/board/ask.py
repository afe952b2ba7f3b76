"""Answer requests with the Python runtime, wherever this runs: a JSON object on stdin, a JSON line for each package.

    {"packages": [folder], "check": [folder], "requests": [{"prompt", "policy", "image": path or null}], "max_tokens"}
    {"package": name, "exact", "limit", "failed": [line of autosteer-check], "answers": [as `autosteer-run --json`]}

`exact` says that everything is computed in float32, `limit` how far p_unsafe may be off on another machine. Only the
packages of "check" are checked: their golden prompts take longer than the requests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from autosteer.runtime import Engine, Message, SamplingConfig
from autosteer.runtime.check import check_package
from autosteer.runtime.cli.answer import answer_json
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
        checks = check_package(engine, folder).checks if name in asked["check"] else []
        said = {
            "package": folder.name,
            "exact": engine.manifest.exact,
            "limit": engine.manifest.tolerance.p_unsafe,
            "failed": [line.name for line in checks if not line.passed],
            "answers": [answer_json(answer) for answer in answers],
        }
        print(dumps(said), flush=True)


main()
