"""What studies over concepts share: the concepts, and what the model itself says about them."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from interp_steer import Contrast, Direction, Engine, Row, Sampling, SteeringModel, chat
from interp_steer.stats import intervals

CONCEPTS = ["ocean", "music", "war", "doctor", "winter", "horse", "money", "science", "church",
            "garden", "bread", "king", "school", "rain", "fire", "mother", "car", "gold", "dream",
            "computer"]  # fmt: skip
ASKED = ["Tell me about {}.", "Write two sentences about {}.", "What is interesting about {}?",
         "Describe {} to a child.", "Why does {} matter?",
         "Write a short story about {}."]  # fmt: skip
TOLD = "Mention {} in every answer, whatever the question is about."


def own_answers(
    model: SteeringModel, concepts: Sequence[str], layer: int
) -> tuple[Float[torch.Tensor, "concept question d_model"], list[str]]:
    """Mean activations over the model's answers about every concept, and the answers."""
    chats = [chat(text.format(word)) for word in concepts for text in ASKED]
    rows = [Row(one, (), Sampling(max_new_tokens=32)) for one in chats]
    said = [result.text for result in Engine(model).generate(rows)]
    answered = [(*one, ("assistant", text)) for one, text in zip(chats, said, strict=True)]
    found = Contrast.measure(model, answered, answered[:1]).positive[layer]
    return found.view(len(concepts), len(ASKED), -1), said


def means(
    activations: Float[torch.Tensor, "concept question d_model"], layer: int
) -> list[Direction]:
    """Every concept's mean less that of the others."""
    of_concept = activations.mean(1)
    count = range(len(of_concept))
    others = [of_concept[[i for i in count if i != n]].mean(0) for n in count]
    point = f"blocks.{layer}.hook_resid_post"
    return [Direction.of(of_concept[n] - others[n], point) for n in count]


def told(values: np.ndarray, form: str = ".3f") -> str:
    """A mean with its interval over concepts."""
    one = intervals.mean(values)
    ends = f" [{one.low:{form}}, {one.high:{form}}]" if one.low is not None else ""
    return f"{one.estimate:{form}}{ends}"
