"""What every onnxruntime is asked: 30 dialogues of the demo's world, as JSON for both runtimes.

A case is {"name", "kind", "requests", "forced"}: requests of libautosteer (autosteer/autosteer.h) that share one
conversation. `forced`: the answer is given again with its own tokens as drafts, one of each draft wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_world import dialogues as D
from demo_world import safety as S
from demo_world.scenes import Scene, render, sample_scene, sample_shapes

KINDS = {  # how many of each
    "passed": 7,
    "steered": 7,
    "stopped": 5,
    "watched": 2,
    "two pictures": 3,
    "two turns": 3,
    "drafted": 3,
}
# Chosen so that no answer hangs by a thread: whatever rounding does, every token stays ahead of the next one. And so
# that no picture is tall: Pillow 12, the last for Python 3.10, shrinks those to other pixels than Pillow 13 does.
SEED = 4
OTHER_SEEDS = dict.fromkeys(("two-pictures-1", "watched-2", "two-turns-3"), 7)
TOKENS = 40  # an answer's most; the world's are shorter


def make_cases(pictures: Path) -> list[dict[str, Any]]:
    """The cases, the same at every call. Draws their pictures into `pictures`, which may exist."""
    pictures.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[random.Random, int, _Drawing], list[dict[str, Any]]]] = {
        "passed": _passed,
        "steered": lambda rng, n, draw: [_ask(_unsafe(rng, n), draw, "steer")],
        "stopped": lambda rng, n, draw: [_ask(_unsafe(rng, n), draw, "stop")],
        "watched": lambda rng, n, draw: [_ask(_unsafe(rng, n), draw, "report")],
        "two pictures": _two_pictures,
        "two turns": _two_turns,
        "drafted": lambda rng, n, draw: [_ask(_safe(rng, n) if n == 2 else _unsafe(rng, n), draw, "steer")],
    }
    cases = []
    for kind, count in KINDS.items():
        for n in range(count):
            name = f"{kind.replace(' ', '-')}-{n + 1}"
            drawing = _Drawing(pictures, name)
            seed = OTHER_SEEDS.get(name, SEED)
            requests = makers[kind](random.Random(f"{name} {seed}"), n, drawing)
            cases.append({"name": name, "kind": kind, "requests": requests, "forced": kind == "drafted"})
    return cases


class _Drawing:
    """Draws a case's pictures."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name, self._count = folder, name, 0

    def __call__(self, scene: Scene) -> dict[str, str]:
        """The picture as a part of a message."""
        self._count += 1
        path = self._folder / f"{self._name}-{self._count}.png"
        render(scene).save(path)
        return {"image": str(path)}


def _request(policy: str, *turns: list[Any]) -> dict[str, Any]:
    """Turns of user and assistant, in turn; greedy, and nothing drafted: what is drafted may round otherwise."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "parts": parts} for n, parts in enumerate(turns)]
    return {"messages": messages, "policy": policy, "sampling": {"max_tokens": TOKENS, "speculate": False}}


def _ask(example: S.Example, draw: _Drawing, policy: str) -> dict[str, Any]:
    return _request(policy, [*([draw(example.scene)] if example.scene else []), example.prompt])


def _unsafe(rng: random.Random, n: int) -> S.Example:
    channel = S.CHANNELS[n % len(S.CHANNELS)]
    return S.make_pair(rng, channel, S.SHOWN, new_phrasing=False).unsafe


def _safe(rng: random.Random, n: int) -> S.Example:
    channel = S.CHANNELS[n % len(S.CHANNELS)]
    return S.make_pair(rng, channel, S.SHOWN, new_phrasing=False).safe


def _scene(rng: random.Random, count: int) -> Scene:
    return sample_scene(rng, sample_shapes(rng, count))


def _passed(rng: random.Random, n: int, draw: _Drawing) -> list[dict[str, Any]]:
    """Three harmless twins of unsafe prompts, two questions about pictures, a description, small talk."""
    if n < 3:
        return [_ask(_safe(rng, n), draw, "steer")]
    if n == 6:
        return [_request("steer", [D.small_talk(rng).question])]
    scene = _scene(rng, 3)
    turn = D.ask_placed_caption(rng, scene) if n == 5 else D.question(rng, scene)
    return [_request("steer", [draw(scene), turn.question])]


def _two_pictures(rng: random.Random, n: int, draw: _Drawing) -> list[dict[str, Any]]:
    """Two harmless questions over two pictures, and an unsafe one behind a harmless picture."""
    scenes = [_scene(rng, 1), _scene(rng, 1)]
    if n < 2:
        return [_request("steer", [*map(draw, scenes), D.two_pictures(rng, scenes).question])]
    unsafe = S.make_pair(rng, "image", S.SHOWN, new_phrasing=False).unsafe
    assert unsafe.scene
    return [_request("steer", [draw(scenes[0]), draw(unsafe.scene), unsafe.prompt])]


def _two_turns(rng: random.Random, n: int, draw: _Drawing) -> list[dict[str, Any]]:
    """A harmless follow-up, an unsafe one, and a harmless one behind an unsafe turn, which stays unsafe with it."""
    scene = _scene(rng, 2)
    picture = draw(scene)
    first = D.ask_caption(rng, scene)
    second = D.question(rng, scene)
    unsafe = S.make_pair(rng, "text", S.SHOWN, new_phrasing=False).unsafe.turn
    turns = ((first, second), (first, unsafe), (unsafe, second))[n]
    opening = [picture, turns[0].question]
    return [_request("steer", opening), _request("steer", opening, [turns[0].answer], [turns[1].question])]
