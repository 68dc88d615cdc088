"""The fake GPU refuses, counts and computes as a real one does; every count is made by hand."""

import pytest
import torch
from torch.nn import functional

from tests.fakegpu import fail_at, fake_gpu


@pytest.fixture
def gpu():
    with fake_gpu() as counts:
        yield counts


@pytest.fixture
def x(gpu):
    made = torch.arange(12.0).reshape(3, 4).to("cuda:0")
    gpu.reset()
    return made


def put(x, index, value):
    x[index] = value
    return x


@pytest.mark.parametrize("operation", [
    lambda x: x + torch.ones(4),
    lambda x: torch.where(x > 0, x, torch.ones(4)),
    lambda x: torch.cat([x, torch.ones(1, 4)]),
    lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    lambda x: x @ torch.ones(4, 4),
    lambda x: functional.linear(x, torch.ones(4, 4)),
    lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    lambda x: x.index_select(0, torch.tensor([0])),
    lambda x: torch.ones(3)[(x[:, 0] > 0)],
    lambda x: put(x, torch.tensor([0]), torch.ones(1, 4)),
    lambda x: torch.tensor(1.0).add_(x[0, 0]),
    lambda x: torch.ones(3, 4).add_(x),
    lambda x: torch.equal(x, torch.ones(3, 4)),
    lambda x: functional.scaled_dot_product_attention(x[None], x[None], torch.ones(1, 3, 4)),
])  # fmt: skip
def test_tensors_of_the_cpu_are_refused(x, operation):
    with pytest.raises(RuntimeError, match="same device"):
        operation(x)


@pytest.mark.parametrize(("operation", "launches", "syncs"), [
    (lambda x: x * torch.tensor(2.0), 1, {}),  # numbers travel with the kernel
    (lambda x: x + 1, 1, {}),
    (lambda x: torch.where(x > 3, x, torch.tensor(0.0)), 2, {}),
    (lambda x: x[:, 1:].t().unsqueeze(0).expand(2, -1, -1).detach(), 0, {}),
    (lambda x: torch.stack(x.view(4, 3).unbind()), 1, {}),
    (lambda x: x.t().reshape(-1), 1, {}),
    (lambda x: functional.linear(x[None], x), 1, {}),
    (lambda x: torch.empty(3, device=x.device).fill_(1), 1, {}),
    (lambda x: x.double().float(), 2, {}),
    (lambda x: x.float().contiguous(), 0, {}),  # nothing changes
    (lambda x: torch.tensor([1, 2], device=x.device), 0, {"upload": 1}),
    (lambda x: torch.ones(3).to(x.device, non_blocking=True), 0, {}),
    (lambda x: torch.ones(3, 4).copy_(x), 0, {"download": 1}),
    (lambda x: x.copy_(torch.ones(3, 4)), 0, {"upload": 1}),
    (lambda x: put(x, (slice(None), 0), torch.ones(3)), 0, {"upload": 1}),
    (lambda x: put(x, 0, 5.0), 1, {}),
    (lambda x: put(x, x > 3, 5.0), 2, {}),  # a mask is filled without counting it
    (lambda x: put(x, x > 10, x[0, :1].expand(1)), 2, {}),
    (lambda x: x[x > 3], 2, {"size": 1}),
    (lambda x: x[torch.tensor([2, 0])], 1, {"upload": 1}),
    (lambda x: x[torch.tensor([2, 0], device=x.device)], 1, {"upload": 1}),
    (lambda x: x[[2, 0]], 1, {"upload": 1}),
    (lambda x: put(x, (slice(None), [3, 0]), 1.0), 1, {"upload": 1}),
    (lambda x: (x > 3).nonzero(), 2, {"size": 1}),
    (lambda x: x.cpu(), 0, {"download": 1}),
    (lambda x: x.tolist(), 0, {"download": 1}),
    (lambda x: x.max().item(), 1, {"item": 1}),
    (lambda x: bool((x > 3).any()), 2, {"item": 1}),
    (lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None]), 1, {}),
])  # fmt: skip
def test_results_launches_and_waits(gpu, x, operation, launches, syncs):
    plain = torch.arange(12.0).reshape(3, 4)
    result = operation(x)
    assert gpu.launches.total() == launches
    assert gpu.syncs == {(kind, "outside the package"): n for kind, n in syncs.items()}
    expected = operation(plain)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(result.cpu(), expected) and result.shape == expected.shape
        assert torch.equal(x.cpu(), plain)  # what is written in place is written to what it views
    else:
        assert result == expected


def test_where_tensors_say_they_are(gpu, x):
    for one in (x, x[0], x * 2, torch.zeros(2, device="cuda:0"), torch.zeros_like(x)):
        assert str(one.device) == "cuda:0" and one.is_cuda and not one.is_meta
    assert x.to("cuda:0") is x and x.cpu().device.type == "cpu"
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_copies_both_ways(gpu, x):
    torch.ones(3).to("cuda:0", non_blocking=True)
    torch.tensor([1], device="cuda:0").tolist()
    assert (gpu.uploads, gpu.downloads, gpu.waits) == (2, 1, 2)


def test_float64_and_attention_without_a_fused_kernel_are_noted(gpu, x):
    assert not gpu.doubles
    x.double().sum()
    assert [name for name, _ in gpu.doubles] == ["_to_copy", "sum"]
    q, kv = x.view(1, 2, 3, 2), x.view(1, 2, 3, 2)[:, :1]
    mask = torch.ones(3, 3, dtype=torch.bool, device="cuda:0")
    functional.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True)
    functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert not gpu.math_attention
    functional.scaled_dot_product_attention(q, kv, kv, attn_mask=mask, enable_gqa=True)
    assert len(gpu.math_attention) == 1


def test_memory_is_counted_and_may_run_out():
    before = torch.cuda.mem_get_info
    with fake_gpu(memory=1000) as gpu:
        x = torch.zeros(100, device="cuda:0")
        view = x[:10]
        del x
        assert gpu.live == 400 and torch.cuda.mem_get_info()[0] == 600
        with pytest.raises(torch.OutOfMemoryError):
            torch.cat([view] * 20)
        assert gpu.live == 400
        del view
        assert (gpu.live, gpu.peak) == (0, 400)
    assert torch.cuda.mem_get_info is before


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_allocation_can_fail(gpu, device):
    def work() -> torch.Tensor:
        x = torch.tensor([1.0, 2.0])  # of the CPU
        y = x.to(device, copy=True) + 1
        return torch.cat([y[:1], y.view(2)])

    with fail_at(0) as memory:
        assert work().tolist() == [2, 2, 3]
    assert memory.count == 4 + (device != "cpu")  # the last is a download
    for k in range(1, 5):
        with fail_at(k) as memory:
            with pytest.raises(torch.OutOfMemoryError, match=f"allocation {k}"):
                work()
            assert memory.count == k
            assert work().tolist() == [2, 2, 3]  # once only
