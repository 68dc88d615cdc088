"""A GPU for tests on machines that have none.

Its tensors hold CPU tensors, say that they are on `cuda:0`, and refuse what a GPU refuses: to be
mixed with tensors of the CPU. It counts what takes time on a GPU: kernels that are launched, waits
of the CPU for the GPU, and copies between them. It says nothing of how long any of that takes.

    with fake_gpu() as gpu:
        model = on_gpu(SteeringModel.load(folder))
        gpu.reset()
        ...
        assert gpu.waits <= 2

To torch's own code such a tensor is on "meta", the one device beside the CPU that every build of
torch has. Inside `fake_gpu` a copy to the true meta device is therefore one to the GPU.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from interp_steer.model.model import SteeringModel

DEVICE = torch.device("cuda:0")
SAME = "Expected all tensors to be on the same device, but found cuda:0 and cpu!"
# no kernel: memory alone, a number that travels with the kernel it is for, one that is read
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "scalar_tensor"}
FREE |= {"_local_scalar_dense"}
# how much comes out depends on the numbers, for which the CPU has to wait
UNSIZED = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
# beside elementwise operations: those that take a number that is a tensor of the CPU
TAKE_NUMBERS = {"where", "masked_fill", "masked_fill_", "fill", "fill_"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Gpu(Tensor):
    """A tensor of the fake GPU; `inner` has the numbers, `block` the memory that it lies in."""

    inner: Tensor
    block: "Block"
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, block: "Block") -> "Gpu":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        made.inner, made.block = inner, block
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func} of a tensor of the fake GPU, outside fake_gpu()")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Gpu({self.inner})"

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(listed(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(listed(index), value)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        named = {name: on_meta(value) for name, value in kwargs.items()}
        return super().to(*map(on_meta, args), **named)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")


class Counts:
    """What the GPU has done since `reset`.

    Attributes:
        launches: kernels, by operation; copies from and to the CPU are not among them.
        syncs: waits of the CPU for the GPU, by (kind, line of the package); the kinds are "upload",
            "download", "item" (one number) and "size" (of a result, or where a mask is true).
        uploads, downloads: copies to and from the GPU; of these some need no wait.
        math_attention: lines that attend in a way for which a GPU has no fused kernel.
        doubles: (operation, line) of results in float64.
        live, peak: bytes in use now, and at most since `reset`.
    """

    def __init__(self, memory: int) -> None:
        self.memory, self.live = memory, 0
        self.reset()

    def reset(self) -> None:
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.uploads = self.downloads = 0
        self.math_attention: list[str] = []
        self.doubles: list[tuple[str, str]] = []
        self.peak = self.live

    @property
    def waits(self) -> int:
        return self.syncs.total()

    def wait(self, kind: str) -> None:
        self.syncs[kind, line()] += 1


class Block:
    """Memory of the GPU, freed when no tensor lies in it any more."""

    def __init__(self, counts: Counts, size: int) -> None:
        self.counts, self.size = counts, 0
        if counts.live + size > counts.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        self.size = size
        counts.live += size
        counts.peak = max(counts.peak, counts.live)

    def __del__(self) -> None:
        self.counts.live -= self.size


def line() -> str:
    """The innermost line of the package that is being run."""
    frame: Any = sys._getframe(1)
    while frame and "/interp_steer/" not in frame.f_code.co_filename:
        frame = frame.f_back
    where = frame and frame.f_code.co_filename.rpartition("/interp_steer/")[2]
    return f"{where}:{frame.f_lineno}" if frame else "outside the package"


def inner(value: Any) -> Any:
    return value.inner if isinstance(value, Gpu) else value


def place(value: Tensor) -> int:
    """Where a tensor's memory begins; views begin where what they look at does."""
    return int(inner(value).untyped_storage().data_ptr())


def listed(index: Any) -> Any:
    """An index whose lists are tensors: torch would look for their numbers on the GPU."""
    if isinstance(index, tuple):
        return tuple(map(listed, index))
    return torch.tensor(index) if isinstance(index, list) else index


def each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """What an operation is given or gives, with its tensors changed."""
    if isinstance(value, list | tuple):
        return type(value)([each(change, one) for one in value])
    return change(value) if isinstance(value, Tensor) else value


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each(found.append, value)
    return found


