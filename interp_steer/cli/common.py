"""What the commands share: options of one meaning everywhere, and loading a model behind them."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from interp_steer.util.console import progress

if TYPE_CHECKING:
    from interp_steer.model.model import SteeringModel

Model = Annotated[str, typer.Option(help="'starter', a folder, or a hub id.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda:0, ...")]
Date = Annotated[
    str | None,
    typer.Option(
        help="Told to a chat template that asks for the date; default 2024-07-26, on any day."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def load(
    name: str,
    dtype: str | None,
    device: str | None,
    revision: str | None = None,
    *,
    date: str | None = None,
) -> "SteeringModel":
    """The model, its imports announced; raises as `SteeringModel.load` does."""
    # Spinning OpenMP threads make short decoding steps up to 30 times slower on a busy machine.
    # To be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with progress("starting", every=5):
        from interp_steer.model.model import SteeringModel

    return SteeringModel.load(name, dtype=dtype, device=device, revision=revision, date=date)
