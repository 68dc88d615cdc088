"""Which features will steer: cheap scores of many features before any text is generated.

Firing on a concept (a good label) and promoting it are different things: features with a high
output score steer, those with a high input score mostly only detect (Arad et al. 2025,
arXiv 2505.20063).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row
from interp_steer.errors import RequestError
from interp_steer.features.contexts import Context
from interp_steer.features.sae import Sae
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import Prompt
from interp_steer.steering.direction import Direction
from interp_steer.steering.intervention import Intervention, Scope
from interp_steer.util.console import Report

PROMPT = "From my experience,"  # Arad et al.'s neutral prompt
RAISE = 10.0  # their amplification, in units of the largest activation at the prompt's last token
TOKENS = 20  # the size of a feature's token set, theirs


@dataclass(frozen=True)
class Screened:
    """Scores of one feature.

    Attributes:
        index: of the feature.
        promoted: its token set T, best first: the tokens with the largest logits of
            unembed(final_norm(d)), the logit lens on its decoder row.
        output_score: (1 - min rank(t) / |V|) max p(t) over t in T, with the latent raised at the
            last token of a neutral prompt; rank 0 is the likeliest. 0 to 1; from 0.01 on a feature
            is worth steering with (Arad et al.).
        input_score: share of its top contexts whose peak token is in T; None without contexts.
        confidence: change of the next token's confidence by the same raise, the mean of
            -ln p over the likeliest TOKENS tokens (Wang et al. 2025, arXiv 2510.03659).
        norm: length of its decoder row, in residual units.
        density: share of tokens on which it fires, where known.
    """

    index: int
    promoted: tuple[str, ...]
    output_score: float
    input_score: float | None
    confidence: float
    norm: float
    density: float | None = None

    def as_json(self) -> dict[str, object]:
        """All fields, for programs."""
        return asdict(self)


def promoted(
    model: SteeringModel, rows: Float[Tensor, "n d_model"], k: int = TOKENS
) -> tuple[list[list[int]], list[list[str]]]:
    """Token ids, and their texts, that decoder rows promote most, by the logit lens."""
    # rows of some SAEs are so short that the norm's epsilon would count
    unit = rows / rows.norm(dim=-1, keepdim=True) * model.d_model**0.5
    with torch.no_grad():
        logits = model.unembed(unit.to(model.device, model.dtype)).float()
    ids = logits.topk(k, dim=-1).indices.tolist()
    return ids, [[model.decode_token(i) for i in one] for one in ids]


def screen(
    sae: Sae,
    model: SteeringModel,
    features: Sequence[int],
    *,
    contexts: Mapping[int, Sequence[Context]] | None = None,
    density: Mapping[int, float] | None = None,
    prompt: Prompt = PROMPT,
    batch: int = 256,
    report: Report | None = None,
) -> list[Screened]:
    """Scores features, in the given order, in batches of one forward pass each.

    The raise is an addition at the last position: with everything else fixed, raising latent i by
    r adds r d_i to the stream.

    Args:
        contexts: top contexts, for input scores.
        density: share of tokens on which each fires.

    Raises:
        RequestError: a feature that the SAE does not have, an SAE that does not fit the model, or a
            prompt at whose last token no latent is active, so that there is nothing to raise by.
    """
    features = [sae.index(i) for i in features]
    engine = Engine(model)
    (_, latents), *_ = sae.over(model, [model.encode(prompt)])
    lift = RAISE * latents[-1].max().item()
    if lift <= 0:
        raise RequestError(
            f"no latent is active at the last token of {str(prompt)[:60]!r}: {RAISE:g} times its "
            "largest activation raises nothing; give another prompt"
        )
    plain = engine.score([Row(prompt)], [()], last_logits=True)[0].last_logits
    assert plain is not None
    before = _confidence(plain[None])[0].item()
    scored: list[Screened] = []
    for start in range(0, len(features), batch):
        some = features[start : start + batch]
        rows = sae.rows(torch.tensor(some))
        ids, texts = promoted(model, rows)
        raised = [Row(prompt, (_raised(row, lift, sae),)) for row in rows]
        scores = engine.score(raised, [()] * len(some), last_logits=True)
        logits = torch.stack([s.last_logits for s in scores if s.last_logits is not None])
        output, confidence = _output(logits, ids), _confidence(logits)
        for i, index in enumerate(some):
            seen = [c.token for c in (contexts or {}).get(index, ())]
            scored.append(
                Screened(
                    index,
                    tuple(texts[i]),
                    output[i],
                    sum(t in texts[i] for t in seen) / len(seen) if seen else None,
                    confidence[i].item() - before,
                    rows[i].norm().item(),
                    (density or {}).get(index),
                )
            )
        if report:
            report(len(scored))
    return scored


def output_scores(
    model: SteeringModel,
    directions: Sequence[Direction],
    length: float,
    *,
    prompt: Prompt = PROMPT,
    batch: int = 256,
) -> list[float]:
    """The output score of any directions: as for features, with a length in place of a latent's.

    Args:
        length: of what is added at the prompt's last token, in residual units; Arad et al. raise a
            latent by ten times the largest activation there, which other directions do not have.

    Raises:
        RequestError: a length of 0 or less, or directions that do not fit the model.
    """
    if not length > 0:
        raise RequestError(f"a length of {length:g}; expected above 0, such as the median norm")
    found: list[float] = []
    for start in range(0, len(directions), batch):
        some = directions[start : start + batch]
        ids, _ = promoted(model, torch.stack([one.unit for one in some]))
        scope = Scope("last", first=True)
        raised = [
            Row(prompt, (Intervention("add", (one,), length, "", (one.site,), scope),))
            for one in some
        ]
        scores = Engine(model).score(raised, [()] * len(some), last_logits=True)
        logits = torch.stack([s.last_logits for s in scores if s.last_logits is not None])
        found += _output(logits, ids)
    return found


def _raised(row: Float[Tensor, " d_model"], lift: float, sae: Sae) -> Intervention:
    direction = Direction.of(row, sae.site.hook_point)
    length = lift * direction.norm
    return Intervention("add", (direction,), length, "", (sae.site,), Scope("last", first=True))


def _output(logits: Float[Tensor, "n d_vocab"], ids: list[list[int]]) -> list[float]:
    """Arad et al.'s output score from logits of the raised model."""
    probabilities = logits.softmax(-1)
    values = []
    for row, tokens in zip(probabilities, ids, strict=True):
        own = row[torch.tensor(tokens)].max()
        # the likeliest of the set has the smallest rank: how many tokens are likelier
        rank = (row > own).sum().item()
        values.append((1 - rank / len(row)) * own.item())
    return values


def _confidence(logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
    """Mean of -ln p over the likeliest TOKENS tokens: large where one token takes all."""
    return -logits.log_softmax(-1).topk(TOKENS, dim=-1).values.mean(-1)
