"""Write a folder completely or not at all.

A folder is written under a hidden name beside its destination, and renamed when it is complete. After Ctrl-C, a full
disk or a failed check nothing is left, and an old folder stays until the new one replaces it. The next run removes what
a kill or a power cut left: a lock beside each scratch folder tells whether a process still writes it.
"""

from __future__ import annotations

import glob
import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from autosteer.runtime.errors import InputError


def check_output(destination: Path, *, marker: str, force: bool) -> None:
    """Raise InputError if `destination` must not be written. Called before any work.

    --force replaces only a folder that holds the file `marker`, or an empty one.
    """
    if not destination.exists():
        return
    if not destination.is_dir():
        raise InputError(f"{destination}: is a file; --output names a folder")
    if not force:
        raise InputError(f"{destination}: exists; choose another --output or give --force to replace it")
    if any(destination.iterdir()) and not (destination / marker).is_file():
        raise InputError(f"{destination}: has no {marker}, so it is not ours to replace; choose another --output")


@contextmanager
def atomic_folder(destination: Path, *, marker: str, force: bool) -> Iterator[Path]:
    """A scratch folder that becomes `destination` if the block succeeds, and is deleted if it raises."""
    destination = destination.resolve()  # of a link, what it leads to
    check_output(destination, marker=marker, force=force)
    destination.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(destination)
    check_output(destination, marker=marker, force=force)  # what a killed run had moved away is back
    scratch = destination.with_name(f".{destination.name}-{secrets.token_hex(4)}")
    old = scratch.with_name(f"{scratch.name}-old")
    try:  # from before there is anything: a signal may come at any time
        with _held(scratch):
            scratch.mkdir(mode=0o700)
            yield scratch
            check_output(destination, marker=marker, force=force)  # again: another run may have finished first
            scratch.chmod(0o755)
            if destination.exists():
                destination.rename(old)
            scratch.rename(destination)
            shutil.rmtree(old, ignore_errors=True)
            if old.exists():
                name = shlex.quote(str(old))
                click.echo(
                    f"{destination} is replaced, but what was there could not be deleted (no write permission?); "
                    f"delete it with: chmod -R u+w {name} && rm -r {name}",
                    err=True,
                )
    except BaseException:
        _put_back(old, destination)
        shutil.rmtree(scratch, ignore_errors=True)
        _lock_of(scratch).unlink(missing_ok=True)
        raise


@contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Hold the lock of a scratch folder, then remove it. Raises Timeout if another process holds it."""
    from filelock import FileLock

    lock = _lock_of(scratch)
    with FileLock(lock, blocking=False):
        try:
            yield
        finally:
            lock.unlink()


def _lock_of(scratch: Path) -> Path:
    return scratch.with_name(f"{scratch.name}.lock")


def _put_back(old: Path, destination: Path) -> None:
    """Give `destination` back what was moved away for a folder that did not come, or delete it."""
    if old.is_dir() and not destination.exists():
        old.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(destination: Path) -> None:
    """Delete scratch folders for `destination` whose process has ended, and undo the half of its last step."""
    from filelock import Timeout

    for lock in destination.parent.glob(f".{glob.escape(destination.name)}-????????.lock"):
        with suppress(Timeout), _held(scratch := lock.with_suffix("")):
            _put_back(scratch.with_name(f"{scratch.name}-old"), destination)
            shutil.rmtree(scratch, ignore_errors=True)
