"""What steering asks of a sparse autoencoder, without knowing where one comes from.

A feature's direction says in its `source` which SAE it is from. `latent_clamp` needs that SAE's
encoder, and a stored feature may need its largest activation read by today's rule. Who can answer
is put into `features` by the root of the package, and loaded when first asked.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor

Encoders = Callable[["Source", "torch.device"], "Encoder"]
"""Gives encoders: the same object for the same SAE and device."""

Source = Mapping[str, str]
"""Where a feature is from: its release, sae_id, index and more, as `Direction.source` has it."""


@runtime_checkable
class Encoder(Protocol):
    """The encoder of an SAE and its decoder rows."""

    @property
    def name(self) -> str:
        """For people."""

    def check_clampable(self) -> None:
        """Raises RequestError where x + (c - f(x)) d does not mean a latent of value c."""

    def rows(self, index: "Int[Tensor, '*which']") -> "Float[Tensor, '*which d_model']":
        """What one unit of each latent adds: its decoder row."""

    def latents(
        self, x: "Float[Tensor, 'batch pos d_model']", index: "Int[Tensor, 'batch k']"
    ) -> "Float[Tensor, 'batch pos k']":
        """Some latents of every row of a batch: each row its own."""


@runtime_checkable
class Features(Protocol):
    """What is known of features beyond their directions."""

    def encoder(self, source: Source, device: "torch.device") -> Encoder:
        """The encoder of a feature's SAE; the same object for the same SAE and device."""

    def maximum(self, source: Source, norm: float, stored: float) -> tuple[Source, float | None]:
        """(source, largest activation) of a stored feature by today's rule."""

    def how_to_get_maximum(self, source: Source) -> str:
        """The command that brings a feature's largest activation."""


def nobody() -> Features:
    """Until the root of the package names who knows."""
    raise RuntimeError("import interp_steer before its parts: nothing is known of SAEs yet")


features: Callable[[], Features] = nobody
