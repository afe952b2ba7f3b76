"""Hidden states on disk. A fit reads them layer by layer, and continues from them after it was killed.

    <folder>/<identity>.states    one record (L, P, d) float32 per prompt, appended block by block
    <folder>/<identity>.keys      its prompt's digest, 16 bytes, written once the record is safe

A record belongs to a prompt's content, not to a row of a data file. `identity` is a digest of the model's files and of
what is recorded. So one folder can serve several fits and models, and never returns another model's states. A record
that a kill left half written is cut off when the file is opened again. Reads use preadv, so that only the requested
records are in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock, Timeout

from autosteer.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

DIGEST_BYTES = 16


def digest(*parts: bytes) -> bytes:
    """A 16-byte digest of `parts`, in order."""
    h = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def file_digest(path: Path) -> bytes:
    """A 16-byte digest of a file's content."""
    h = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    return h.digest()


class StateStore:
    """Records of shape (L, P, d) float32 by 16-byte digest. Use as a context manager; one process at a time."""

    def __init__(self, folder: Path, identity: bytes, shape: tuple[int, int, int], *, fast: bool = False):
        """Open or create the files. Raises InputError if another process uses them, or `folder` is not writable.

        `fast`: how its records are computed; see states.py.
        """
        self.shape, self.fast = shape, fast
        self._bytes = int(np.prod(shape)) * 4
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = [folder / f"{identity.hex()}.{kind}" for kind in ("states", "keys", "lock")]
            states, keys_, lock = self._files
            self._lock = FileLock(lock, blocking=False)
            self._lock.acquire()
            self._states, self._keys = (os.open(file, os.O_RDWR | os.O_CREAT, 0o644) for file in (states, keys_))
        except Timeout:
            raise InputError(f"{folder}: another autosteer-fit is writing here; wait for it, or name another") from None
        except OSError as err:
            raise InputError(
                f"{folder}: not writable ({err.strerror}); name another folder with --states-cache"
            ) from err
        whole = min(os.fstat(self._states).st_size // self._bytes, os.fstat(self._keys).st_size // DIGEST_BYTES)
        os.truncate(self._states, whole * self._bytes)
        os.truncate(self._keys, whole * DIGEST_BYTES)
        keys = os.pread(self._keys, whole * DIGEST_BYTES, 0)
        self._record = {keys[i * DIGEST_BYTES :][:DIGEST_BYTES]: i for i in range(whole)}
        self._count = whole

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._states)
        os.close(self._keys)
        if not self._count:  # no record was stored: delete the files
            for file in self._files:
                file.unlink()
            with contextlib.suppress(OSError):
                self._files[0].parent.rmdir()
        self._lock.release()

    def __contains__(self, key: bytes) -> bool:
        return key in self._record

    def append(self, keys: Sequence[bytes], records: torch.Tensor) -> None:
        """Store records (b, L, P, d). They are on disk when this returns. Raises InputError on a full disk."""
        assert records.shape == (len(keys), *self.shape)
        blob = records.float().contiguous().numpy()
        try:
            _write(self._states, blob.data.cast("B"), self._count * self._bytes)
            _write(self._keys, memoryview(b"".join(keys)), self._count * DIGEST_BYTES)
        except OSError as err:
            raise InputError(
                f"the hidden states do not fit on the disk ({err.strerror}; {self._bytes >> 10} KiB a prompt); make "
                "room, or name a folder elsewhere with --states-cache; what is stored already is kept"
            ) from err
        for key in keys:
            self._record[key] = self._count
            self._count += 1

    def view(self, keys: Sequence[bytes]) -> States:
        """The records of `keys`, in that order; all must be there."""
        return States(self._states, np.array([self._record[key] for key in keys], dtype=np.int64), self.shape)


class States:
    """Hidden states of n prompts, on disk. Indexing reads them: states[rows] is (len(rows), L, P, d) float32."""

    def __init__(self, descriptor: int, records: np.ndarray, shape: tuple[int, int, int]):
        self._descriptor, self._records, self.shape = descriptor, records, shape

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        return self._read(self._records[np.asarray(rows, dtype=np.int64)], 0, self.shape)

    def layer(self, index: int, rows: Sequence[int] | np.ndarray | None = None) -> torch.Tensor:
        """(n, P, d) of one layer (entry `index` of the records), of all prompts or of `rows`."""
        _, positions, width = self.shape
        chosen = self._records if rows is None else self._records[np.asarray(rows, dtype=np.int64)]
        return self._read(chosen, index * positions * width * 4, (1, positions, width))[:, 0]

    def _read(self, records: np.ndarray, skip: int, shape: tuple[int, int, int]) -> torch.Tensor:
        import torch

        out, size = np.empty((len(records), *shape), np.float32), int(np.prod(self.shape)) * 4
        for into, record in zip(out, records.tolist(), strict=True):
            if os.preadv(self._descriptor, [into.data], record * size + skip) != into.nbytes:
                raise InputError("the stored hidden states were cut off while they were read; start again")
        return torch.from_numpy(out)


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written
    os.fsync(descriptor)
