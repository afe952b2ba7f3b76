#!/usr/bin/env python3
"""Many mixed requests from several threads on one engine: each must end as it does alone, in flat memory.

    tests/attacks/soak.py [--requests 10000] [--threads 8] [--only python|cpp] [--sanitize thread]

Safe and unsafe prompts, pictures, conversations, cancelled, refused and abandoned requests, on the toy package
(tests/helpers/toy.py), with an audit record. C++ needs what docs/embedding.md builds with and clang; --sanitize builds
its library with a sanitizer. The exit code is 1 if anything differed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent / "helpers"), str(ROOT / ".typing")]

if TYPE_CHECKING:
    from autosteer.runtime import Engine

LIMIT_KIB = 20_000  # what memory may grow by after the first tenth: a leak of 2 KB a request shows


class Soak:
    """The requests, by kind. Each returns what must be the same whenever it is asked."""

    def __init__(self, engine: Engine):
        self.engine, self.unguarded = engine, 0
        self.kinds: dict[str, Callable[[int], object]] = {
            "safe": lambda n: self.ask("red"),
            "unsafe": lambda n: self.ask("bad", harmless=False),
            "stopped": lambda n: self.ask("bad", mode="stop", harmless=False),
            "prober fails": lambda n: self.ask("crash", harmless=False),
            "prober: nan": lambda n: self.ask("nan", mode="stop", harmless=False),
            "scored": lambda n: self.engine.score("bad").p_unsafe,
            "picture": self.picture,
            "conversation": self.conversation,
            "cancelled": self.cancelled,
            "refused": self.refused,
            "left": self.left,
            "sampled": self.sampled,
        }

    def ask(self, prompt: object, *, mode: str = "steer", harmless: bool = True, **more: object) -> object:
        """An answer without its timings. Counts tokens of an unsafe prompt's answer that is not guarded."""
        answer = self.engine.generate(prompt, policy=self.engine.policy(mode), **more)  # type: ignore[arg-type]
        verdict = answer.verdict
        if not harmless and verdict.action.value == "pass":
            self.unguarded += 1 + len(answer.token_ids)
        return answer.text, answer.token_ids, str(verdict.p_unsafe), verdict.action.value, answer.finish_reason

    def picture(self, number: int) -> object:
        """Two pictures, from memory."""
        import numpy as np

        blue = np.zeros((8, 8, 3), np.uint8)
        blue[..., 2] = 255
        return self.ask("look", images=[blue, blue])

    def conversation(self, number: int) -> object:
        """A safe turn, an unsafe one that is edited, a safe one."""
        from autosteer.runtime import Conversation, Message, SamplingConfig

        conversation, first = Conversation(self.engine), [Message.user("red")]
        answer = self.engine.generate(first, conversation=conversation)
        dialogue = [*first, Message.assistant(answer.text, trusted=True)]
        second = self.ask([*dialogue, Message.user("bad")], harmless=False, conversation=conversation)
        sampling = SamplingConfig(max_tokens=5)
        return second, self.ask([*dialogue, Message.user("tick")], conversation=conversation, sampling=sampling)

    def cancelled(self, number: int) -> object:
        """From another thread, at any time: a beginning of the whole answer, and then nothing."""
        from autosteer.runtime.cancel import Cancel
        from autosteer.runtime.errors import CancelledError

        cancel, go, words = Cancel(), threading.Event(), list[str]()

        def end() -> None:
            go.wait()
            cancel.set()

        other = threading.Thread(target=end)
        other.start()
        try:
            with cancel:
                for chunk in self.engine.stream("tick"):
                    words += chunk.text.split()
                    if len(words) == 1 + number % 7:
                        go.set()
        except CancelledError:
            pass
        finally:
            go.set()
            other.join()
        return all(word == expected for word, expected in zip(words, itertools.cycle(["tock", "tick"]), strict=False))

    def refused(self, number: int) -> object:
        """It does not fit."""
        from autosteer.runtime import InputError

        try:
            return self.ask("red " * 80)
        except InputError as err:
            return str(err)

    def left(self, number: int) -> object:
        """After one piece."""
        stream = self.engine.stream("hello")
        text = next(stream).text
        stream.close()
        return text

    def sampled(self, number: int) -> object:
        """With a seed."""
        from autosteer.runtime import SamplingConfig

        return self.ask("hello red", sampling=SamplingConfig(temperature=1.0, seed=7))


