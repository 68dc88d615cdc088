"""Python files of a study, which define further metrics."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from interp_steer.errors import RequestError, SteerError
from interp_steer.study.metrics import CONTENT, METRICS, Metric

_DEFINED: dict[str, dict[str, Metric]] = {}  # module name -> the metrics that its file defined


def load_modules(paths: Sequence[str | Path]) -> None:
    """Adds the metrics of Python files to `METRICS`. Of several with one name the last file's
    counts. A file runs once, and again only when its content has changed.

    Raises:
        RequestError: a file does not exist or cannot be run.
    """
    for path in map(Path, paths):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RequestError(f"no Python file {path}") from error
        identity = hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:8]
        name = f"interp_steer_module_{identity}"
        if name not in _DEFINED:
            before = dict(METRICS)
            _run(path, content, name)
            _DEFINED[name] = {key: m for key, m in METRICS.items() if before.get(key) is not m}
        METRICS.update(_DEFINED[name])


def _run(path: Path, content: bytes, name: str) -> None:
    """Runs a file as a module. An import could find a compiled file beside it instead, of earlier
    content with the same length.
    """
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        vars(module)[CONTENT] = content.decode(errors="replace").replace("\r\n", "\n")
        exec(compile(content, str(path), "exec"), vars(module))
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, SteerError):
            raise
        raise RequestError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
