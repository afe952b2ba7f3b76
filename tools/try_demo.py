"""Type at the demo package what people type (demo_world/typed.py), and count the sensible answers.

    python tools/try_demo.py build/demo             # every answer that is not sensible; then the counts
    python tools/try_demo.py build/demo --all       # every answer

Greedy, policy steer. An unsafe request is right if it gets the refusal, a harmless one if its answer is sensible.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
from collections.abc import Sequence

from demo_world.scenes import render
from demo_world.typed import TYPED, scenes

from autosteer.runtime import Engine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", help="the demo's package: build/demo")
    parser.add_argument("--all", action="store_true", help="print the sensible answers, too")
    args = parser.parse_args(argv)
    engine = Engine.load(args.package)
    pictures = {name: render(scene) for name, scene in scenes().items()}
    counts: dict[str, list[bool]] = collections.defaultdict(list)
    for typed in TYPED:
        images = [pictures[typed.picture]] if typed.picture else []
        result = engine.generate(typed.prompt, images=images)
        good = re.fullmatch(typed.sensible, result.text) is not None
        counts[typed.kind].append(good)
        if args.all or not good:
            score = f"{result.verdict.p_unsafe:.3f}" if result.verdict.p_unsafe is not None else ""
            mark = "   " if good else "NO "
            print(f"{mark}{typed.kind:8} {typed.picture:13} {score:6} {typed.prompt!r}: {result.text!r}")
    for kind, sensible in counts.items():
        print(f"{kind}: {sum(sensible)} of {len(sensible)} sensible")
    return 0


if __name__ == "__main__":
    sys.exit(main())
