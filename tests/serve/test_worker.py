"""The thread that owns the model: failures end what they concern, and nothing else."""

import threading

import pytest

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.serve import worker as module
from interp_steer.serve.worker import Full, Job, OutOfMemory, Worker


@pytest.fixture
def worker(tiny):
    made = Worker(tiny, most=4, waiting=4)
    yield made
    made.close()


def job(prompt="The quick brown fox", tokens=12, **more):
    """A job, and what is waited for: its pieces, and an event at its end."""
    pieces, ended = [], threading.Event()

    def deliver(piece):
        pieces.append(piece)
        if isinstance(piece, Exception) or piece.finish:
            ended.set()

    return Job(Row(prompt, (), Sampling(max_new_tokens=tokens)), deliver, **more), pieces, ended


def test_pieces_are_the_engines_text(tiny, worker):
    made = [job(f"Name {n} fruits") for n in range(4)]
    worker.submit([one for one, _, _ in made])
    for one, pieces, ended in made:
        assert ended.wait(30)
        (expected,) = Engine(tiny).generate([one.row])
        assert "".join(piece.text for piece in pieces) == expected.text
        assert pieces[-1].finish == expected.finish
        assert pieces[-1].tokens == len(expected.token_ids)
    assert worker.load == (0, 0)


def test_all_or_none_are_taken(worker):
    many = [job()[0] for _ in range(9)]
    with pytest.raises(Full, match="wait already"):
        worker.submit(many)


def test_a_request_that_cannot_be_is_alone_with_it(worker):
    good, pieces, ended = job()
    bad, said, told = job("word " * 600)
    worker.submit([bad, good])
    assert told.wait(30) and "the context" in str(said[0])
    assert ended.wait(30) and pieces[-1].finish


@pytest.mark.parametrize("kind", ["memory", "other"])
def test_a_step_that_fails(worker, monkeypatch, kind):
    """Without memory the newest row makes room; after anything else all are told."""
    old, pieces, ended = job(tokens=300)
    new, said, told = job("I love the tower", tokens=300)
    step, failed = module.Stepper.step, []

    def failing(self):
        if len(self._live) == 2 and not failed:
            failed.append(1)
            raise RuntimeError("CUDA out of memory" if kind == "memory" else "broken")
        return step(self)

    monkeypatch.setattr(module.Stepper, "step", failing)
    worker.submit([old])
    worker.submit([new])
    assert told.wait(30) and ended.wait(30) and failed
    if kind == "memory":
        assert isinstance(said[-1], OutOfMemory) and pieces[-1].finish in ("length", "stop")
    else:
        assert all("broken" in str(some[-1]) for some in (said, pieces))
    again, pieces, ended = job()
    worker.submit([again])
    assert ended.wait(30) and pieces[-1].finish


def test_a_client_that_left_in_the_queue(worker):
    going = [job(tokens=200) for _ in range(4)]
    worker.submit([one for one, _, _ in going])
    waiting, pieces, _ = job()
    worker.submit([waiting])
    worker.cancel([waiting, *[one for one, _, _ in going]])
    after, said, ended = job()
    worker.submit([after])
    assert ended.wait(30) and said[-1].finish and not pieces