class Operations(TorchDispatchMode):
    """Every operation as torch gives it to a device, after those made of others are taken apart."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # there is none without a GPU
        given = tensors((args, [*kwargs.values()]))
        mine = [one for one in given if isinstance(one, Gpu)]
        to = kwargs["device"].type if kwargs.get("device") else ""
        if to == "meta" and (name == "scalar_tensor" or (name == "_to_copy" and given[0].is_cpu)):
            to = "cuda"
        if not mine and to != "cuda":
            return func(*args, **kwargs)
        if to:
            kwargs["device"] = "cpu"
        counts, copies = self.counts, name in ("_to_copy", "copy_")
        moved = copies and (len(mine) < len(given) or to == "cpu")
        up = moved and isinstance(args[0], Gpu) == (name == "copy_")
        if moved:
            self.copied("upload" if up else "download", wait=not kwargs.get("non_blocking"))
        else:
            self.refuse_mixed(func, name, args, given)
        if name == "_local_scalar_dense":
            counts.wait("item")
        elif name in UNSIZED or (name in INDEXED and chosen_by_mask(args)):
            counts.wait("size")
        out = func(*each(inner, args), **{key: each(inner, one) for key, one in kwargs.items()})
        if moved and not up:
            return args[0] if name == "copy_" else out
        same = {id(one.inner): one for one in mine}
        blocks = {place(one): one.block for one in mine}
        made = tensors(out)
        view = made and not func._schema.is_mutable and all(place(one) in blocks for one in made)
        if not (moved or view or name in FREE):
            counts.launches[name] += 1
            if any(one.dtype == torch.float64 for one in made):
                counts.doubles.append((name, line()))

        def wrapped(one: Tensor) -> Tensor:
            if id(one) in same:
                return same[id(one)]
            return Gpu(one, blocks.get(place(one)) or Block(counts, one.untyped_storage().nbytes()))

        return each(wrapped, out)

    def copied(self, kind: str, wait: bool = True) -> None:
        self.counts.uploads += kind == "upload"
        self.counts.downloads += kind == "download"
        if wait:
            self.counts.wait(kind)

    def refuse_mixed(self, func: Any, name: str, args: Any, given: list[Tensor]) -> None:
        """Raises RuntimeError where a tensor of the CPU may not stand beside one of the GPU."""
        others = [one for one in given if not isinstance(one, Gpu)]
        takes = torch.Tag.pointwise in func.tags or name in TAKE_NUMBERS
        if name in INDEXED and isinstance(args[0], Gpu):
            indices = [one for one in tensors(args[1]) if one.device.type == "cpu"]
            for _ in indices:
                self.copied("upload")
            others = [one for one in others if not any(one is index for index in indices)]
            takes = True
        written = func._schema.is_mutable and not isinstance(args[0], Gpu)
        if others and (not takes or written or any(one.ndim for one in others)):
            raise RuntimeError(f"{SAME} ({name}, {line()})")


def chosen_by_mask(args: Any) -> bool:
    """Whether an index is a mask whose places must be counted; filling them with a number needs
    no count.
    """
    masks = [one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)]
    fills = len(args) > 2 and args[2].numel() == 1 and len(args[1]) == 1
    return bool(masks) and not fills


def on_meta(value: Any) -> Any:
    """A device as torch's own code must be told it."""
    named = isinstance(value, torch.device) and value.type == "cuda"
    return "meta" if named or (isinstance(value, str) and value.startswith("cuda")) else value


class Calls(TorchFunctionMode):
    """What torch would take apart wrongly: tensors made of numbers, and attention."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self.attended(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and "cuda" in str(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to("cuda:0")
        return func(*args, **kwargs)

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **more: Any
    ) -> Tensor:
        attend, given = functional.scaled_dot_product_attention, [query, key, value, attn_mask]
        mine = [isinstance(one, Gpu) for one in given if one is not None]
        if not any(mine):
            return attend(*given, **more)
        if not all(mine):
            raise RuntimeError(f"{SAME} (attention, {line()})")
        if attn_mask is not None and more.get("enable_gqa"):
            self.counts.math_attention.append(line())
        self.counts.launches["scaled_dot_product_attention"] += 1
        out = attend(*map(inner, given), **more)
        return Gpu(out, Block(self.counts, out.untyped_storage().nbytes()))


@contextmanager
def fake_gpu(memory: int = 2**34) -> Iterator[Counts]:
    """Lets "cuda:0" be a fake GPU with so many bytes of memory, in this thread."""
    counts = Counts(memory)
    cuda = {
        "_lazy_init": lambda: None,
        "mem_get_info": lambda device=None: (memory - counts.live, memory),
        "memory_allocated": lambda device=None: counts.live,
        "memory_reserved": lambda device=None: counts.live,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "fake GPU",
    }
    with mock.patch.multiple(torch.cuda, **cuda), Operations(counts), Calls(counts):
        yield counts


def on_gpu(model: SteeringModel) -> SteeringModel:
    """Moves a model to the fake GPU."""
    model.hf.to("cuda:0")  # type: ignore[arg-type]
    return model


class fail_at(TorchDispatchMode):
    """Lets memory run out at one allocation, on the CPU and the fake GPU: `fail_at(k)` at the k-th
    from 1 on, `fail_at(0)` never; and at each of more than `largest` numbers. `count` says how many
    allocations there were. All others succeed.
    """

    def __init__(self, at: int = 0, largest: float = float("inf")) -> None:
        super().__init__()
        self.at, self.largest, self.count = at, largest, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {place(one) for one in tensors((args, [*(kwargs or {}).values()]))}
        made = [one for one in tensors(out) if place(one) not in known and one.numel()]
        if made or func is torch.ops.aten.lift_fresh.default:  # the latter: of `torch.tensor`
            self.count += 1
            if self.count == self.at or any(one.numel() > self.largest for one in made):
                raise torch.OutOfMemoryError(f"allocation {self.at}: out of memory, as asked for")
        return out
