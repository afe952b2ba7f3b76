"""Measure the gate on a data set: what it catches, misses and wrongly refuses. For autosteer-eval.

    datasets.py   files -> Row            grading.py      is an answer right?
    refusals.py   is it a refusal?        statistics.py   intervals and paired tests

Two generations per row, `off` and `always`, give the results of four policies: under `steer` and `stop` the answer to
a prompt that the gate lets pass is the unsteered one, token for token (tests/unit/test_engine.py tests that). A third
generation runs for

- a flagged prompt: `stop` is the refusal text, but the gate judges a steered answer;
- an answer that the monitor or the judge of answers stopped: it counts as refused.

Results are appended to the output file one by one, so that an interrupted run can continue.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from autosteer.runtime.console import dumps
from autosteer.runtime.engine import Engine
from autosteer.runtime.errors import InputError, PackageError
from autosteer.runtime.gate import Mode
from autosteer.runtime.manifest import MANIFEST_FILE, Manifest, sha256
from autosteer.runtime.sampling import SamplingConfig
from autosteer.runtime.strict_json import decode

from .datasets import Row, cannot_be_asked
from .grading import is_correct
from .refusals import Judge
from .statistics import PairedTest, Rate, mcnemar, rate

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

POLICIES = ("off", "always", "steer", "stop")
WATCHED = ("steer", "stop")  # of these, what a monitor may stop
COMPARED = (("off", "steer"), ("always", "steer"), ("steer", "stop"))


@dataclass(frozen=True)
class Result:
    """The answers to one row, by policy."""

    row: str  # Row.digest
    group: str
    unsafe: bool
    prompt: str
    p_unsafe: float | None  # None: NaN
    flagged: bool
    answers: dict[str, str]
    refused: dict[str, bool]
    correct: dict[str, bool] | None
    stopped: bool | None = None  # by the monitor or the judge of answers, where the prompt is safe; None: there is none


@dataclass(frozen=True)
class Group:
    """A group's rates, with 95 % intervals, and the paired tests between policies."""

    group: str
    unsafe: bool
    n: int
    flagged: Rate
    not_refused: dict[str, Rate]  # attack success, if `unsafe`
    graded: int  # rows with a right answer
    accuracy: dict[str, Rate | None]
    tests: tuple[PairedTest, ...]
    stopped: Rate | None  # answers that the monitor or the judge of answers stopped; None: there is none


@dataclass(frozen=True)
class Asked:
    """What the engine said to one row."""

    off: str  # without a gate
    always: str  # with every token steered; of a prompt in obfuscated letters, the refusal text
    steer: str
    stop: str
    flagged: bool
    p_unsafe: float | None  # None: the prober failed
    stopped: bool | None = None  # whether one of these stopped an answer that the prober let begin; None: there is none


def ask(engine: Engine, row: Row, *, max_tokens: int, pieces: bool = True, judge_answers: bool = False) -> Asked:
    """Answer a row two or three times, greedily. `pieces`, `judge_answers`: GatePolicy's.

    Raises InputError for one that cannot be asked.
    """
    sampling = SamplingConfig(max_tokens=max_tokens)
    report, gate = (
        engine.policy(mode, pieces=pieces, judge_answers=judge_answers) for mode in (Mode.REPORT, Mode.STEER)
    )
    always = engine.policy(threshold=-1.0, pieces=False)
    try:
        off = engine.generate(row.messages, policy=report, sampling=sampling)
    except InputError as err:
        raise cannot_be_asked(row, err) from err
    steered = engine.generate(row.messages, policy=always, sampling=sampling).text
    verdict, seen = off.verdict, off.verdict.answer
    stopped = bool(seen and seen.unsafe and not verdict.unsafe) if engine.manifest.monitor or judge_answers else None
    steer = stop = engine.generate(row.messages, policy=gate, sampling=sampling).text if stopped else off.text
    if verdict.unsafe:
        stop = report.refusal_text
        steer = engine.generate(row.messages, policy=gate, sampling=sampling).text
    return Asked(off.text, steered, steer, stop, verdict.unsafe, verdict.p_unsafe, stopped)


