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
    old = _old_of(scratch)
    with _held(scratch):
        try:  # from before there is anything: a signal may come at any time
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
            raise


@contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Hold the lock of a scratch folder, then remove it. It stays with what could not be deleted (a second Ctrl-C, no
    permission): the next run finds that by its lock. Raises Timeout if another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = scratch.with_name(f"{scratch.name}.lock")
    ours = True
    try:  # around the lock, too: a signal may come when its file is there and `with` is not yet entered
        with FileLock(lock, blocking=False):
            yield
    except Timeout:
        ours = False
        raise
    finally:
        if ours and not (scratch.exists() or _old_of(scratch).exists()):
            lock.unlink(missing_ok=True)


def _old_of(scratch: Path) -> Path:
    """Where the folder is moved that a scratch folder replaces."""
    return scratch.with_name(f"{scratch.name}-old")


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
            _put_back(_old_of(scratch), destination)
            shutil.rmtree(scratch, ignore_errors=True)
