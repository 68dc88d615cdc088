"""Chunks on Ray actors, on this machine or a cluster: `pip install 'interp-steer[ray]'`.

Only this file imports Ray. Ray turns chunks into records; the process that started the run keeps
the plan and writes the rows. Each actor loads a model from its own disk and runs one chunk at a
time. A worker that dies is restarted, and its chunk runs again. A chunk whose worker dies three
times has failed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from interp_steer.errors import RequestError, RunError
from interp_steer.study.chunk import Chunk, Mapper, Outcome, Record, Start

TRIES = 3


class _Worker:
    """An actor: a model, and the chunks that it is given."""

    def __init__(self, load: Mapping[str, Any], threads: int, modules: Sequence[str]) -> None:
        import torch

        from interp_steer.engine.engine import Engine
        from interp_steer.model.model import SteeringModel
        from interp_steer.study.modules import load_modules

        torch.set_num_threads(threads)
        load_modules(modules)
        self._engine = Engine(SteeringModel.load(**load))

    def run(self, chunk: Chunk) -> list[Record]:
        from interp_steer.study.chunk import measure

        return measure(self._engine, chunk)


def on_ray(
    load: Mapping[str, Any],
    *,
    workers: int = 1,
    gpus: float = 0.0,
    address: str | None = None,
) -> Start:
    """A mapper for `Study.run`.

    Args:
        load: arguments of `SteeringModel.load`, which every worker calls.
        workers: actors.
        gpus: GPUs for each; several workers may share one (0.5).
        address: of a running cluster; None starts Ray on this machine.

    Raises:
        RunError: Ray is not installed, or does not start.
    """

    @contextmanager
    def started(manifest: Mapping[str, Any]) -> Iterator[Mapper]:
        try:
            import ray
        except ImportError as error:
            raise RunError("--ray needs Ray: pip install 'interp-steer[ray]'") from error
        threads = int(manifest["threads"])
        try:
            if address is None:
                ray.init(
                    num_cpus=workers,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                )
            else:
                ray.init(address=address, log_to_driver=False)
        except Exception as error:
            raise RunError(f"Ray does not start: {str(error).strip().splitlines()[-1]}") from error
        try:
            actor = ray.remote(
                num_cpus=1,
                num_gpus=gpus,
                max_restarts=-1,
                max_task_retries=TRIES - 1,
                # Ray gives an actor one thread; sums depend on how many share them
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
            )(_Worker)
            pool = [actor.remote(dict(load), threads, manifest["modules"]) for _ in range(workers)]
            yield lambda chunks: _map(ray, pool, chunks)
        finally:
            ray.shutdown()

    return started


def gpus_each(
    asked: float | None, workers: int, device: str | None, kind: str, here: int | None
) -> float:
    """GPUs of each worker: as many as asked for, else one if the model is on a GPU.

    Args:
        asked: the number asked for, or None.
        device: what the workers load the model on; None leaves it to them.
        kind: "cpu" or "cuda": the device that the model is on in this process.
        here: GPUs of this machine. None for a cluster: its machines are not known here.

    Raises:
        RequestError: there are not so many, or the model would not be on them.
    """
    gpus = float(kind == "cuda") if asked is None else asked
    if not 0 <= gpus < math.inf or (gpus > 1 and gpus != int(gpus)):
        raise RequestError(
            f"--gpus-per-worker is {gpus:g}, expected 0, a share of one such as 0.5, or 1, 2, ..."
        )
    place = (device or "").partition(":")
    if place[0] == "cuda" and not gpus:
        raise RequestError(f"--device {device} needs --gpus-per-worker above 0: workers see no GPU")
    if place[0] == "cuda" and place[2] not in ("", "0"):
        raise RequestError(f"--device {device}: each worker sees its own GPU alone, as cuda:0")
    if place[0] == "cpu" and gpus:
        raise RequestError(f"--gpus-per-worker is {gpus:g}, but --device is {device}")
    if here is not None and gpus:
        fit = int(here / gpus) if gpus >= 1 else here * int(1 / gpus)
        if fit < workers:
            raise RequestError(
                f"{workers} workers of {gpus:g} GPUs each do not fit on this machine's {here}; "
                f"at most {fit} do"
            )
    if asked is not None and not gpus and kind == "cuda":
        raise RequestError("--gpus-per-worker is 0, but the model is on a GPU here: --device cpu")
    return gpus


def _map(ray: Any, pool: Sequence[Any], chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Outcome]]:
    """Each actor has one chunk at a time: if the actor dies, that chunk has failed."""
    free, waiting = list(pool), list(chunks)
    flying: dict[Any, tuple[Any, Chunk]] = {}
    while waiting or flying:
        while free and waiting:
            worker, chunk = free.pop(), waiting.pop(0)
            task = worker.run.options(max_task_retries=_tries(chunk) - 1).remote(chunk)
            flying[task] = worker, chunk
        done, _ = ray.wait(list(flying), num_returns=1)
        worker, chunk = flying.pop(done[0])
        try:
            outcome: Outcome = ray.get(done[0])
        except Exception as error:
            cause = getattr(error, "cause", None)
            outcome = cause if isinstance(cause, Exception) else error
            if type(error).__name__ in ("ActorDiedError", "ActorUnavailableError"):
                outcome = RunError(f"its worker died {_tries(chunk)} times")
        free.append(worker)
        yield chunk, outcome


def _tries(chunk: Chunk) -> int:
    """How often a chunk is tried. Part of a failed chunk is not tried again but halved again."""
    return TRIES if chunk.whole or len(chunk) == 1 else 1