def run_rows(asked: Iterable[Asked], rows: Sequence[Row], judge: Judge) -> Iterator[Result]:
    """The results of all rows, in their order, as what was `asked` of each comes in."""
    for said, row in zip(asked, rows, strict=True):
        answers = {policy: getattr(said, policy) for policy in POLICIES}
        gold, score = row.gold, said.p_unsafe
        yield Result(
            row=row.digest,
            group=row.group,
            unsafe=row.unsafe,
            prompt=row.prompt,
            p_unsafe=score if score is not None and math.isfinite(score) else None,
            flagged=said.flagged,
            answers=answers,
            refused=_refused(judge, row.prompt, answers, bool(said.stopped)),
            correct=None if gold is None else {p: is_correct(t, gold) for p, t in answers.items()},
            stopped=said.stopped,
        )


def _refused(judge: Judge, prompt: str, answers: dict[str, str], stopped: bool) -> dict[str, bool]:
    """By policy, whether its answer is a refusal; what was `stopped` is, however it began."""
    said = {text: judge.refused(prompt, text) for text in dict.fromkeys(answers.values())}
    return {policy: said[text] or (stopped and policy in WATCHED) for policy, text in answers.items()}


def summarise(results: Sequence[Result]) -> list[Group]:
    """Rates by group, in order of appearance."""
    by_group: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        by_group.setdefault((result.group, result.unsafe), []).append(result)
    return [_group(name, unsafe, members) for (name, unsafe), members in by_group.items()]


def _group(name: str, unsafe: bool, members: Sequence[Result]) -> Group:
    n, graded = len(members), [r.correct for r in members if r.correct is not None]
    refused = [r.refused for r in members]
    outcomes = {"refused": refused, **({"correct": graded} if graded else {})}
    return Group(
        group=name,
        unsafe=unsafe,
        n=n,
        flagged=rate(sum(r.flagged for r in members), n),
        not_refused={p: rate(sum(not r[p] for r in refused), n) for p in POLICIES},
        graded=len(graded),
        accuracy={p: rate(sum(c[p] for c in graded), len(graded)) if graded else None for p in POLICIES},
        tests=tuple(
            mcnemar(outcome, first, second, [(r[first], r[second]) for r in rows])
            for outcome, rows in outcomes.items()
            for first, second in COMPARED
        ),
        stopped=None if members[0].stopped is None else rate(sum(bool(r.stopped) for r in members), n),
    )


# --- the output file -------------------------------------------------------------------------------------------------


# Facts of a run; its rows are compared one by one.
SAME_ANSWERS = ("package", "max_tokens", "max_tiles", "pieces", "judge_answers")


@dataclass(frozen=True)
class RunFacts:
    """What identifies a run. The first line of an output file: {"run": ...}."""

    package: str  # sha256 of autosteer.json, which has the hashes of everything else
    data: str  # sha256 of all rows and their pictures
    max_tokens: int
    judge: str
    max_tiles: int | None = None  # of a picture
    pieces: bool = True
    judge_answers: bool = False

    @staticmethod
    def of(
        package: Path,
        rows: Sequence[Row],
        judge: Judge,
        *,
        max_tokens: int,
        max_tiles: int | None = None,
        pieces: bool = True,
        judge_answers: bool | None = None,
    ) -> RunFacts:
        """The facts of a run that is about to start. `judge_answers`: None: as the package says."""
        data = hashlib.sha256("".join(row.digest for row in rows).encode()).hexdigest()
        judged = Manifest.load(package).judges_answers(judge_answers, pieces=pieces)
        return RunFacts(sha256(package / MANIFEST_FILE), data, max_tokens, judge.name, max_tiles, pieces, judged)


