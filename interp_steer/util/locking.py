"""Who may write to a run's folder: one run alone, or shards of one study side by side.

A run holds `.lock` as long as it works: alone, or together with other shards. Files that all shards
write, and the decision who runs, are guarded by `.lock.brief`, which is never held for long. Locks
go with the process that holds them, however it ends; the two empty files stay.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from interp_steer.errors import RunError
from interp_steer.util.files import explained

PATIENCE = 60.0  # seconds that a brief lock is waited for


def locked(handle: int, how: int = fcntl.LOCK_EX) -> bool:
    """Takes a lock on an open file at once; False if another holder is in the way."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


@contextmanager
def running(
    folder: Path, begin: Callable[[bool], None] = lambda alone: None, *, shared: bool = False
) -> Iterator[None]:
    """Keeps other runs out of a folder, made if it is missing.

    Args:
        begin: called before anybody else may start there, told whether nobody else is at work.
        shared: whether others that share may be at work too.

    Raises:
        RunError: another run is at work there, or the folder cannot be written.
    """
    with _open(folder, ".lock") as handle:
        with briefly(folder):
            alone = locked(handle)
            if not alone and not (shared and locked(handle, fcntl.LOCK_SH)):
                raise RunError(f"{folder} is being written by another run")
            begin(alone)
            if alone and shared:
                locked(handle, fcntl.LOCK_SH)
        yield


@contextmanager
def briefly(folder: Path) -> Iterator[None]:
    """Waits until no other process is here, and keeps others waiting."""
    with _open(folder, ".lock.brief") as handle:
        end = time.monotonic() + PATIENCE
        while not locked(handle):
            if time.monotonic() > end:
                raise RunError(f"{folder} has been locked by another run for {PATIENCE:.0f} s")
            time.sleep(0.02)
        yield


@contextmanager
def _open(folder: Path, name: str) -> Iterator[int]:
    path = folder / name
    with explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)
