"""The metrics that come with the package, as they are declared. `study.metrics` computes them."""

from interp_steer.results.declared import Declared

_DECLARED = (
    Declared(
        name="mention", kind="rate", bounds=(0.0, 1.0), version=2,
        about="Answers that name a concept word which their prompt does not.",
    ),
    Declared(
        name="concept", kind="rate", bounds=(0.0, 1.0), version=2,
        about="Answers that name a concept word which their prompt does not, and do not "
        "loop (rep3 0.2).",
    ),
    Declared(
        name="rep3", better="low", unit="share of 3-grams", bounds=(0.0, 1.0),
        about="Share of repeated 3-grams of the answer's tokens; above 0.2 it loops.",
    ),
    Declared(
        name="distinct2", unit="share of 2-grams", bounds=(0.0, 1.0),
        about="Different 2-grams of the answer's tokens / all (distinct-2, Li et al. 2016).",
    ),
    Declared(
        name="surprise", better="low", unit="nats a token",
        about="Mean of -ln p(token) of the answer under the unsteered model.",
    ),
    Declared(
        name="length", unit="tokens",
        about="Tokens of the answer.",
    ),
    Declared(
        name="kl_last", better="low", needs="unsteered", unit="nats",
        about="KL(unsteered || steered) of the answer's first token, at the last prompt "
        "position.",
    ),
    Declared(
        name="kl_mean", better="low", needs="unsteered", unit="nats a token",
        about="KL(unsteered || steered) averaged over the last prompt position and the "
        "unsteered answer.",
    ),
    Declared(
        name="kl_p95", better="low", needs="unsteered", unit="nats a token",
        about="95th percentile of KL(unsteered || steered) over the last prompt position and the "
        "unsteered answer's.",
    ),
    Declared(
        name="concept_logprob", needs="unsteered", unit="nats",
        about="ln of the mean probability, over the last prompt position and the unsteered answer, "
        "of tokens that begin a concept word; the difference from unsteered says how many times "
        "likelier (e to that power) steering makes them.",
    ),
    Declared(
        name="logit_difference", needs="pair", unit="nats", version=2,
        about="Logit of the positive answer minus that of the negative at the first token "
        "that differs.",
    ),
    Declared(
        name="propensity", needs="pair", unit="nats", version=2,
        about="ln p(positive answer) - ln p(negative answer) (Tan et al. 2024, arXiv "
        "2407.12404).",
    ),
    Declared(
        name="propensity_per_token", needs="pair", unit="nats a token", version=2,
        about="The same with each answer's mean over its tokens, for answers of different "
        "lengths.",
    ),
    Declared(
        name="p_matching", needs="pair", bounds=(0.0, 1.0), version=1,
        about="p(positive answer) / (p(positive) + p(negative)): CAA's probability of the answer "
        "that matches the behavior (Rimsky et al. 2024, arXiv 2312.06681).",
    ),
    Declared(
        name="refusal", kind="rate", bounds=(0.0, 1.0),
        about="Answers that hold a phrase of refusal in their first 200 characters, such as \"I "
        "cannot\" (after Zou et al. 2023, arXiv 2307.15043). Phrases judge, nobody reads.",
    ),
    Declared(
        name="refusal_logprob", unit="nats",
        about="ln of the probability that the answer begins as a refusal does: with \"I cannot\" "
        "or another of 19 openings, each read whole.",
    ),
    Declared(
        name="accuracy", kind="rate", needs="choices", bounds=(0.0, 1.0), version=2,
        about="Questions whose correct choice has the largest ln p of all choices, whole "
        "texts.",
    ),
    Declared(
        name="loss", better="low", needs="continuation", unit="nats a token", version=2,
        about="Cross-entropy of the given continuation: on neutral text, what steering "
        "damages.",
    ),
)  # fmt: skip
BUILT_IN = {metric.name: metric for metric in _DECLARED}
"""By name."""
