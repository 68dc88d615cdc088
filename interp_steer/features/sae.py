"""A whole sparse autoencoder beside the model: what encodes a stream into latents and back.

A decoder row alone needs none of this (see `features`); the latent clamp, activations over texts
and the fit check do. SAELens loads it, in the model's own residual units: whatever scaling its
training used is folded into the weights.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_steer.engine.memory import free
from interp_steer.errors import RequestError, RunError
from interp_steer.features.decoder import steerable
from interp_steer.features.feature import Located, locate
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering.direction import Direction
from interp_steer.steering.encoder import Source

if TYPE_CHECKING:
    from sae_lens import SAE

# Their latents depend on one dot product each; all others compete, or are found in turn.
POINTWISE = ("standard", "jumprelu")
# Their encoders look at other positions, so that a latent has no value at one position alone.
ACROSS_POSITIONS = ("temporal",)
# Latents held at once while encoding; 131k latents of a batch of prompts would not fit.
LARGEST = 2**26


class Sae:
    """A sparse autoencoder of SAELens, in float32.

    Attributes:
        inner: SAELens's object.
        site: the place whose activations it encodes.
        d_sae, d_model: how many latents; how wide the stream.
        architecture: SAELens's word for it.
        where: where it was found, with its release and id.
        trained_on: the model that it was trained on, as its files say.
    """

    def __init__(self, inner: "SAE[Any]", site: Site, where: Located) -> None:
        self.inner = inner
        self.site = site
        self.where = where
        self.d_sae, self.d_model = int(inner.cfg.d_sae), int(inner.cfg.d_in)
        self.architecture = str(inner.cfg.architecture())
        self.trained_on = str(inner.cfg.metadata.model_name or where.model or "")

    @classmethod
    def load(
        cls, where: str | Path, sae_id: str | None = None, device: str | torch.device = "cpu"
    ) -> "Sae":
        """Loads an SAE by release and id, by `model/source`, or from a folder SAELens saved.

        Args:
            where: a release of SAELens's registry, a Neuronpedia source, a folder, or "starter".
            sae_id: with a release, which of its SAEs.

        Raises:
            RequestError: an unknown name, or an SAE that cannot be used here, with the reason.
            RunError: it cannot be fetched, or its files are damaged.
        """
        return STORE.load(locate(where, sae_id), torch.device(device))

    @classmethod
    def of(cls, direction: Direction, device: str | torch.device = "cpu") -> "Sae":
        """The SAE that a feature's direction came from.

        Raises:
            RequestError: the direction is no feature of an SAE.
        """
        if not direction.is_feature:
            raise RequestError(
                f"{direction.label} is no feature of an SAE, so it has no latent; make it with "
                "feature(release, sae_id, index)"
            )
        source = direction.source
        return cls.load(source["release"], source.get("sae_id") or None, device)

    @property
    def name(self) -> str:
        """Release and id, for people."""
        return self.where.name

    def __repr__(self) -> str:
        return f"Sae({self.name}, {self.architecture}, {self.d_sae} latents at {self.site})"

    def check(self, model: SteeringModel) -> None:
        """Whether it fits a model.

        Raises:
            RequestError: another width, or no such layer.
        """
        if self.d_model != model.d_model:
            raise RequestError(
                f"{self.name} encodes streams {self.d_model} wide; {model.name} is "
                f"{model.d_model} wide (it was trained on {self.trained_on or 'another model'})"
            )
        model.check(self.site, self.d_model)

    def check_clampable(self) -> None:
        """Whether x + (c - f(x)) d means a latent of value c.

        Raises:
            RequestError: its encoder looks across positions, or it rescales every activation by a
                number of its own, so that a latent's unit differs from position to position.
        """
        if self.architecture in ACROSS_POSITIONS:
            raise RequestError(
                f"{self.name} is a {self.architecture} SAE: its encoder looks across positions, so "
                "a latent cannot be clamped at one of them; add or clamp its decoder row"
            )
        if self.rescales:
            raise RequestError(
                f"{self.name} rescales every activation ({self.inner.cfg.normalize_activations}), "
                "so a latent has no fixed unit; add or clamp its decoder row"
            )

    @property
    def rescales(self) -> bool:
        """Whether each activation is normalised by its own length before it is encoded."""
        return self.inner.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")

    def on(self, device: str | torch.device) -> "Sae":
        """The same SAE on a device."""
        here = torch.device(device) == self.inner.W_dec.device
        return self if here else STORE.load(self.where, torch.device(device))

    def encode(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_sae"]:
        """Latents of activations, as SAELens computes them."""
        with torch.no_grad():
            out: Tensor = self.inner.encode(x.float())
        return out

    def decode(self, latents: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_model"]:
        """The reconstruction from latents."""
        with torch.no_grad():
            out: Tensor = self.inner.decode(latents)
        return out

    def index(self, index: int) -> int:
        """The index of a feature, checked.

        Raises:
            RequestError: the SAE has no such feature.
        """
        if type(index) is not int or not 0 <= index < self.d_sae:
            raise RequestError(
                f"feature {index} is out of range: {self.name} has features 0-{self.d_sae - 1}"
            )
        return index

    def split(
        self, x: Float[Tensor, "*rows d_model"]
    ) -> tuple[Float[Tensor, "*rows d_sae"], Float[Tensor, "*rows d_model"]]:
        """Latents, and the error term: decode(latents) + error is x."""
        latents = self.encode(x)
        return latents, x.float() - self.decode(latents)

    def rows(self, index: Int[Tensor, "*which"]) -> Float[Tensor, "*which d_model"]:
        """What one unit of each latent adds to the reconstruction: its decoder row."""
        rows: Tensor = self.inner.W_dec.detach()[index]
        if getattr(self.inner.cfg, "rescale_acts_by_decoder_norm", False):
            rows = rows / rows.norm(dim=-1, keepdim=True)
        return rows

    def latents(
        self, x: Float[Tensor, "batch pos d_model"], index: Int[Tensor, "batch k"]
    ) -> Float[Tensor, "batch pos k"]:
        """Some latents of every row of a batch: each row its own.

        Where a latent depends on its own encoder row alone, only those rows are used.
        """
        inner: Any = self.inner
        if self.architecture in POINTWISE and inner.cfg.reshape_activations == "none":
            x = x.float()
            if inner.cfg.apply_b_dec_to_input:
                x = x - inner.b_dec.detach()
            encoder = inner.W_enc.detach().T[index]
            pre = torch.einsum("bpd,bkd->bpk", x, encoder) + inner.b_enc.detach()[index][:, None]
            live: Tensor = pre.relu()
            if self.architecture == "jumprelu":
                live = live * (pre > inner.threshold.detach()[index][:, None])
            return live
        wanted = index[:, None].expand(-1, x.shape[1], -1)
        at_once = max(1, LARGEST // (self.d_sae * x.shape[1]))
        parts = [
            self.encode(x[start : start + at_once]).gather(-1, wanted[start : start + at_once])
            for start in range(0, len(x), at_once)
        ]
        return torch.cat(parts)

    def over(
        self, model: SteeringModel, encoded: Sequence[Encoded], batch: int = 16
    ) -> Iterator[tuple[Float[Tensor, "pos d_model"], Float[Tensor, "pos d_sae"]]]:
        """Activations and latents of prompts, unsteered, one prompt after the other.

        The first position, an attention sink whatever its token, is left out: row i of both is
        position i + 1.
        """
        self.check(model)
        own = self.on(model.device)
        for start in range(0, len(encoded), batch):
            some = encoded[start : start + batch]
            x, _ = model.read(self.site, some)
            for one, stream in zip(some, x.float(), strict=True):
                kept = stream[1 : len(one.ids)]
                yield kept, own.encode(kept)


class SaeStore:
    """Loads SAEs, each once a device. One that somebody holds is never loaded again. The latest are
    held by the store, on each device within a budget.
    """

    def __init__(self, budget: int | None = None) -> None:
        """`budget` is in bytes a device; None is a quarter of its memory that is free at first."""
        self._budget = budget
        self._budgets: dict[str, int] = {}
        self._held: WeakValueDictionary[tuple[Located, str], Sae] = WeakValueDictionary()
        self._latest: OrderedDict[tuple[Located, str], Sae] = OrderedDict()
        self._lock = RLock()

    def load(self, where: Located, device: torch.device) -> Sae:
        """An SAE on a device; raises as `Sae.load` does."""
        with self._lock:
            key = where, (place := str(device))
            if place not in self._budgets:
                self._budgets[place] = free(device) // 4 if self._budget is None else self._budget
            sae = self._held.get(key)
            if sae is None:
                sae = self._held[key] = _loaded(where, device)
            self._latest[key] = sae
            self._latest.move_to_end(key)
            here = [one for one in self._latest if one[1] == place]
            while len(here) > 1 and self.bytes(place) > self._budgets[place]:
                del self._latest[here.pop(0)]
            return sae

    def encoder(self, source: Source, device: torch.device) -> Sae:
        """The SAE of a feature, by its direction's source."""
        return self.load(locate(source["release"], source.get("sae_id") or None), device)

    def bytes(self, device: str) -> int:
        """What the SAEs that the store holds on a device take."""
        return sum(
            weight.numel() * weight.element_size()
            for (_, place), sae in self._latest.items()
            if place == device
            for weight in sae.inner.parameters()
        )


STORE = SaeStore()
"""Where SAEs come from, unless an engine is given another store."""


def _loaded(where: Located, device: torch.device) -> Sae:
    inner = where.whole(str(device))
    hook = steerable(str(inner.cfg.metadata.hook_name or ""), where.name)
    sae = Sae(inner, Site.parse(hook), where)
    if "transcoder" in sae.architecture:
        raise RequestError(
            f"{sae.name} is a transcoder: it reads one place and writes another, so what it "
            "decodes is no reconstruction of what it encodes"
        )
    if inner.cfg.normalize_activations == "expected_average_only_in":
        raise RunError(
            f"{sae.name} was trained on scaled activations, and its scale is not known: "
            "SAELens's registry has no norm_scaling_factor for it"
        )
    return sae
