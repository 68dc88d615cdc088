"""What steering asks of features (`steering.encoder.Features`): encoders and largest activations.

The units of a label's largest activation depend on the SAE: see `decoder.folds`.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from interp_steer.errors import SteerError
from interp_steer.features.decoder import LAYOUTS, ONE_KIND
from interp_steer.features.feature import as_index, largest, locate
from interp_steer.labels.naming import getting
from interp_steer.labels.registry import STARTER
from interp_steer.steering.encoder import Encoder, Source

if TYPE_CHECKING:
    import torch


def encoder(source: Source, device: "torch.device") -> Encoder:
    """The encoder of a feature's SAE; the same object for the same SAE and device."""
    from interp_steer.features.sae import STORE

    return STORE.encoder(source, device)


def maximum(source: Source, norm: float, stored: float) -> tuple[Source, float | None]:
    """(source, largest activation) of a stored feature by today's rule.

    An earlier version multiplied the label's number by the row's norm, whatever the SAE. The norm
    is taken out again, and what was stored is noted as `max_activation_was`.
    """
    if "label_max_activation" in source or "normalize_activations" in source:
        return source, stored
    if kind := source.get("architecture") or _kind_of(source):
        source = {**source, "architecture": kind}
    number = stored if "rescale_acts_by_decoder_norm" in source else stored / norm
    source, now = largest(source, norm, number)
    if now is not None and abs(now - stored) <= 1e-5 * abs(stored):
        return source, stored
    return {**source, "max_activation_was": repr(stored)}, now


def how_to_get_maximum(source: Source) -> str:
    """The command that brings a feature's largest activation, or "" where nobody has it."""
    place = source.get("neuronpedia", "").rpartition("/")[0]
    if not place:
        return ""
    return getting(place + ("" if source["release"] == STARTER else " --numbers"))


def _kind_of(source: Mapping[str, str]) -> str:
    """The architecture of a stored feature's SAE from what is on this machine, or ""."""
    with suppress(SteerError):
        found = locate(source["release"], source.get("sae_id") or None)
        loader = found.entry.loader if found.entry else "sae_lens"
        if loader in ONE_KIND:
            return ONE_KIND[loader]
        if found.folder or loader in LAYOUTS:  # any other would be loaded whole
            return found.row(as_index(int(source["index"])), offline=True).architecture
    return ""
