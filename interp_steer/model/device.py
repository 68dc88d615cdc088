"""Where a model goes and in which number format, and what should be said of that."""

import time
from collections.abc import Iterator
from functools import cache

import torch
from torch.random import fork_rng

from interp_steer.errors import RequestError, nearest
from interp_steer.model.block import exactly, linear

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The number formats that weights are loaded in."""

SLOW = 1.5  # a format's products against float32's; above it a person is told


def pick_device(told: str | torch.device | None, here: bool = True) -> torch.device:
    """The device that is asked for.

    Args:
        here: whether it must be one of this machine.
    """
    if told is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(told)
        if here:
            torch.empty(0, device=device)
    except Exception as error:  # torch raises several kinds, with paragraphs of advice
        raise RequestError(f"device {str(told)!r} is not available here; try 'cpu'") from error
    return device


def pick_dtype(told: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if told is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(told, torch.dtype):
        told = str(told).removeprefix("torch.")
    if told not in KINDS:
        raise RequestError(f"unknown dtype {told!r}{nearest(told, KINDS)}")
    return KINDS[told]


@cache
@exactly()
def slowness(kind: torch.dtype) -> float:
    """How many times as long as float32's a format's products take on this CPU: the quickest of
    several, of 32 rows, as a batch that decodes has them. Takes about 20 ms.
    """
    pairs = {}
    with fork_rng(devices=[]):  # a layer draws its weights
        for wide in (torch.float32, kind):
            x = torch.ones(32, 512, dtype=wide, device="cpu")
            pairs[wide] = x, torch.nn.Linear(512, 512, bias=False, dtype=wide, device="cpu")
            linear(*pairs[wide])  # the first product is slower
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(5):
        for wide, pair in pairs.items():
            begun = time.perf_counter()
            linear(*pair)
            best[wide] = min(best[wide], time.perf_counter() - begun)
    return best[kind] / best[torch.float32]


def remarks(kind: torch.dtype, device: torch.device) -> Iterator[str]:
    """What should be said of the number format and the device of weights that were loaded."""
    if device.type not in ("cpu", "cuda", "meta"):
        yield (
            f"{device.type} is not tested; `interp-steer verify --device {device.type}` compares "
            "it with the CPU"
        )
    if device.type == "cpu" and kind != torch.float32:  # not the default
        times = slowness(kind)
        if times > SLOW:
            yield (
                f"{str(kind).removeprefix('torch.')} products take {times:.1f} times as long as "
                "float32's on this processor; leave dtype out for float32"
            )
