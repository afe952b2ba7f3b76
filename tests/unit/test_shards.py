"""Rows asked of several workers, which may be lost, give what one engine gives (evaluation/shards.py), without Ray."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from autosteer.runtime import InputError, Message
from autosteer.runtime.cluster import LOCAL, connected
from autosteer.runtime.errors import AutoSteerError
from autosteer.runtime.evaluation.datasets import Row
from autosteer.runtime.evaluation.on_ray import Node, Worker, place, with_pictures
from autosteer.runtime.evaluation.refusals import RuleJudge
from autosteer.runtime.evaluation.run import Asked, ResultFile, RunFacts, ask, run_rows
from autosteer.runtime.evaluation.shards import SHARD, LostError, in_order
from autosteer.runtime.manifest import MANIFEST_FILE, sha256
from autosteer.runtime.text import ImagePart


def rows_of(*texts: str) -> list[Row]:
    return [Row((Message.user(t),), False, "g", None, where=f"d:{n}") for n, t in enumerate(texts, 1)]


MANY = rows_of(*(f"row {n}" for n in range(10 * SHARD + 1)))


class FakePool:
    """Workers that finish in a random order. `dies(worker, rows)` says whether a worker is lost on a shard, and
    `dies(worker, [])` whether it is while it opens the package.
    """

    def __init__(
        self,
        count: int = 2,
        seed: int = 0,
        dies: Callable[[str, Sequence[Row]], bool] = lambda worker, rows: False,
        answer: Callable[[Row], str | AutoSteerError] = lambda row: row.prompt,
    ):
        self.workers = [f"w{n}" for n in range(count)]
        self.dies, self.answer, self.random = dies, answer, random.Random(seed)
        self.busy: dict[str, Sequence[Row]] = dict.fromkeys(self.workers, ())
        self.asked: list[str] = []
        self.lost: list[Sequence[Row]] = []

    def start(self, worker: str, rows: Sequence[Row]) -> None:
        assert worker in self.workers and worker not in self.busy and rows
        assert not self.lost or rows == self.lost.pop()  # the output waits for them
        self.busy[worker] = rows
        self.asked += [row.where for row in rows]

    def wait(self) -> tuple[str, list[str | AutoSteerError] | LostError]:
        worker = self.random.choice(list(self.busy))
        rows = self.busy.pop(worker)
        if self.dies(worker, rows):
            self.workers.remove(worker)
            self.lost += [rows] if rows else []
            return worker, LostError("killed")
        found: list[str | AutoSteerError] = []
        for row in rows:
            found.append(self.answer(row))
            if isinstance(found[-1], AutoSteerError):
                break
        return worker, found


def texts(rows: Sequence[Row]) -> list[str]:
    return [row.prompt for row in rows]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_the_answers_come_in_the_order_of_the_rows(count, seed):
    pool = FakePool(count, seed)
    assert list(in_order(pool, MANY, report=pytest.fail)) == texts(MANY)
    assert sorted(pool.asked) == sorted(row.where for row in MANY)  # each once


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("number", [9, 10 * SHARD - 1])  # the last whole shard: the other workers may be idle
def test_a_lost_worker_costs_its_shard_which_another_answers(seed, number):
    died: list[str] = []

    def dies(worker: str, rows: Sequence[Row]) -> bool:
        if MANY[number] in rows and not died:
            died.append(worker)
            return True
        return False

    pool, said = FakePool(3, seed, dies), []
    assert list(in_order(pool, MANY, report=said.append)) == texts(MANY)
    again = [where for where in pool.asked if pool.asked.count(where) > 1]
    assert len(set(again)) == SHARD and len(again) == 2 * SHARD and MANY[number].where in again
    assert said == [f"lost {died[0]}: killed; others go on"]


def test_workers_that_never_open_the_package_are_done_without():
    pool = FakePool(3, dies=lambda worker, rows: not rows and worker != "w1")
    assert list(in_order(pool, MANY, report=lambda line: None)) == texts(MANY)
    pool = FakePool(3, dies=lambda worker, rows: not rows)
    with pytest.raises(LostError, match=r"no worker is left; the last, w\d, was lost: killed"):
        list(in_order(pool, MANY, report=lambda line: None))


@pytest.mark.parametrize("seed", range(10))
def test_a_row_that_kills_every_worker_is_named_after_the_answers_before_it(seed):
    kills = SHARD * 2  # the first row of a shard
    pool = FakePool(3, seed, dies=lambda worker, rows: MANY[kills] in rows)
    answers = in_order(pool, MANY, report=lambda line: None)
    assert [next(answers) for _ in range(kills)] == texts(MANY[:kills])
    with pytest.raises(LostError, match=rf"no worker is left; .* while it was asked d:{kills + 1} and what follows"):
        next(answers)


@pytest.mark.parametrize("seed", range(10))
def test_the_first_row_that_cannot_be_asked_ends_the_run_after_those_before_it(seed):
    """As one engine does it, though a later row may have failed earlier."""
    bad = {"row 6": InputError("d:7: cannot be asked"), "row 25": InputError("d:26: cannot be asked")}
    answers = in_order(FakePool(3, seed, answer=lambda row: bad.get(row.prompt, row.prompt)), MANY, report=pytest.fail)
    assert [next(answers) for _ in range(6)] == texts(MANY[:6])
    with pytest.raises(InputError, match="d:7: cannot"):
        next(answers)


def test_rows_that_are_equal_are_each_answered():
    rows = rows_of(*(["same"] * (2 * SHARD + 1)))
    pool = FakePool(2)
    assert list(in_order(pool, rows, report=pytest.fail)) == ["same"] * len(rows)
    assert len(pool.asked) == len(rows)


def test_no_worker_is_idle_while_the_reader_is_slow():
    """A judge may take seconds for an answer."""
    pool = FakePool(2)
    answers = in_order(pool, MANY, report=pytest.fail)
    next(answers)
    assert len(pool.busy) == 2


@pytest.mark.parametrize("kept", [0, 1, SHARD, 2 * SHARD + 3])
def test_a_file_begun_by_one_engine_and_ended_by_several_is_the_same(tmp_path, kept):
    facts = RunFacts("p", "d", 8, "rules")

    def said(row: Row) -> Asked:
        return Asked(row.prompt, "sorry", row.prompt, row.prompt, flagged=False, p_unsafe=0.1 + len(row.prompt) / 3)

    def write(path, asked, rows):
        with ResultFile(path, facts, force=False) as file:
            for result in run_rows(asked, rows[len(file.done) :], RuleJudge()):
                file.append(result)

    write(tmp_path / "one", map(said, MANY), MANY)
    write(tmp_path / "many", map(said, MANY[:kept]), MANY[:kept])
    first_dies = FakePool(3, 1, dies=lambda worker, rows: worker == "w0" and bool(rows), answer=said)
    write(tmp_path / "many", in_order(first_dies, MANY[kept:], report=lambda line: None), MANY)
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()


# --- where engines go ------------------------------------------------------------------------------------------------

BIG, SMALL, NONE = Node("b", "big", 16), Node("s", "small", 4), Node("h", "head", 0)


@pytest.mark.parametrize(
    ("nodes", "engines", "threads", "expected"),
    [
        ([BIG, SMALL, NONE], None, None, [("big", 16), ("small", 4)]),  # one on each node that computes
        ([BIG, SMALL], None, 2, [("big", 2), ("small", 2)]),
        ([BIG], 4, None, [("big", 4)] * 4),
        ([BIG], 5, None, [("big", 3)] * 5),
        ([BIG, SMALL], 2, None, [("big", 8)] * 2),
        ([SMALL, BIG], 5, None, [("big", 4)] * 4 + [("small", 4)]),
    ],
)
def test_engines_share_the_cores_of_their_node(nodes, engines, threads, expected):
    assert sorted((p.node.host, p.threads) for p in place(nodes, engines, threads)) == sorted(expected)


@pytest.mark.parametrize(
    ("nodes", "engines", "threads", "message"),
    [
        ([NONE], None, None, "no node of the cluster offers a CPU"),
        ([SMALL], 5, None, "5 engines of 1 threads do not fit on small, which offers 4 CPUs"),
        ([BIG, SMALL], None, 8, "1 engines of 8 threads do not fit on small"),
    ],
)
def test_engines_that_do_not_fit_are_refused(nodes, engines, threads, message):
    """Ray would wait for CPUs that no node has, without end."""
    with pytest.raises(InputError, match=message):
        place(nodes, engines, threads)


# --- what is sent to them --------------------------------------------------------------------------------------------


def test_a_row_is_sent_with_its_pixels_and_a_damaged_picture_is_an_answer(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    row = Row((Message.user("look", [tmp_path / "x.png"]),), False, "g", None, where="d:3")
    sent = with_pictures(row)
    assert (
        isinstance(sent, InputError) and "d:3: cannot be asked: " in str(sent) and "not a readable image" in str(sent)
    )
    from PIL import Image

    Image.new("RGB", (3, 2), "red").save(tmp_path / "x.png")
    sent = with_pictures(row)
    assert isinstance(sent, Row)
    picture, text = sent.messages[0].parts
    assert isinstance(picture, ImagePart) and picture.image.shape == (2, 3, 3) and text == "look"
    assert (sent.where, sent.group) == ("d:3", "g")


# --- what a worker opens, and which clusters are used -----------------------------------------------------------------


def opened(monkeypatch, package: Path, digest: str, mode: str = "token") -> str:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    found = Worker().open(package, digest, 1)
    return str(found) if isinstance(found, AutoSteerError) else "opened"


def test_a_worker_opens_only_the_package_that_was_meant(package, copy_of_package, monkeypatch, tmp_path):
    digest = sha256(package / MANIFEST_FILE)
    assert opened(monkeypatch, copy_of_package, digest) == "opened"
    assert opened(monkeypatch, tmp_path / "none", digest) == (
        f"no package at {tmp_path / 'none'}; every node needs it there: copy it, or name a folder that they share"
    )
    with (copy_of_package / MANIFEST_FILE).open("a") as file:
        file.write("\n")
    assert "is another package than here" in opened(monkeypatch, copy_of_package, digest)
    assert "takes no tokens" in opened(monkeypatch, package, digest, mode="disabled")


def test_a_worker_answers_up_to_the_first_row_that_fails(package, engine, monkeypatch):
    worker = Worker()
    monkeypatch.setattr(worker, "_engine", engine, raising=False)
    rows = rows_of("red", "red " * 99, "red")
    call = partial(ask, max_tokens=4)
    good, bad = worker.answer(call, rows)
    assert isinstance(good, Asked) and isinstance(bad, InputError) and "d:2: cannot be asked" in str(bad)
    assert worker.answer(call, [InputError("x"), rows[0]])[1:] == []


@pytest.mark.parametrize(
    ("address", "environment", "message"),
    [
        ("auto", {}, "whoever reaches a cluster without tokens runs code on it; start it with RAY_AUTH_MODE=token"),
        ("10.0.0.1:6379", {"RAY_AUTH_MODE": "disabled"}, "without tokens"),
        ("ray://10.0.0.1:10001", {"RAY_AUTH_MODE": "token"}, "give the head's HOST:PORT, and run this on a node"),
        ("auto", {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "ray://10.0.0.1:10001"}, "ray ray://10.0.0.1:10001: give"),
        ("127.0.0.1:1", {"RAY_AUTH_MODE": "token"}, r"ray 127.0.0.1:1: no connection to a cluster \(.*refused"),
        ("127.0.0.1:99999", {"RAY_AUTH_MODE": "token"}, "no connection to a cluster"),
        ("head", {"RAY_AUTH_MODE": "token"}, "ray head: give auto, local, or the head's HOST:PORT"),
    ],
)
def test_a_cluster_without_tokens_or_without_a_head_is_not_used(monkeypatch, address, environment, message):
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "ray", None)  # it must not come so far
    with pytest.raises(InputError, match=message), connected(address):
        pass


def test_without_its_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "Token")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(InputError, match=r"--ray needs Ray .*pip install 'autosteer-edge\[ray\]'"),
        connected("auto"),
    ):
        pass


def test_what_ray_prints_and_how_it_ends_is_not_seen(monkeypatch, capsys):
    """It prints what became of workers between the tables, or the JSON; and SIGTERM ended the command with 15."""

    def init(address, **options):
        assert (address, options["include_dashboard"]) == ("local", False)
        assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
        print("init")
        signal.signal(signal.SIGTERM, lambda *_: None)

    fake = SimpleNamespace(init=init, shutdown=lambda: print("shutdown"), exceptions=SimpleNamespace(RayError=OSError))
    monkeypatch.setitem(sys.modules, "ray", fake)
    for name in (*LOCAL, "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # and put back afterwards
    before = signal.getsignal(signal.SIGTERM)
    with connected("local"):
        print("a worker died")
        assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr() == ("", "init\na worker died\nshutdown\n")
