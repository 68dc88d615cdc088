"""How much memory rows need, and how much there is."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from interp_steer.errors import SteerError
from interp_steer.model.model import SteeringModel

CGROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By controller, "" in version 2: folder, files of the limit and the use, entry of memory.stat."""


def working(model: SteeringModel, read: int, kept: int, device: torch.device | None = None) -> int:
    """Bytes that one row needs beside the weights, at its peak.

    Args:
        read: tokens that pass through a block at once: the prompt, or all of a text that is scored.
        kept: tokens whose keys and values are kept; 0 for scoring.
        device: where the model will be, if it is not there yet.
    """
    wide, on_gpu = model.dtype.itemsize, (device or model.device).type == "cuda"
    layer = 2 * model.n_kv_heads * model.d_head * wide
    cache = model.n_layers * layer
    passing = (4 * model.d_model + 3 * model.shape.d_mlp) * wide * read
    if on_gpu and wide == 4 and model.n_heads != model.n_kv_heads:
        # torch's fused attention does not share float32 keys among heads: all scores of one block
        passing += 2 * model.n_heads * read**2 * wide
    # a GPU gives a whole cache at once, an operating system a page when it is written
    early = cache * (kept if on_gpu else min(read, kept)) + passing
    logits = 3 * model.d_vocab * 4  # of one position, in float32, and copies to choose from
    # where rows join, the cache grows, and one layer of it is there twice
    return max(early, cache * kept + max(layer * kept, logits))


def free(
    device: torch.device,
    process: Path = Path("/proc/self"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Bytes that can be used now: on a GPU those that nobody holds, and those that torch holds
    without use; elsewhere what the machine, the container and Slurm leave, whichever is least.

    Args:
        process, cgroups: folders where Linux says what groups a process is in, and what they may
            use.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    import psutil

    available: int = psutil.virtual_memory().available
    return max(0, min([available, *_of_cgroups(process, cgroups), *_of_slurm()]))


def _of_cgroups(process: Path, cgroups: Path) -> Iterator[int]:
    """What is left of the limit of each group of the process, and of each group around it.

    In a container the path of its group may be one of the machine outside: then the topmost folder
    that is seen here is that group. File pages that were not used lately count as free.
    """
    lines: list[str] = []
    with suppress(OSError):
        lines = (process / "cgroup").read_text().splitlines()
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        for controller in {*controllers.split(",")} & CGROUPS.keys():
            folder, limit, use, inactive = CGROUPS[controller]
            top = cgroups / folder
            own = top / path.strip("/")
            for place in (own, *own.parents):
                with suppress(OSError, ValueError):  # no such file, or "max"
                    left = int((place / limit).read_text()) - int((place / use).read_text())
                    yield left + _entry(place / "memory.stat", inactive)
                if place == top:
                    break


def _entry(stat: Path, name: str) -> int:
    """A number of a file of lines `name number`; 0 if it is not there."""
    with suppress(OSError, ValueError):
        pairs = (line.partition(" ") for line in stat.read_text().splitlines())
        return next((int(number) for key, _, number in pairs if key == name), 0)
    return 0


def _of_slurm() -> Iterator[int]:
    """What this process leaves of the memory that Slurm gives its job; 0 there is all of a node."""
    import psutil

    given = {}
    for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE"):
        with suppress(ValueError):
            given[name] = int(os.environ.get(f"SLURM_{name}", 0))
    each = given.get("MEM_PER_CPU", 0) * given.get("CPUS_ON_NODE", 0)
    if (megabytes := given.get("MEM_PER_NODE") or each) > 0:
        yield megabytes * 2**20 - psutil.Process().memory_info().rss


def chunks(order: Sequence[int], needs: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive rows in parts whose needs together fit a budget; at least one row each.

    Args:
        order: numbers of rows, in the order in which they are to be worked on.
        needs: bytes, by number of row.
    """
    found: list[list[int]] = []
    left = 0
    for row in order:
        if not found or needs[row] > left:
            found.append([])
            left = budget
        found[-1].append(row)
        left -= needs[row]
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out; our own is a verdict, not tried again."""
    if isinstance(error, SteerError):
        return False
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in said)


@contextmanager
def unless_memory_lacks() -> Iterator[None]:
    """For what may be left out: if memory runs out, it is."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


def release(device: torch.device) -> None:
    """Gives back what torch holds on a GPU without use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