def rejudge(path: Path, facts: RunFacts, judge: Judge) -> None:
    """Judge all answers in a file again and replace it. The run may differ from `facts` only in its judge.

    Raises InputError if the file belongs to another run, or the judge gives no verdict.
    """
    scratch = path.with_name(f"{path.name}.rejudged")
    try:
        with path.open("a", encoding="utf-8") as held, ResultFile(scratch, facts, force=True) as file:
            _lock(held, path)
            for result in _read_results(path, facts, same=SAME_ANSWERS):
                refused = _refused(judge, result.prompt, result.answers, bool(result.stopped))
                file.append(dataclasses.replace(result, refused=refused))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


class ResultFile:
    """A JSONL file of results that grows row by row; a context manager. `done`: the results that it had when opened."""

    def __init__(self, path: Path, facts: RunFacts, *, force: bool):
        """Open or create the file. `force` overwrites it.

        Raises InputError if it belongs to another run, is being written by one, is not a result file, or cannot be
        written.
        """
        self.done: list[Result] = []
        existed = path.exists()
        if existed and not path.is_file():  # a device would be read without end, a pipe waited for
            raise InputError(f"{path}: not a file; choose another --output")
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as err:
            raise InputError(f"--output {path}: cannot be written ({err.strerror})") from err
        try:
            _lock(self._file, path)
            if existed and not force and not _is_cut_off(path):
                self.done = _read_results(path, facts, same=("judge", *SAME_ANSWERS))
            else:
                self._file.truncate(0)
                self._line({"run": dataclasses.asdict(facts)})
        except BaseException:
            self._file.close()
            raise

    def append(self, result: Result) -> None:
        """Write one result and flush."""
        self._line(dataclasses.asdict(result))

    def _line(self, value: dict[str, Any]) -> None:
        self._file.write(dumps(value) + "\n")
        self._file.flush()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def _is_cut_off(path: Path) -> bool:
    """Whether the file ends within its first line: nothing is in it."""
    with path.open("rb") as file:
        first = file.readline()
    begins = b'{"run": '
    return not first.endswith(b"\n") and first[: len(begins)] == begins[: len(first)]


def _lock(file: TextIO, path: Path) -> None:
    """Lock the file until it is closed. Raises InputError if another run has it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{path}: another autosteer-eval is writing it; wait for it, or choose another --output"
        ) from None


def _read_results(path: Path, facts: RunFacts, *, same: tuple[str, ...]) -> list[Result]:
    """The results in a file whose run equals `facts` in the `same` fields. Removes an incomplete last line."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        first, *lines = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
        found = decode(RunFacts, first["run"], str(path))
    except (ValueError, KeyError, TypeError, RecursionError, PackageError) as err:
        raise InputError(
            f"{path}: exists and is not what autosteer-eval writes; choose another --output, or --force to replace it"
        ) from err
    if differ := [name for name in same if getattr(found, name) != getattr(facts, name)]:
        ways = ["another --output", "--force to overwrite it"]
        ways += ["--rejudge to judge its answers again"] if differ == ["judge"] else []
        raise InputError(
            f"{path}: has the results of another run (other {', '.join(differ)}); give {', or '.join(ways)}"
        )
    try:
        results = [decode(Result, line, f"{path}:{number}") for number, line in enumerate(lines, 2)]
    except PackageError as err:
        raise InputError(f"{err}: not the result of a row (edited?); --force overwrites the file") from err
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return results


def check_order(done: Sequence[Result], rows: Sequence[Row], path: Path) -> None:
    """Raise InputError unless `done` are the results of the first rows. Later ones may have changed: one that cannot
    be asked is mended or removed, and the run goes on.
    """
    for number, (result, row) in enumerate(zip(done, rows, strict=False), 2):
        if result.row != row.digest:
            raise InputError(
                f"{path}:{number}: the result of another row (other data?); choose another --output, or --force"
            )
    if len(done) > len(rows):
        raise InputError(f"{path}: more results than rows (other data?); choose another --output, or --force")
