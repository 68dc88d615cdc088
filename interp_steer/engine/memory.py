"""How much memory rows need, and how much there is."""

import torch

from interp_steer.model.model import SteeringModel


def working(model: SteeringModel, read: int, kept: int, device: torch.device | None = None) -> int:
    wide, on_gpu = model.dtype.itemsize, (device or model.device).type == "cuda"
    cache = 2 * model.n_layers * model.n_kv_heads * model.d_head * wide
    passing = (4 * model.d_model + 3 * model.shape.d_mlp) * wide * read
    early = cache * (kept if on_gpu else min(read, kept)) + passing
    logits = 3 * model.d_vocab * 4
    return max(early, cache * kept + logits)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)


def release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free(device: torch.device) -> int:
    import psutil

    return psutil.virtual_memory().available


def chunks(order, needs, budget):
    chunk, total = [], 0
    for row in order:
        if chunk and total + needs[row] > budget:
            yield chunk
            chunk, total = [], 0
        chunk.append(row)
        total += needs[row]
    if chunk:
        yield chunk
