"""Files of the Hugging Face hub: what is here already, a whole file, or a few bytes of one."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from interp_steer.errors import RunError
from interp_steer.util.files import explained

TRIES = 3
PAUSE = 0.5  # seconds before the second try; twice that before each further one
TIMEOUT = 10.0  # seconds to connect, and between two pieces of an answer
_PASSING = frozenset({429, 500, 502, 503, 504})  # worth another try


@runtime_checkable
class Bytes(Protocol):
    """A file of which parts can be read, here or far away."""

    name: str
    size: int | None
    revision: str

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start` on, fewer only where the file ends; sets `size`."""
        ...


class LocalFile:
    """Parts of a file on this machine.

    `pread`, not a memory map: a column of a large matrix is thousands of places, and each place of
    a map brings 64 KB of its surroundings into this process.
    """

    def __init__(self, path: Path) -> None:
        """Raises RunError if the file cannot be opened."""
        self.name = str(path)
        self.revision = commit(path)
        with explained(path):
            self._file = path.open("rb")
            self.size: int | None = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, count: int) -> bytes:
        """See `Bytes.read`."""
        try:  # not `with explained`, which would be most of the time of a column
            return os.pread(self._file.fileno(), count, start)
        except OSError as error:
            with explained(Path(self.name)):
                raise error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class RemoteFile:
    """Parts of a file on the hub, by HTTP Range requests; nothing else of it is fetched.

    Over huggingface_hub's own connection, which sends no token along a redirect to another host.
    Its file system is not used: it believes whatever part a server sends, and takes the whole file
    where one ignores Range.
    """

    def __init__(self, repo: str, name: str) -> None:
        from huggingface_hub import get_token, hf_hub_url

        self.name = f"{repo}/{name}"
        self.size: int | None = None
        self.revision = ""
        self._etag = ""
        self._url = hf_hub_url(repo, name)
        # parts of a compressed body are no parts of a file
        self._headers = {"Accept-Encoding": "identity"}
        if token := get_token():
            self._headers["Authorization"] = f"Bearer {token}"

    def read(self, start: int, count: int) -> bytes:
        """See `Bytes.read`.

        Raises:
            RunError: no such file, no permission, or no right answer within the tries.
        """
        from huggingface_hub import get_session

        headers = {**self._headers, "Range": f"bytes={start}-{start + count - 1}"}
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                with get_session().stream(
                    "GET", self._url, headers=headers, timeout=TIMEOUT, follow_redirects=True
                ) as response:
                    return self._part(response, start, count)
            except _Broken as broken:
                problem = str(broken)
            except RunError:
                raise
            except Exception as error:  # of a dozen kinds of its HTTP library
                slow = "timed out" in str(error).lower()
                problem = "it does not answer" if slow else "the connection broke off"
        raise RunError(f"{self._said}: {problem} ({TRIES} tries)")

    def _part(self, response: Any, start: int, count: int) -> bytes:
        """The part that was asked for, checked to be that part of the same file."""
        status = response.status_code
        if status in _PASSING:
            raise _Broken(f"status {status}")
        if status != 206:
            raise RunError(f"{self._said}: {_reason(status)}")
        span, _, total = response.headers.get("Content-Range", "").partition("/")
        first, _, last = span.removeprefix("bytes ").partition("-")
        if not (first.isdigit() and last.isdigit() and total.isdigit()):
            raise RunError(f"{self._said}: the server does not say which part it sends")
        end = min(start + count, int(total))
        if (int(first), int(last) + 1) != (start, end) or self.size not in (None, int(total)):
            raise RunError(f"{self._said}: the server sends another part than was asked for")
        etag = response.headers.get("ETag", "")
        if self._etag and etag and etag != self._etag:
            raise RunError(f"{self._said}: the file changed while it was read; try again")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise RunError(f"{self._said}: the server sends the file compressed")
        data: bytes = response.read()
        if len(data) != end - start:
            raise _Broken(f"the answer ends after {len(data)} of {end - start} bytes")
        self.size, self._etag = int(total), etag
        answers = (*response.history, response)  # the hub names the commit before it redirects
        commits = [answer.headers.get("X-Repo-Commit", "") for answer in answers]
        self.revision = self.revision or next(filter(None, commits), etag.strip('W/"'))
        return data

    @property
    def _said(self) -> str:
        return f"cannot read a part of {self.name}"


class _Broken(Exception):
    """A try that brought nothing, and why; the next may."""


def _reason(status: int) -> str:
    if status in (401, 403):
        return "no permission; accept its terms on the hub and set HF_TOKEN"
    return {
        200: "the server ignores Range and sends the whole file; download it with `hf download`",
        404: "there is no such file",
        416: "it is shorter than its header says: it is damaged",
    }.get(status, f"status {status}")


@dataclass(frozen=True)
class Repo:
    """Files of a repository on the hub."""

    repo: str
    offline: bool = False

    def cached(self, name: str) -> Path | None:
        """The file in the hub's cache on this machine, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name)
        return Path(found) if isinstance(found, str) else None

    def path(self, name: str) -> Path:
        """The whole file, downloaded if it is not here yet; large ones show their progress.

        Raises:
            RunError: it is not here and cannot be fetched; the message says why.
        """
        if here := self.cached(name):
            return here
        self._connect(name)
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.repo, name))
        except Exception as error:  # of a dozen kinds, those of its HTTP library among them
            raise RunError(f"cannot fetch {self.repo}/{name}: {why(error)}") from error

    def parts(self, name: str) -> Bytes:
        """The file to read parts of: the one that is here, else the hub's.

        Raises:
            RunError: it is not here, and offline.
        """
        if here := self.cached(name):
            return LocalFile(here)
        self._connect(name)
        return RemoteFile(self.repo, name)

    def _connect(self, name: str) -> None:
        from huggingface_hub import constants

        if self.offline or constants.HF_HUB_OFFLINE:
            raise RunError(
                f"offline, and {self.repo}/{name} is not on this machine; ask once with network, "
                f"or fetch it with `hf download {self.repo} {name}`"
            )


@dataclass(frozen=True)
class Folder:
    """Files of a folder on this machine."""

    folder: Path

    def path(self, name: str) -> Path:
        """The file; raises RunError if it is not there."""
        if not (path := self.folder / name).is_file():
            raise RunError(f"{self.folder} has no {name}")
        return path

    def parts(self, name: str) -> Bytes:
        """The file to read parts of."""
        return LocalFile(self.path(name))


def commit(path: Path) -> str:
    """The commit of a file in the hub's cache (`.../snapshots/COMMIT/...`), else ''."""
    parts = path.parts
    at = max((i for i, part in enumerate(parts[:-2]) if part == "snapshots"), default=None)
    return "" if at is None else parts[at + 1]


def why(error: Exception) -> str:
    """What went wrong with the hub, in a few words."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return _reason(403)
    if isinstance(error, errors.RemoteEntryNotFoundError | errors.RepositoryNotFoundError):
        return _reason(404)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "it is not on this machine and the hub is not in reach"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