def rss_kib() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def in_python(package: Path, audit: Path, requests: int, threads: int) -> bool:
    """Whether all outcomes are right, and memory flat. Prints lines as soak.cpp does."""
    import logging

    from autosteer.runtime import Engine

    logging.disable()  # a line for each prober that fails
    soak = Soak(Engine.load(package, device="cpu", threads=1, audit=audit))
    alone = {name: kind(3) for name, kind in soak.kinds.items()}
    numbers, differ, memory = iter(range(requests)), list[str](), list[int]()
    lock = threading.Lock()

    def take() -> Iterator[int]:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            yield number

    def work() -> None:
        for number in take():
            name = random.Random(number).choice(list(soak.kinds))
            try:
                outcome = soak.kinds[name](number)
            except Exception as err:
                outcome = err
            if outcome != alone[name]:
                differ.append(name)
                print(f"{name}: {outcome}\n  alone: {alone[name]}", flush=True)
            if number % max(requests // 10, 1) == 0:
                memory.append(rss_kib())
                print(f"{number} requests, {memory[-1]} KiB", flush=True)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    end = f"{len(differ)} differ, {soak.unguarded} tokens of unguarded answers"
    print(f"{requests} requests, {rss_kib()} KiB; {end}", flush=True)
    return not differ and not soak.unguarded and rss_kib() < memory[min(1, len(memory) - 1)] + LIMIT_KIB


def build(folder: Path, sanitizer: str | None) -> Path:
    """soak.cpp with the library in it."""
    from cpp_runtime import wheel_library

    (folder / "lib").mkdir()
    (folder / "lib" / "libonnxruntime.so.1").symlink_to(wheel_library())
    packages = ["oniguruma", "libutf8proc", "libcrypto", "libpng", "libjpeg"]
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", *packages], capture_output=True, text=True, check=True)
    cpp = ROOT / "runtime" / "cpp"
    command = ["clang++", "-std=c++17", "-O1", "-g1", '-DAUTOSTEER_VERSION="soak"', f"-I{cpp / 'include'}"]
    command += [f"-I{cpp / 'src'}", "-I/usr/include/onnxruntime", str(HERE / "soak.cpp")]
    command += [str(cpp / "src" / "autosteer_c.cpp"), f"-Wl,-rpath,{folder / 'lib'}", *flags.stdout.split()]
    command += [*([f"-fsanitize={sanitizer}"] if sanitizer else []), "-ldl", "-pthread", "-o", str(folder / "soak")]
    subprocess.run(command, check=True)
    return folder / "soak"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--only", choices=["python", "cpp"])
    parser.add_argument("--sanitize", choices=["thread", "address"], help="for C++")
    parser.add_argument("--built", type=Path, help="soak.cpp, built already")
    args = parser.parse_args()
    import toy
    from cpp_runtime import use_byte_level_words

    good = True
    with tempfile.TemporaryDirectory(prefix="autosteer-soak-") as name:
        folder = Path(name)
        package = folder / "package"
        use_byte_level_words(package, toy.build(package, videos=True))
        if args.only != "cpp":
            good = in_python(package, folder / "python.jsonl", args.requests, args.threads) and good
        if args.only != "python":
            program = args.built or build(folder, args.sanitize)
            command = [program, package, str(args.requests), str(args.threads), folder / "cpp.jsonl"]
            env = {**os.environ, "TSAN_OPTIONS": f"suppressions={HERE / 'tsan.supp'}"}
            good = subprocess.run(command, env=env, check=False).returncode == 0 and good
        for file in sorted(folder.glob("*.jsonl")):
            print(f"{file.stem}: {len(file.read_text().splitlines())} lines in the audit record")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
