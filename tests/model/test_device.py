"""What is said of number formats and devices."""

import time
import warnings

import pytest
import torch

from interp_steer.errors import SteerWarning
from interp_steer.model import device as places
from interp_steer.model.block import linear
from interp_steer.model.device import pick_dtype, remarks, slowness
from interp_steer.model.model import SteeringModel
from tests.conftest import command

CPU = torch.device("cpu")


def said(folder, **told) -> list[str]:
    """The notes of loading a model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SteeringModel.load(folder, **told)
    return [str(one.message) for one in caught if issubclass(one.category, SteerWarning)]


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_format_is_as_slow_as_a_clock_says(kind):
    """Other matrices, of random numbers, and other repeats. A busy moment may spoil a try."""
    assert any(0.55 < ratio(kind) < 1.8 for _ in range(6))


def ratio(kind) -> float:
    """What is measured at loading over what this clock says."""
    slowness.cache_clear()
    measured, best = slowness(pick_dtype(kind, CPU)), {}
    with torch.no_grad():
        for name in ("float32", kind) * 20:
            dtype = pick_dtype(name, CPU)
            layer = torch.nn.Linear(512, 512, bias=False).to(dtype)
            x = torch.randn(32, 512).to(dtype)
            linear(x, layer)
            begun = time.perf_counter()
            linear(x, layer)
            best[name] = min(best.get(name, 1.0), time.perf_counter() - begun)
    return measured / (best[kind] / best["float32"])


def test_measuring_is_short_and_leaves_no_trace():
    slowness.cache_clear()
    drawn = torch.get_rng_state()
    begun = time.process_time()
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        first = slowness(torch.bfloat16)
    assert time.process_time() - begun < 0.5  # 20 ms; other processes take the cores meanwhile
    assert slowness(torch.bfloat16) == first > 0  # once
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("slow", [True, False])
def test_who_asks_for_a_slow_format_is_told(tiny_folder, monkeypatch, slow):
    """With the limit below, then above, what this processor has."""
    times = slowness(torch.bfloat16)
    monkeypatch.setattr(places, "SLOW", times - 0.01 if slow else times + 0.01)
    told = (
        f"bfloat16 products take {times:.1f} times as long as float32's on this processor; leave "
        "dtype out for float32"
    )
    assert said(tiny_folder, dtype="bfloat16") == [told] * slow
    assert said(tiny_folder, dtype=torch.bfloat16) == [told] * slow


def test_who_does_not_ask_is_told_nothing_and_nothing_is_measured(tiny_folder, tmp_path):
    slowness.cache_clear()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(tiny_folder / name)
    assert said(tiny_folder) == said(tiny_folder, dtype="float32") == []
    assert said(tmp_path, dtype="bfloat16", weights=False) == []
    for device in ("cuda", "meta"):
        assert [*remarks(torch.bfloat16, torch.device(device))] == []
    assert slowness.cache_info().misses == 0


def test_a_device_that_nobody_tried_is_said_to_be_one():
    (told,) = remarks(torch.bfloat16, torch.device("mps"))
    assert told.startswith("mps is not tested; `interp-steer verify --device mps`")


def test_the_command_line_prints_a_note(tiny_folder, monkeypatch):
    monkeypatch.setattr(places, "SLOW", 0.0)
    words = ("generate", "--prompt", "Hi", "--model", tiny_folder, "--text", "--max-new-tokens", 1)
    assert "products take" not in command(*words)[1]
    _, err = command(*words, "--dtype", "float16")
    assert err.count("note: float16 products take ") == 1
