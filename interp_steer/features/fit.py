"""Whether an SAE fits a model: how much of the model's own activations it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_steer.errors import RequestError
from interp_steer.features.sae import Sae
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import Encoded
from interp_steer.stats.shares import NO_EFFECT
from interp_steer.util.console import Report, watched

# A token whose norm is more than so many medians is an attention sink, wherever it stands (massive
# activations: Sun et al. 2024, arXiv 2402.17762). Its square alone outweighs thousands of tokens
# and would be all that an explained variance tells of.
MASSIVE = 10.0
REFERENCE = 4096  # tokens that the median is taken of
# Factors tried on activations, to tell an SAE that was loaded with a wrong scale.
SCALES = tuple(2.0**power for power in range(-6, 7))
INSTRUCT = ("instruct", "chat", "-it", "_it")


@dataclass(frozen=True)
class Fit:
    """What an SAE does to a model's activations; the first position and padding left out.

    Attributes:
        tokens, texts: how much was read.
        explained_variance: 1 - sum |x - x^|^2 / sum |x - mean x|^2, over all tokens at once but the
            massive ones.
        massive: share of tokens with massive activations: a norm above 10 medians.
        explained_variance_all: the same with them, as SAELens counts.
        l0: mean number of latents that are not 0.
        norm_ratio: median of |x^| / |x|.
        cosine: mean of cos(x, x^).
        silent: share of latents that were 0 at every token.
        ce, ce_spliced, ce_ablated: cross-entropy of the next token in nats: of the model, with x^
            in place of x, with 0 in place of x (the first position kept); None if not asked for.
        ce_score: (ablated - spliced) / (ablated - model); None where ablation does no harm beyond
            rounding, as the score would mean nothing.
        best_scale: the factor on activations that gives the best explained variance; far from 1
            the SAE was loaded with a wrong scale.
        warnings: what a reader of the other numbers should know.
    """

    tokens: int
    texts: int
    explained_variance: float
    massive: float
    explained_variance_all: float
    l0: float
    norm_ratio: float
    cosine: float
    silent: float
    ce: float | None
    ce_spliced: float | None
    ce_ablated: float | None
    ce_score: float | None
    best_scale: float
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """All fields, for programs."""
        return asdict(self)


class _Variance:
    """Sums from which an explained variance follows."""

    def __init__(self, d_model: int) -> None:
        self.tokens = 0
        self._sum = torch.zeros(d_model, dtype=torch.float64)
        self._square = self._error = 0.0

    def add(self, x: Tensor, back: Tensor) -> None:
        wide, reconstruction = x.cpu().double(), back.cpu().double()
        self.tokens += len(x)
        self._sum += wide.sum(0)
        self._square += wide.square().sum().item()
        self._error += (wide - reconstruction).square().sum().item()

    @property
    def explained(self) -> float:
        total = self._square - (self._sum.square().sum() / self.tokens).item()
        if total <= 1e-9 * self._square:
            raise RequestError(
                f"{self.tokens} tokens were read and their activations do not differ: there is no "
                "variance to explain; give more text"
            )
        return 1 - self._error / total


class Tally:
    """Sums over tokens from which the numbers of a `Fit` follow; may go on over several sets of
    texts.

    Attributes:
        fired: [d_sae] at how many tokens each latent was not 0.
        peak: [d_sae] the largest value of each latent.
    """

    def __init__(self, d_model: int, d_sae: int) -> None:
        self.tokens = self.texts = 0
        self.fired = torch.zeros(d_sae, dtype=torch.float64)
        self.peak = torch.zeros(d_sae, dtype=torch.float32)
        self._cosine = 0.0
        self._ratios: list[Tensor] = []
        self._norms = torch.zeros(0, dtype=torch.float32)
        self._all, self._ordinary = _Variance(d_model), _Variance(d_model)

    def add(
        self,
        x: Float[Tensor, "pos d_model"],
        latents: Float[Tensor, "pos d_sae"],
        back: Float[Tensor, "pos d_model"],
    ) -> Bool[Tensor, " pos"]:
        """Counts one text: activations, latents, reconstruction. Gives its ordinary tokens."""
        self.count(latents)
        ordinary = self._ordinary_tokens(x)
        self._all.add(x, back)
        self._ordinary.add(x[ordinary], back[ordinary])
        self._cosine += torch.cosine_similarity(x, back, dim=-1).sum().item()
        self._ratios.append((back.norm(dim=-1) / x.norm(dim=-1)).cpu())
        return ordinary

    def _ordinary_tokens(self, x: Float[Tensor, "pos d_model"]) -> Bool[Tensor, " pos"]:
        """Which tokens have no massive activation, by the median of the first ones seen: a short
        text may be all sink.
        """
        norms = x.norm(dim=-1)
        if len(self._norms) < REFERENCE:
            self._norms = torch.cat([self._norms, norms.cpu()])
        kept: Tensor = norms <= MASSIVE * self._norms.median().to(norms.device)
        return kept

    def count(self, latents: Float[Tensor, "pos d_sae"]) -> None:
        """Counts one text's latents alone."""
        self.tokens += len(latents)
        self.texts += 1
        self.fired += (latents > 0).sum(0).cpu()
        self.peak = torch.maximum(self.peak, latents.amax(0).cpu())

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers of a `Fit` that need no second pass."""
        return {
            "explained_variance": self._ordinary.explained,
            "massive": 1 - self._ordinary.tokens / self.tokens,
            "explained_variance_all": self._all.explained,
            "l0": (self.fired.sum() / self.tokens).item(),
            "norm_ratio": torch.cat(self._ratios).median().item(),
            "cosine": self._cosine / self.tokens,
            "silent": (self.fired == 0).double().mean().item(),
        }


def check(
    sae: Sae,
    model: SteeringModel,
    encoded: Sequence[Encoded],
    *,
    loss_texts: int = 32,
    tally: Tally | None = None,
    report: Report | None = None,
) -> Fit:
    """Reads texts through the model and the SAE.

    Args:
        encoded: texts or chats of the kind that the SAE will be used on.
        loss_texts: for so many of them the cross-entropies are measured too; 0 for none.
        tally: counts latents too, over all the texts that it is given to; the numbers returned are
            of these texts alone.
        report: called with the number of texts done, the losses' texts included.

    Raises:
        RequestError: the SAE does not fit the model, or no text is two tokens long.
    """
    encoded = [one for one in encoded if len(one.ids) > 1]
    if not encoded:
        raise RequestError("no text is two tokens long: there is nothing to check the SAE on")
    sae.check(model)
    texts = len(encoded) + min(loss_texts, len(encoded))
    with watched("reading texts", texts, report) as told:
        return _checked(sae, model, encoded, loss_texts, tally, told)


def _checked(
    sae: Sae,
    model: SteeringModel,
    encoded: Sequence[Encoded],
    loss_texts: int,
    tally: Tally | None,
    report: Report | None,
) -> Fit:
    """The same for texts of two tokens or more and an SAE that fits."""
    own = sae.on(model.device)
    mine = Tally(sae.d_model, sae.d_sae)
    sample: list[Tensor] = []
    for number, (x, latents) in enumerate(own.over(model, encoded), start=1):
        ordinary = mine.add(x, latents, own.decode(latents))
        if tally is not None:
            tally.count(latents)
        if sum(map(len, sample)) < 2048:
            sample.append(x[ordinary])
        if report:
            report(number)
    numbers = mine.numbers
    losses = _losses(own, model, encoded[:loss_texts], len(encoded), report)
    scale = _best_scale(own, torch.cat(sample))
    ce, spliced, ablated = losses or (None, None, None)
    score = _ce_score(*losses) if losses else None
    return Fit(
        mine.tokens,
        mine.texts,
        **numbers,
        ce=ce,
        ce_spliced=spliced,
        ce_ablated=ablated,
        ce_score=score,
        best_scale=scale,
        warnings=tuple(_warnings(sae, model, numbers, scale, losses is not None and score is None)),
    )


def _ce_score(ce: float, spliced: float, ablated: float) -> float | None:
    return (ablated - spliced) / (ablated - ce) if ablated - ce >= NO_EFFECT else None


def _warnings(
    sae: Sae, model: SteeringModel, numbers: dict[str, float], scale: float, pointless: bool
) -> list[str]:
    said = []
    trained = sae.trained_on.rpartition("/")[2].casefold()
    here = model.name.rpartition("/")[2].casefold()
    base = trained and not any(mark in trained for mark in INSTRUCT)
    if base and model.is_chat:
        said.append(
            f"the SAE was trained on {sae.trained_on}, a base model, and {model.name} is tuned for "
            "chat: what is reconstructed badly here was not seen in training"
        )
    elif trained and here != "starter" and trained not in (here, here.replace("meta-", "")):
        said.append(f"the SAE was trained on {sae.trained_on}; this is {model.name}")
    if scale != 1:
        said.append(
            f"it reconstructs best when activations are multiplied by {scale:g}: its weights are "
            "probably in other units than this model's stream (a scaling not folded in)"
        )
    elif not 0.7 < numbers["norm_ratio"] < 1.3:
        said.append(
            f"reconstructions are {numbers['norm_ratio']:.2f} times as long as what they stand for"
        )
    if numbers["explained_variance"] < 0.5:
        said.append("less than half of the variance is explained: do not trust its features here")
    if pointless:
        said.append("the model predicts no worse without this site: there is no CE-loss score")
    return said


def _best_scale(sae: Sae, x: Float[Tensor, "pos d_model"]) -> float:
    """The factor s for which decode(encode(s x)) / s is closest to x; 1 where that is good enough
    or no other leaves less than half of the error.
    """
    errors = {
        s: (sae.decode(sae.encode(x * s)) / s - x).square().sum().item() for s in (1.0, *SCALES)
    }
    best = min(errors, key=errors.__getitem__)
    poor = errors[1.0] > 0.2 * (x - x.mean(0)).square().sum().item()
    return best if poor and errors[best] < errors[1.0] / 2 else 1.0


def _losses(
    sae: Sae, model: SteeringModel, encoded: Sequence[Encoded], done: int, report: Report | None
) -> tuple[float, float, float] | None:
    """Mean cross-entropy as it is, with the reconstruction spliced in, and with zeros."""
    changes: tuple[Callable[[Tensor], Tensor] | None, ...] = (
        None,
        lambda x: sae.decode(sae.encode(x)),
        torch.zeros_like,
    )
    if not encoded:
        return None
    sums, tokens = [0.0, 0.0, 0.0], 0
    for number, one in enumerate(encoded, start=1):
        tokens += len(one.ids) - 1
        for i, change in enumerate(changes):
            sums[i] += model.cross_entropy(one, sae.site, change).sum().item()
        if report:
            report(done + number)
    return sums[0] / tokens, sums[1] / tokens, sums[2] / tokens
