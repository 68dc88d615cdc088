"""Our safetensors files, read as what anybody may have written: nothing in them is believed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_steer.errors import RunError
from interp_steer.util.files import explained

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_HEADER = 2**22  # bytes; that of a set of 126 directions has under 100,000
WIDEST = 2**20  # numbers of one direction; models have up to 2**15


@contextmanager
def opened(path: Path, kind: str = "pt") -> Iterator[Any]:
    """safetensors's handle of a file; whatever is wrong inside becomes one line.

    The header is bounded before it is read: it is text that its reader holds several times.

    Args:
        kind: of its tensors, in safetensors's words; "np" where only metadata are read, without
            torch.

    Raises:
        RunError: the file is damaged, cannot be read, or is none of safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with explained(path):
            with path.open("rb") as plain:
                length = int.from_bytes(plain.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"its header is said to be {length:,} bytes long")
            with safe_open(path, kind) as file:
                yield file
    except (
        SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError,
        RecursionError,
    ) as error:  # fmt: skip
        said = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, RecursionError):
            said = "its metadata is nested too deep"
        raise RunError(f"{path} is damaged or not a safetensors file: {said}") from error


def texts(given: object, what: str) -> dict[str, str]:
    """A mapping of texts to texts; raises ValueError if it is none."""
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
        raise ValueError(f"{what} is no list of texts by name")
    return {str(key): value for key, value in given.items()}


def parsed(about: dict[str, str], key: str) -> Any:
    """A part of the metadata that is JSON; raises ValueError if it is none."""
    if key not in about:
        raise ValueError(f"its metadata has no {key}")
    return json.loads(about[key])


def floats(file: Any, key: str, axes: int) -> "Tensor":
    """A float32 tensor with so many axes; raises ValueError, before it is read, if it is none."""
    if key not in list(file.keys()):
        raise ValueError(f"it has no tensor {key:.100}")
    part = file.get_slice(key)
    dtype, shape = part.get_dtype(), part.get_shape()
    if dtype != "F32" or len(shape) != axes or 0 in shape:
        raise ValueError(
            f"{key:.100} is {dtype} of shape {shape}; expected F32 with {axes} "
            f"{'axis' if axes == 1 else 'axes'}"
        )
    if axes == 1 and shape[0] > WIDEST:
        raise ValueError(f"{key:.100} has {shape[0]:,} numbers")
    found: Tensor = file.get_tensor(key)
    return found
