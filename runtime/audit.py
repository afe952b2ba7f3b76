"""The audit record: what the gate made of each request, one JSON object a line.

    engine = Engine.load("package/", audit="audit.jsonl")      # or a function, which is given each record as a dict

A record is written before the last piece of an answer is handed over, so no whole answer is without one. If it cannot
be written, that request fails, and later ones are refused until it has been. docs/security.md has the fields.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

try:
    import fcntl
except ImportError:  # Windows: records go to a function there
    fcntl = None  # type: ignore[assignment]

from .encoded_prompt import EncodedPrompt
from .errors import AuditError, CancelledError, InputError, PackageError, ProviderError
from .gate import GatePolicy, Verdict, answer_verdict_json, finite
from .stats import Stats, ms_since
from .text import Message, judged

Hook: TypeAlias = "Callable[[Mapping[str, Any]], None]"

VERSION = 1  # of the records
ROLES = ("system", "user", "assistant")
ERRORS = {InputError: "input", PackageError: "package", ProviderError: "provider"}
ENDED_BY_CALLER = (CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)


class Audit:
    """Where the records of an engine go. Any thread may use it."""

    def __init__(self, hook: Hook, package: str, *, texts: bool = False):
        """`package`: the digest of its manifest, which has those of all its files. `texts`: whether records have them,
        beside their digests.
        """
        self.package, self.texts = package, texts
        self._hook = hook
        self._unwritten: list[Mapping[str, Any]] = []
        self._lock = threading.RLock()  # the garbage collector may end a stream while this thread writes
        self._writing = False

    def require(self) -> None:
        """Write what could not be written before. Raises AuditError if it still cannot."""
        with self._lock:
            self._write()

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a record. Raises AuditError if it cannot; `require` then tries again."""
        with self._lock:
            if not any(known is record for known in self._unwritten):
                self._unwritten.append(record)
            self._write()

    def _write(self) -> None:
        if self._writing:
            return
        self._writing = True
        try:
            while self._unwritten:
                self._hook(self._unwritten[0])
                del self._unwritten[0]
        except Exception as err:
            raise AuditError(
                f"the audit record cannot be written, so the answer, or its end, is withheld ({err})"
            ) from err
        finally:
            self._writing = False


class AuditFile:
    """Appends records to a file, which other threads and processes may do, too."""

    def __init__(self, path: str | Path):
        """Open the file, or make it for its owner alone. Raises InputError if it cannot be, or is no file."""
        if fcntl is None:
            raise InputError(f"{path}: the audit record cannot be opened (this system has no flock)")
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        try:
            self._file = os.open(path, flags, 0o600)
        except OSError as err:
            raise InputError(f"{path}: the audit record cannot be opened ({err.strerror})") from err
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise InputError(f"{path}: not a file; an audit record is appended to one")
        self._lock = threading.Lock()  # flock keeps other processes out, not other threads

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            os.close(self._file)

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Append a line, and wait until the disk has it. Raises OSError, and leaves the file without the line."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._append(line)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _append(self, line: bytes) -> None:
        found = os.fstat(self._file)
        if not found.st_nlink:
            raise OSError("its file was deleted")
        if found.st_size and os.pread(self._file, 1, found.st_size - 1) != b"\n":  # somebody died in a line
            line = b"\n" + line
        try:
            while line:  # a second time only to learn why the disk did not take it all
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except BaseException:  # Ctrl-C, too: the line is written again, and must not stand there twice
            os.ftruncate(self._file, found.st_size)
            raise


def open_audit(to: str | Path | Hook | None, package: str, *, texts: bool = False) -> Audit | None:
    """Records to a file or a function; None for neither. Raises InputError if the file cannot be opened."""
    if to is None:
        return None
    return Audit(AuditFile(to) if isinstance(to, (str, Path)) else to, package, texts=texts)


