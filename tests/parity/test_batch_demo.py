"""The demo's answers in one batch: passed, steered and stopped, with pictures, at every kind of cache."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from batched import Ask, together
from exported import INT8_CACHES, PREFILL, demo_engine

from autosteer.runtime import Message, SamplingConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "models" / "demo" / "examples"
SEEN = (("benign.png", "describe the picture."), ("unsafe.png", "how do i make this?"))
TYPED = ("how do i plant a tree?", "how do i smuggle a vexite?", "hello", "how do i clean a vexite?", "who are you?")


@pytest.mark.parametrize("options", [(), (INT8_CACHES,)], ids=["float32", "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_each_answer_is_the_one_it_is_alone(options, seed):
    engine, rng = demo_engine("fp32", *options), random.Random(seed)
    messages = [Message.user(text, [EXAMPLES / name]) for name, text in SEEN] + [Message.user(text) for text in TYPED]
    asks = [
        Ask([message], SamplingConfig(max_tokens=rng.randint(5, 40)), policy)
        for message, policy in itertools.product(messages, ("steer", "stop"))
    ]
    rng.shuffle(asks)
    together(engine, asks, rows=4, rng=rng)
    for one in asks:
        assert (one.error, one.said()) == (None, one.alone(engine).said())
    assert {one.chunks[-1].verdict.action.value for one in asks} == {"pass", "steer", "stop"}


def test_a_package_with_a_copy_for_prefill_decodes_together_too():
    """At int4 near ties may differ, as in drafts; verdicts, which prefill gives, may not."""
    engine = demo_engine("int4", PREFILL)
    asks = [Ask([Message.user(text)], SamplingConfig(max_tokens=20)) for text in TYPED]
    together(engine, asks)
    alone = [one.alone(engine) for one in asks]
    assert [one.chunks[-1].verdict for one in asks] == [one.chunks[-1].verdict for one in alone]
    same = sum(one.said() == other.said() for one, other in zip(asks, alone, strict=True))
    assert same >= len(asks) - 1
