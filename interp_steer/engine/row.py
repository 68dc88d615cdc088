"""A row: one prompt under an ordered tuple of interventions, with one seed and sampling setting."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Encoded, Given, last_said
from interp_steer.steering.intervention import Intervention, brief, line
from interp_steer.steering.scale import Scale
from interp_steer.util.typed import OF_TYPES, expect


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in Hugging Face's order and meaning.

    Attributes:
        temperature: 0 is greedy.
        top_p, top_k: 1 and 0 keep every token.
        repetition_penalty: on every id seen so far, the prompt included; 1 is none.
        max_new_tokens: at most so many; the model's stop ids end a row earlier.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        for one in fields(self):
            expect(one.name, getattr(self, one.name), OF_TYPES[one.type])
        limits = {
            "temperature": (self.temperature, 0 <= self.temperature < math.inf, "at least 0"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k, 0 <= self.top_k < 2**31, "at least 0"),
            "repetition_penalty": (
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "above 0",
            ),
            "max_new_tokens": (self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
        }
        for name, (value, good, expected) in limits.items():
            if not good:
                raise RequestError(f"{name} is {value}, expected {expected}")


@dataclass(frozen=True)
class Row:
    """What is run: prompt, interventions in order, sampling, seed."""

    prompt: Given
    steer: tuple[Intervention, ...] = ()
    sampling: Sampling = Sampling()
    seed: int = 0

    def _repr_html_(self) -> str:
        from interp_steer.util.html import table

        said = self.prompt
        if isinstance(said, (str, Encoded)):
            said = (("text", last_said(said)),)
        rows = [{"": role, "row": content} for role, content in said]
        rows.append({"": "steered", "row": brief(self.steer) or "unsteered"})
        return table([*rows, {"": "seed", "row": self.seed}])

    def key(self, model: SteeringModel) -> str:
        """A hash of all that decides the outcome, rendered token ids and weights included."""
        content = {
            "model": model.fingerprint,
            "dtype": str(model.dtype),
            "ids": model.encode(self.prompt).ids,
            "steer": line(self.steer),
            "sampling": asdict(self.sampling),
            "seed": self.seed,
        }
        # a latent clamp uses an encoder too, which the decoder row's sha does not see
        if saes := sorted(
            {
                "{release}/{sae_id}@{revision}".format_map({"revision": "", **dict(d.source)})
                for one in self.steer
                if one.operator == "latent_clamp"
                for site in one.sites
                for d in one.at(site)
            }
        ):
            content["saes"] = saes
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """What a row generated.

    Attributes:
        row: the row.
        token_ids: generated ids, without the stop id.
        text: their text.
        finish: "stop" (a stop id), "length" (max_new_tokens), "cancelled", "overflow" (the
            coefficient was too large for the number format and no token could be told), or of a
            `Stepper`'s row "memory" (it does not fit alone).
        taps: activations that were asked for, by site: every position that the model has read
            (the prompt and the generated tokens, the last one only before a stop id), after any
            intervention there.
    """

    row: Row
    token_ids: tuple[int, ...]
    text: str
    finish: str
    taps: Mapping[Site, Float[Tensor, "pos d_model"]] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        from interp_steer.util.html import table

        told = record(self)
        shown = {"steered": told["steer"] or "unsteered", "answer": self.text, "end": self.finish}
        return table([{"": key, str(told["prompt"]): value} for key, value in shown.items()])


class Results(list[Result]):
    """A list of results that shows its texts in a notebook."""

    def _repr_html_(self) -> str:
        from interp_steer.util.html import SHOWN, table

        rows = []
        for result in self[:SHOWN]:
            rows.append(
                {
                    "prompt": last_said(result.row.prompt),
                    "steered": brief(result.row.steer) or "unsteered",
                    "answer": result.text,
                    "end": result.finish,
                }
            )
        return table(rows, f"{len(self)} results" if len(self) > SHOWN else "")


def record(result: Result, scale: Scale | None = None) -> dict[str, object]:
    """A result as a program reads it; `coefficient` and `dose` hold one entry a site.

    Args:
        scale: gives the doses; they are None without it, and where a dose has no meaning.
    """
    steer = result.row.steer
    strengths = [s for one in steer for s in one.strengths(scale)]
    return {
        "prompt": last_said(result.row.prompt),
        "steer": line(steer) if steer else None,
        "text": result.text,
        "tokens": len(result.token_ids),
        "token_ids": list(result.token_ids),
        "coefficient": [s["coefficient"] for s in strengths] if steer else None,
        "dose": [s["dose"] for s in strengths] if steer else None,
    }


@dataclass(frozen=True)
class Score:
    """What a row makes of a given continuation, teacher-forced.

    Attributes:
        token_ids: the continuation.
        logprobs: natural logarithm of each token's probability.
        last_logits: logits after the last token, if asked for.
        kl: KL(reference || row) in nats, at the last prompt position and after each token of the
            continuation (one more than tokens); None without a reference.
        among: at the same positions ln of the probability that the next token is one of those asked
            for; None if none were.
        taps: as in `Result`.
    """

    token_ids: tuple[int, ...]
    logprobs: Float[Tensor, " tokens"]
    last_logits: Float[Tensor, " d_vocab"] | None = None
    kl: Float[Tensor, " positions"] | None = None
    among: Float[Tensor, " positions"] | None = None
    taps: Mapping[Site, Float[Tensor, "pos d_model"]] = field(default_factory=dict)