class Record:
    """What is known of one request, whose block writes it once, however it ends."""

    def __init__(self, audit: Audit | None, policy: GatePolicy, provider: str):
        """`audit`: None writes nothing."""
        self.policy, self.stats = policy, Stats(device=provider)
        self.start = time.perf_counter()
        self.messages: Sequence[Message] = ()
        self.prompt: EncodedPrompt | None = None  # once it is encoded
        self.scores: Sequence[float] = ()  # p_unsafe of each judged turn
        self.verdict: Verdict | None = None
        self._time = datetime.now(timezone.utc)
        self._audit, self._ended, self._texts = audit, audit is None, list[str]()
        self._known: dict[str, Any] | None = None  # what is written, once that is tried

    @property
    def audited(self) -> bool:
        """Whether it is written."""
        return self._audit is not None

    def __enter__(self) -> Record:
        if self._audit:
            self._audit.require()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._end(None, error_name(err))
        except KeyboardInterrupt:  # as it is written, or before
            self._end(None, "cancelled")
            raise

    def gave(self, text: str, finish_reason: str | None) -> None:
        """Note a piece of the answer that is handed over next. Raises AuditError if it is the last, and unwritten."""
        self._texts.append(text)
        if finish_reason is not None:
            self._end(finish_reason, None)

    def _end(self, finish_reason: str | None, error: str | None) -> None:
        if self._audit and not self._ended:
            self._known = self._known or self._json(self._audit, finish_reason, error)
            self._audit.add(self._known)
        self._ended = True

    def _json(self, audit: Audit, finish_reason: str | None, error: str | None) -> dict[str, Any]:
        verdict, stats, answer = self.verdict, self.stats, "".join(self._texts)
        return {
            "version": VERSION,
            "time": self._time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "package": audit.package,
            "provider": stats.device,
            "policy": self.policy.mode.value,
            "threshold": finite(self.policy.threshold),
            "pieces": self.policy.pieces,
            "judge_answers": self.policy.judge_answers,
            "p_unsafe": None if verdict is None else finite(verdict.p_unsafe),
            "unsafe": None if verdict is None else verdict.unsafe,
            "action": None if verdict is None else verdict.action.value,
            "strength": None if verdict is None else verdict.strength,
            "answer_verdict": None if verdict is None else answer_verdict_json(verdict.answer),
            "turns": self._turns(audit.texts),
            "answer_sha256": sha256_of(answer),
            **({"answer": answer} if audit.texts else {}),
            "finish_reason": finish_reason,
            "error": error,
            "prompt_tokens": stats.prompt_tokens,
            "reused_tokens": stats.reused_tokens,
            "completion_tokens": stats.completion_tokens,
            "first_token_ms": round(stats.ttft_ms, 3) if stats.ttft_ms else None,
            "total_ms": round(ms_since(self.start), 3),
        }

    def _turns(self, texts: bool) -> list[dict[str, Any]]:
        """Each message. Pictures have no digest before the prompt is encoded."""
        shown = self.prompt.shown if self.prompt else ()
        images = iter([one.sha256 for one in shown if not one.video])
        videos = iter([one.sha256 for one in shown if one.video])
        scores = dict(zip(judged(self.messages), self.scores, strict=False))
        turns = []
        for number, message in enumerate(self.messages):
            turn = {
                "role": message.role if message.role in ROLES else None,
                "trusted": message.trusted,
                "p_unsafe": finite(scores.get(number)),
                "text_sha256": [sha256_of(text) for text in message.texts],
                **({"text": message.texts} if texts else {}),
                "image_sha256": [next(images, None) for _ in message.images],
                "video_sha256": [next(videos, None) for _ in message.videos],
            }
            turns.append(turn)
        return turns


def error_name(err: BaseException | None) -> str:
    """The word for what ended a request before its answer did. Never its message, which may quote the prompt."""
    if err is None or isinstance(err, ENDED_BY_CALLER):
        return "cancelled"
    return next((name for kind, name in ERRORS.items() if isinstance(err, kind)), "failed")


def sha256_of(text: str) -> str:
    """SHA-256 of a text's UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
