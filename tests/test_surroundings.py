"""Numbers do not depend on what the caller has switched on in torch, nor on who drives a batch."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from interp_steer.engine import hooks
from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse

LINES = ("", "add(way, 4) at 2", "clamp(way, 2) at 3; ablate(way) at mlp_out 1",
         "rotate(way, other, 40 deg) at 2 if cos(way, 1) > -1")  # fmt: skip


@pytest.fixture(scope="module")
def engine(tiny: SteeringModel) -> Engine:
    return Engine(tiny)


@pytest.fixture(scope="module")
def settings() -> list:
    draw = torch.Generator().manual_seed(0)
    way, other = (
        Direction.of(torch.randn(64, generator=draw), "blocks.2.hook_resid_post", name)
        for name in ("way", "other")
    )
    return [parse(text, {"way": way, "other": other}) for text in LINES]


def rows(settings: list) -> list[Row]:
    hot = Sampling(max_new_tokens=8, temperature=0.8, top_p=0.9, repetition_penalty=1.1)
    sampled = [Row("The fox", setting, hot, seed=1) for setting in settings]
    return [*(Row("The fox", s, Sampling(max_new_tokens=8)) for s in settings), *sampled]


@contextlib.contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": float64,
    "inference_mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("around", CONTEXTS)
def test_what_surrounds_the_engine_changes_no_number(engine, settings, around):
    given = [(5, 6, 7)] * 8
    wanted = [result.token_ids for result in engine.generate(rows(settings))]
    scores = engine.score(rows(settings), given, reference=[None, *[0] * 7], last_logits=True)
    with CONTEXTS[around]():
        again = Engine(engine.model)
        found = [result.token_ids for result in again.generate(rows(settings))]
        others = again.score(rows(settings), given, reference=[None, *[0] * 7], last_logits=True)
        traced, _ = hooks.run_with_cache(engine.model, "The fox", settings[1])
        entropy = engine.model.cross_entropy(engine.model.encode("The fox"), Site("resid_post", 2))
    assert found == wanted
    for one, other in zip(scores, others, strict=True):
        assert torch.equal(one.last_logits, other.last_logits)
        assert torch.equal(one.logprobs, other.logprobs) and one.logprobs.dtype == torch.float32
        assert one.kl is None or torch.equal(one.kl, other.kl)
    plain, _ = hooks.run_with_cache(engine.model, "The fox", settings[1])
    assert torch.equal(traced, plain) and traced.dtype == torch.float32
    assert entropy.dtype == torch.float32


def test_a_block_of_its_own_runs_under_autocast(tiny):
    """As transformers' does, in the format that autocast asks for."""
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)[None]
    with torch.no_grad():
        exact = tiny.block(1, x, tiny.rotary(x, positions))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = tiny.block(1, x, tiny.rotary(x, positions))
    assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("late", [False, True])
def test_a_batch_may_be_begun_inside_inference_mode(engine, settings, late):
    some = rows(settings)
    wanted = [result.token_ids for result in engine.generate(some)]
    stepper = engine.stepper()
    ids = [stepper.add(row) for row in some[:5]]
    with torch.inference_mode():
        stepper.step(), stepper.step()
        ids += [] if late else [stepper.add(row) for row in some[5:]]
        stepper.step()
    ids += [stepper.add(row) for row in some[5:]] if late else []
    while stepper.busy:
        stepper.step()
    assert [stepper.pop(id).token_ids for id in ids] == wanted


def test_a_pass_that_is_read_in_part_leaves_gradients_on(tiny):
    passes = tiny.residuals([tiny.encode("The fox")])
    next(passes)
    next(passes)
    assert torch.is_grad_enabled()


def test_two_threads_may_drive_one_batch(engine):
    lengths = range(3, 60, 4)
    some = [Row("The quick", (), Sampling(max_new_tokens=n)) for n in lengths]
    wanted = [result.token_ids for result in engine.generate(some)]
    for _ in range(5):
        stepper, raised = engine.stepper(), []
        ids = [stepper.add(row) for row in some]

        def drive(stepper=stepper, raised=raised) -> None:
            try:
                while stepper.busy:
                    stepper.step()
            except Exception as error:
                raised.append(error)

        threads = [threading.Thread(target=drive) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert raised == []
        assert [stepper.pop(id).token_ids for id in ids] == wanted
