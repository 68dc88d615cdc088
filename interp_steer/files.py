"""Where files live, and how one is written: whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from interp_steer.errors import RunError


def cache_dir(*parts: str) -> Path:
    """A folder below the cache, made if it is missing.

    The cache is `INTERP_STEER_CACHE` if set, else `cache/` of the checkout that this file belongs
    to, else the user's own cache folder.

    Raises:
        RunError: the folder cannot be made.
    """
    checkout = Path(__file__).resolve().parents[1]
    if told := os.environ.get("INTERP_STEER_CACHE"):
        root = Path(os.path.expanduser(told))
    elif (checkout / "pyproject.toml").is_file():
        root = checkout / "cache"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "interp-steer"
    folder = root.joinpath(*parts)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to read or write `path` into one clear line."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "permission denied",
            errno.EROFS: "the file system is read-only",
        }.get(error.errno or 0, error.strerror or str(error))
        raise RunError(f"{path}: {reason}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; it takes the name `path` only if the block succeeds.

    Raises:
        RunError: the disk is full, read-only, or the folder cannot be written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        part = Path(name)
        try:
            yield part
            mask = os.umask(0)  # mkstemp is private; the finished file follows the user's umask
            os.umask(mask)
            part.chmod(0o666 & ~mask)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
